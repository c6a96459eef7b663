"""What a training stage has to compute: steps, tokens, its longest pack, and a few rows that represent them.

It is computed from the rows' lengths and their order alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from corral.data.packing import pack_sequences
from corral.model.device import pack_length
from corral.preflight.memory_estimate import PackShape
from corral.training.sampler import BatchSampler

if TYPE_CHECKING:
    from corral.data.example_store import ExampleStore
    from corral.data.prepare import Prepared
    from corral.recipe import Train

_MOST_STEPS = 20_000  # steps whose packs are computed
_HEAVY_PACKS = 2  # the second pass of a step has the first one's gradients beside it
_TYPICAL_PACKS = 4
_EVALUATED_PACKS = 2


@dataclass(frozen=True, slots=True)
class Workload:
    """What a stage has to compute.

    Args:
        steps: optimizer steps.
        tokens: of all steps, prompts included.
        rows: rows to train on, repetitions included.
        heavy: rows that make the longest packs of any step.
        longest: the longest pack.
        typical: rows of some packs of a step of median size.
        common: the average pack.
        evaluations: number of evaluations on validation rows, with the one before the first step.
        evaluated: tokens of one evaluation.
        held_out: some of its rows, for a trial.
        held_out_tokens: tokens of these.
        checkpoints: number of checkpoints written.
        pack_length: most tokens in a forward pass.
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

    @classmethod
    def from_stage(cls, train: Train, prepared: Prepared, max_length: int, seed: int, kind: str) -> Workload:
        """The workload of a stage over prepared rows.

        Args:
            max_length: `data.max_length`.
            kind: `cuda` or `cpu`, for the default length of packs.
        """
        rows = prepared.train
        limit = pack_length(train.pack_length, max_length, kind)
        sampler = BatchSampler(train, rows.lengths.tolist(), seed)
        interval = math.ceil(sampler.steps / _MOST_STEPS)
        batches = [sampler.batch(step) for step in range(1, sampler.steps + 1, interval)]
        sizes = [int(rows.lengths[batch].sum()) for batch in batches]
        heavy = _heaviest(batches, sizes, rows, limit)
        typical = batches[sorted(range(len(sizes)), key=sizes.__getitem__)[len(sizes) // 2]]
        held_out = prepared.validation.lengths[: train.evaluate_rows].tolist()
        sample = _evenly_spaced(pack_sequences(held_out, limit), _EVALUATED_PACKS)
        tokens = sum(sizes) if interval == 1 else round(sum(sizes) / len(sizes) * sampler.steps)
        evaluations = 1 + math.ceil(sampler.steps / train.evaluate_every) if held_out else 0
        return cls(
            steps=sampler.steps,
            tokens=tokens,
            rows=len(rows),
            heavy=tuple(i for pack in heavy for i in pack),
            longest=_pack_shape(rows, heavy[0]),
            typical=tuple(i for pack in _evenly_spaced(_packs(rows, typical, limit), _TYPICAL_PACKS) for i in pack),
            common=_mean_pack_shape(rows, _packs(rows, typical, limit)),
            evaluations=evaluations,
            evaluated=sum(held_out),
            held_out=tuple(i for pack in sample for i in pack),
            held_out_tokens=sum(held_out[i] for pack in sample for i in pack),
            checkpoints=math.ceil(sampler.steps / train.checkpoint_every),
            pack_length=limit,
        )

    def longest_within(self, length: int) -> PackShape:
        """The longest pack if packs had at most `length` tokens."""
        if self.longest.tokens <= length:
            return self.longest
        share = length / self.longest.tokens
        return PackShape(length, math.ceil(self.longest.trained * share), min(self.longest.context, length / 2))


def _packs(rows: ExampleStore, batch: Sequence[int], limit: int) -> list[list[int]]:
    return [[batch[i] for i in pack] for pack in pack_sequences([int(rows.lengths[i]) for i in batch], limit)]


def _heaviest(batches: Sequence[list[int]], sizes: Sequence[int], rows: ExampleStore, limit: int) -> list[list[int]]:
    """The longest pack of all steps, and the next longest of the same step."""

    def size_of(pack: Sequence[int]) -> tuple[int, int]:
        return int(rows.lengths[pack].sum()), int(rows.trained_tokens[pack].sum())

    best: list[list[int]] = []
    longest = (0, 0)
    for batch, size in zip(batches, sizes, strict=True):
        if size < longest[0]:
            continue
        if size <= limit and size == longest[0] and int(rows.trained_tokens[batch].sum()) <= longest[1]:
            continue
        by_size = sorted(_packs(rows, batch, limit), key=size_of, reverse=True)
        if size_of(by_size[0]) > longest:
            best, longest = by_size[:_HEAVY_PACKS], size_of(by_size[0])
    return best


def _evenly_spaced(items: Sequence[list[int]], count: int) -> list[list[int]]:
    """At most `count` of the items, at equal distances from first to last."""
    if len(items) <= count:
        return list(items)
    return [items[i * (len(items) - 1) // (count - 1)] for i in range(count)]


def _pack_shape(rows: ExampleStore, pack: Sequence[int]) -> PackShape:
    lengths = rows.lengths[pack]
    context = float((lengths**2).sum() / 2 / lengths.sum())
    return PackShape(int(lengths.sum()), int(rows.trained_tokens[pack].sum()), context)


def _mean_pack_shape(rows: ExampleStore, batch: Sequence[Sequence[int]]) -> PackShape:
    shapes = [_pack_shape(rows, pack) for pack in batch]
    tokens = sum(p.tokens for p in shapes)
    context = sum(p.context * p.tokens for p in shapes) / tokens
    return PackShape(round(tokens / len(shapes)), round(sum(p.trained for p in shapes) / len(shapes)), context)
