"""What a training stage has to compute: its steps and tokens, its longest pack, and a few rows that stand for them.

From the rows' lengths and the order alone; knows nothing about models, time or memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from corral.data.packing import pack_sequences
from corral.model.device import pack_length
from corral.preflight.estimate import PackShape
from corral.training.sampler import Order

if TYPE_CHECKING:
    from corral.data.example_store import ExampleStore
    from corral.data.prepare import Prepared
    from corral.recipe import Train

_LOOKED_AT = 20_000  # steps whose packs are made
_HEAVY_PACKS = 2  # the second pass of a step has the first one's gradients beside it
_TYPICAL_PACKS = 4
_EVALUATED_PACKS = 2


@dataclass(frozen=True, slots=True)
class Workload:
    """What a stage has to compute.

    Args:
        steps: optimizer steps.
        tokens: of all steps together, context included.
        rows: different and repeated rows to train on.
        heavy: rows that make the longest packs of any step.
        longest: the longest pack.
        typical: rows of some packs of a step of middling size.
        common: what a pack is on average.
        evaluations: on the validation rows, the one before the first step included.
        evaluated: tokens of each.
        held_out: some of those rows.
        held_out_tokens: of these.
        checkpoints: how many are written.
        pack_length: most tokens in a forward pass.
        exact: whether every step was looked at.
    """

    steps: int
    tokens: int
    rows: int
    heavy: tuple[int, ...]
    longest: PackShape
    typical: tuple[int, ...]
    common: PackShape
    evaluations: int
    evaluated: int
    held_out: tuple[int, ...]
    held_out_tokens: int
    checkpoints: int
    pack_length: int
    exact: bool

    @classmethod
    def from_stage(cls, train: Train, prepared: Prepared, max_length: int, seed: int, kind: str) -> Workload:
        """Of a stage over prepared rows.

        Args:
            max_length: `data.max_length`.
            kind: `cuda` or `cpu`, for the default length of packs.
        """
        rows = prepared.train
        limit = pack_length(train.pack_length, max_length, kind)
        order = Order(train, rows.lengths.tolist(), seed)
        every = math.ceil(order.steps / _LOOKED_AT)
        batches = [order.batch(step) for step in range(1, order.steps + 1, every)]
        sizes = [int(rows.lengths[batch].sum()) for batch in batches]
        heavy = _heaviest(batches, sizes, rows, limit)
        typical = batches[sorted(range(len(sizes)), key=sizes.__getitem__)[len(sizes) // 2]]
        held_out = prepared.validation.lengths[: train.evaluate_rows].tolist()
        some = _evenly_spaced(pack_sequences(held_out, limit), _EVALUATED_PACKS)
        tokens = sum(sizes) if every == 1 else round(sum(sizes) / len(sizes) * order.steps)
        evaluations = 1 + math.ceil(order.steps / train.evaluate_every) if held_out else 0
        return cls(
            steps=order.steps,
            tokens=tokens,
            rows=len(rows),
            heavy=tuple(i for pack in heavy for i in pack),
            longest=_pack_shape(rows, heavy[0]),
            typical=tuple(i for pack in _evenly_spaced(_packs(rows, typical, limit), _TYPICAL_PACKS) for i in pack),
            common=_mean_pack_shape(rows, _packs(rows, typical, limit)),
            evaluations=evaluations,
            evaluated=sum(held_out),
            held_out=tuple(i for pack in some for i in pack),
            held_out_tokens=sum(held_out[i] for pack in some for i in pack),
            checkpoints=math.ceil(order.steps / train.checkpoint_every),
            pack_length=limit,
            exact=every == 1,
        )

    def longest_within(self, length: int) -> PackShape:
        """The longest pack if packs were made no longer than this."""
        if self.longest.tokens <= length:
            return self.longest
        part = length / self.longest.tokens
        return PackShape(length, math.ceil(self.longest.trained * part), min(self.longest.context, length / 2))


def _packs(rows: ExampleStore, batch: Sequence[int], limit: int) -> list[list[int]]:
    return [[batch[i] for i in pack] for pack in pack_sequences([int(rows.lengths[i]) for i in batch], limit)]


def _heaviest(batches: Sequence[list[int]], sizes: Sequence[int], rows: ExampleStore, limit: int) -> list[list[int]]:
    """The longest pack of all, and the next longest of the same step."""

    def weight(pack: Sequence[int]) -> tuple[int, int]:
        return int(rows.lengths[pack].sum()), int(rows.trained_tokens[pack].sum())

    best: list[list[int]] = []
    most = (0, 0)
    for batch, size in zip(batches, sizes, strict=True):
        if size < most[0]:
            continue
        if size <= limit and size == most[0] and int(rows.trained_tokens[batch].sum()) <= most[1]:
            continue
        found = sorted(_packs(rows, batch, limit), key=weight, reverse=True)
        if weight(found[0]) > most:
            best, most = found[:_HEAVY_PACKS], weight(found[0])
    return best


def _evenly_spaced(items: Sequence[list[int]], count: int) -> list[list[int]]:
    """At most so many of them, from first to last."""
    if len(items) <= count:
        return list(items)
    return [items[i * (len(items) - 1) // (count - 1)] for i in range(count)]


def _pack_shape(rows: ExampleStore, pack: Sequence[int]) -> PackShape:
    lengths = rows.lengths[pack]
    context = float((lengths**2).sum() / 2 / lengths.sum())
    return PackShape(int(lengths.sum()), int(rows.trained_tokens[pack].sum()), context)


def _mean_pack_shape(rows: ExampleStore, found: Sequence[Sequence[int]]) -> PackShape:
    each = [_pack_shape(rows, pack) for pack in found]
    tokens = sum(p.tokens for p in each)
    context = sum(p.context * p.tokens for p in each) / tokens
    return PackShape(round(tokens / len(each)), round(sum(p.trained for p in each) / len(each)), context)
