"""What to change in a recipe when a stage does not fit: one setting after another, those that cost least first.

Knows the formulas of `estimate`, and nothing about where memory was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from corral.preflight import estimate
from corral.preflight.estimate import Device, ModelShape, PackShape
from corral.preflight.workload import Workload

if TYPE_CHECKING:
    from corral.model.loading import DType
    from corral.recipe import Train

_LEAST_LENGTH = 256
_LEAST_RANK = 4
_WORTH = 0.01  # a change that saves a smaller share is not worth naming


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change, made after all those before it.

    Args:
        settings: as `--set` takes them.
        cost: what it costs besides.
        memory: bytes at the peak that are predicted then.
        fits: whether that is enough.
    """

    settings: tuple[str, ...]
    cost: str
    memory: int
    fits: bool


@dataclass(frozen=True, slots=True)
class _Change:
    settings: tuple[str, ...]
    cost: str
    train: Train
    pack: PackShape


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
        lengths: of the rows to train on.
        max_length: `data.max_length`.
        available: bytes that may be used.
        correction: what was measured with the recipe as it is, less what was estimated.
    """

    def predicted(train: Train, pack: PackShape) -> int:
        return estimate.memory(shape, train, pack, device, dtype).total + correction

    found: list[Remedy] = []
    before = predicted(train, workload.longest)
    now = train, workload.longest
    for change in _changes(*now, number, workload, lengths, max_length):
        made = change(*now)
        if made is None:
            continue
        after = predicted(made.train, made.pack)
        if after > before * (1 - _WORTH):
            continue
        now, before = (made.train, made.pack), after
        found.append(Remedy(made.settings, made.cost, after, after <= available))
        if after <= available:
            break
    return found


def _changes(
    train: Train, pack: PackShape, number: int, workload: Workload, lengths: Sequence[int], max_length: int
) -> Iterator[Callable[[Train, PackShape], _Change | None]]:
    at = f"train.{number - 1}."

    def setting(key: str, value: Any, cost: str, when: Callable[[Train], bool]) -> Callable[..., _Change | None]:
        def change(train: Train, pack: PackShape) -> _Change | None:
            if not when(train):
                return None
            section, _, last = key.rpartition(".")
            if section:
                inner = getattr(train, section).model_copy(update={last: value})
                made = train.model_copy(update={section: inner})
            else:
                made = train.model_copy(update={key: value})
            return _Change((f"{at}{key}={str(value).lower()}",), cost, made, pack)

        return change

    def shorter_packs(length: int) -> Callable[..., _Change | None]:
        def change(train: Train, _: PackShape) -> _Change:
            made = train.model_copy(update={"pack_length": length})
            return _Change(
                (f"{at}pack_length={length}",), "nothing; on a GPU some speed", made, workload.longest_within(length)
            )

        return change

    def shorter_rows(length: int) -> Callable[..., _Change | None]:
        lost = sum(n > length for n in lengths) / max(1, len(lengths))

        def change(train: Train, pack: PackShape) -> _Change | None:
            if pack.tokens <= length:
                return None
            made = train.model_copy(update={"pack_length": length})
            cost = f"{lost:.1%} of the rows, which are longer"
            return _Change(
                (f"data.max_length={length}", f"{at}pack_length={length}"), cost, made, workload.longest_within(length)
            )

        return change

    length = workload.pack_length
    while length > max_length:
        length = max(max_length, length // 2)
        if length < workload.longest.tokens:
            yield shorter_packs(length)
    again = "nothing but time: about a third slower"
    yield setting("gradient_checkpointing", True, again, lambda t: not t.gradient_checkpointing)
    rounded, wide = "moments rounded to 8 bits", ("adamw", "paged_adamw_32bit")
    yield setting("optimizer.kind", "adamw_8bit", rounded, lambda t: t.optimizer.kind in wide and t.sharding == "none")
    yield setting("method", "lora", "an adapter is trained instead of all weights", lambda t: t.method == "full")
    in_four = "frozen weights rounded to 4 bits; somewhat slower"
    yield setting(
        "quantization",
        "nf4",
        in_four,
        lambda t: t.quantization != "nf4" and not (t.method == "full" or t.sharding == "full"),
    )
    length = min(max_length, workload.longest.tokens)
    while length // 2 >= _LEAST_LENGTH:
        length //= 2
        yield shorter_rows(length)
    rank = train.lora.rank
    while rank // 2 >= _LEAST_RANK:
        rank //= 2
        yield setting("lora.rank", rank, "a smaller adapter learns less", lambda t: t.method == "lora")
