"""Which settings of a recipe to change when a stage does not fit in memory, cheapest first.

Predictions come from the formulas of `memory_estimate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from corral.preflight import memory_estimate
from corral.preflight.memory_estimate import Device, ModelShape, PackShape
from corral.preflight.workload import Workload

if TYPE_CHECKING:
    from corral.model.loading import DType
    from corral.recipe import Train

_LEAST_LENGTH = 256
_LEAST_RANK = 4
_LEAST_SAVING = 0.01  # a change that saves a smaller share is left out


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change of the recipe, together with all those before it.

    Args:
        settings: as `--set` takes them.
        cost: what it costs besides.
        memory: predicted bytes at the peak.
        fits: whether that is enough.
    """

    settings: tuple[str, ...]
    cost: str
    memory: int
    fits: bool


@dataclass(frozen=True, slots=True)
class _Change:
    """A setting of the stage to change, by its dotted key; `cuts_rows` sets `data.max_length` to the same value."""

    key: str
    value: Any
    cost: str
    applies: Callable[[Train], bool] = lambda train: True
    cuts_rows: bool = False

    def apply(self, train: Train) -> Train:
        section, _, name = self.key.rpartition(".")
        if not section:
            return train.model_copy(update={self.key: self.value})
        return train.model_copy(update={section: getattr(train, section).model_copy(update={name: self.value})})


def find_remedies(
    shape: ModelShape,
    train: Train,
    number: int,
    workload: Workload,
    lengths: Sequence[int],
    max_length: int,
    device: Device,
    dtype: DType,
    available: int,
    correction: int = 0,
) -> list[Remedy]:
    """Changes up to the first after which the stage fits, or all there are.

    Args:
        number: of the stage, from 1.
        lengths: tokens of each training row.
        max_length: `data.max_length`.
        available: bytes that may be used.
        correction: what was measured with the recipe as it is, less what was estimated.
    """

    def predict(train: Train, pack: PackShape) -> int:
        return memory_estimate.memory(shape, train, pack, device, dtype).total + correction

    remedies: list[Remedy] = []
    pack = workload.longest
    memory = predict(train, pack)
    for change in _changes(train, workload, lengths, max_length):
        if not change.applies(train) or (change.cuts_rows and pack.tokens <= change.value):
            continue
        changed = change.apply(train)
        changed_pack = workload.longest_within(change.value) if change.key == "pack_length" else pack
        after = predict(changed, changed_pack)
        if after > memory * (1 - _LEAST_SAVING):
            continue
        train, pack, memory = changed, changed_pack, after
        settings = (f"train.{number - 1}.{change.key}={str(change.value).lower()}",)
        if change.cuts_rows:
            settings = (f"data.max_length={change.value}", *settings)
        remedies.append(Remedy(settings, change.cost, after, after <= available))
        if after <= available:
            break
    return remedies


def _changes(train: Train, workload: Workload, lengths: Sequence[int], max_length: int) -> Iterator[_Change]:
    """Every change, cheapest first."""
    length = workload.pack_length
    while length > max_length:
        length = max(max_length, length // 2)
        if length < workload.longest.tokens:
            yield _Change("pack_length", length, "nothing; on a GPU some speed")
    cost = "nothing but time: about a third slower"
    yield _Change("gradient_checkpointing", True, cost, lambda t: not t.gradient_checkpointing)
    yield _Change(
        "optimizer.kind",
        "adamw_8bit",
        "moments rounded to 8 bits",
        lambda t: t.optimizer.kind in ("adamw", "paged_adamw_32bit") and t.sharding == "none",
    )
    yield _Change("method", "lora", "an adapter is trained instead of all weights", lambda t: t.method == "full")
    yield _Change(
        "quantization",
        "nf4",
        "frozen weights rounded to 4 bits; somewhat slower",
        lambda t: t.quantization != "nf4" and not (t.method == "full" or t.sharding == "full"),
    )
    length = min(max_length, workload.longest.tokens)
    while length // 2 >= _LEAST_LENGTH:
        length //= 2
        lost = sum(n > length for n in lengths) / max(1, len(lengths))
        cost = f"{lost:.1%} of the rows, which are longer"
        yield _Change("pack_length", length, cost, cuts_rows=True)
    rank = train.lora.rank
    while rank // 2 >= _LEAST_RANK:
        rank //= 2
        yield _Change("lora.rank", rank, "a smaller adapter learns less", lambda t: t.method == "lora")
