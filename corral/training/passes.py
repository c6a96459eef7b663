"""How a stage's steps are cut into forward passes: the length of packs and gradient checkpointing, for the memory of a device.

Both change memory and speed, never the result (but see `pack_length` in the recipe). So they are no part of what a stage
depends on: a stage that goes on elsewhere keeps those that it began with, which are written to its folder.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corral.storage import write_json
from corral.training import memory_estimate
from corral.training.memory_estimate import DeviceKind, ModelShape

if TYPE_CHECKING:
    from corral.model.loading import DType
    from corral.recipe import Train

PASSES_FILE = "passes.json"
MARGIN = 0.1
"""Share of a device's memory that is left free, as an estimate may be off by as much."""
# A GPU needs long passes to be busy; from 2,048 tokens on a longer one gains less than gradient checkpointing costs. A CPU is
# as fast with short ones.
_UNCHECKPOINTED = {"cuda": (8192, 4096, 2048), "cpu": (512,)}
_CHECKPOINTED = {"cuda": (8192, 4096, 2048, 1024, 512, 1), "cpu": (512, 1)}


@dataclass(frozen=True, slots=True)
class Passes:
    """What was chosen for a stage.

    Args:
        pack_length: most tokens of one forward pass.
        gradient_checkpointing: whether layers are computed again for their gradients.
        dtype: what the stage computes in.
        estimate: bytes at the peak of a step.
        memory: bytes that the device had; None if that is not known.
        fallbacks: why the device computes in a slower way than others.
    """

    pack_length: int
    gradient_checkpointing: bool
    dtype: DType
    estimate: int
    memory: int | None
    fallbacks: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the estimate leaves the margin."""
        return self.memory is None or self.estimate <= self.memory * (1 - MARGIN)

    def apply(self, train: Train) -> Train:
        """The stage's settings with these in place of `auto`."""
        values = {"pack_length": self.pack_length, "gradient_checkpointing": self.gradient_checkpointing}
        return train.model_copy(update=values)

    def write(self, stage: Path) -> None:
        """Record them in a stage's folder. Raises: StorageError."""
        write_json(stage / PASSES_FILE, asdict(self))

    @classmethod
    def read(cls, stage: Path) -> Passes | None:
        """Those that a stage began with; None if it has not begun."""
        try:
            values: dict[str, Any] = json.loads((stage / PASSES_FILE).read_text("utf-8"))
            values["fallbacks"] = tuple(values["fallbacks"])
            return cls(**values)
        except (OSError, ValueError, KeyError, TypeError):
            return None


def longest_pack(lengths: Sequence[int], batch_size: int, limit: int) -> int:
    """The most tokens that a pack of some step can have.

    Args:
        lengths: tokens of each example.
        limit: most tokens of a pack, unless one example alone is longer.
    """
    largest = heapq.nlargest(batch_size, lengths)
    return max(min(limit, sum(largest)), largest[0]) if largest else 0


def choose_passes(
    shape: ModelShape, train: Train, lengths: Sequence[int], device: DeviceKind, dtype: DType, memory: int | None
) -> Passes:
    """The fastest passes that a device has memory for; if none fit, those that need least.

    Args:
        train: its settings; what is not `auto` stays.
        lengths: tokens of each example, those for validation included.
        memory: bytes that the device has for training; None if that is not known.
    """
    longest = max(lengths, default=1)
    checkpointing = train.gradient_checkpointing
    options = [(length, False) for length in _UNCHECKPOINTED[device] if checkpointing is not True]
    options += [(length, True) for length in _CHECKPOINTED[device] if checkpointing is not False]
    if checkpointing is False:
        options += [(length, False) for length in _CHECKPOINTED[device]]
    chosen: Passes | None = None
    for length, again in options:
        limit = max(length, longest) if train.pack_length == "auto" else train.pack_length
        tokens = longest_pack(lengths, train.batch_size, limit)
        settings = train.model_copy(update={"gradient_checkpointing": again})
        estimate = memory_estimate.memory(shape, settings, tokens, tokens, device, dtype).peak
        option = Passes(limit, again, dtype, estimate, memory)
        if option.fits:
            return option
        chosen = option if chosen is None or option.estimate < chosen.estimate else chosen
    assert chosen is not None
    return chosen


def savings(train: Train, number: int, longest: int) -> Iterator[tuple[str, Train]]:
    """Settings that would need less memory, cheapest first: each as `--set` takes it, and the stage with all so far.

    Args:
        train: with its passes applied.
        number: of the stage, from 1.
        longest: tokens of the longest example.
    """

    def change(key: str, value: Any) -> tuple[str, Train]:
        nonlocal train
        section, _, name = key.rpartition(".")
        update = {key: value} if not section else {section: getattr(train, section).model_copy(update={name: value})}
        train = train.model_copy(update=update)
        return f"train.{number - 1}.{key}={str(value).lower()}", train

    assert isinstance(train.pack_length, int)
    shorter = max(longest, min(train.pack_length // 2, 2048))
    if shorter < train.pack_length:
        yield change("pack_length", shorter)
    if train.gradient_checkpointing is not True:
        yield change("gradient_checkpointing", value=True)
    if longest < shorter:
        yield change("pack_length", longest)
    if train.sharding == "none" and train.optimizer.kind in ("adamw", "paged_adamw_32bit"):
        yield change("optimizer.kind", "adamw_8bit")
    if train.method == "full":
        yield change("method", "lora")
    if train.sharding == "none" and train.quantization != "nf4":
        yield change("quantization", "nf4")
