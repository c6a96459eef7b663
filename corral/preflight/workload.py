"""What a training stage has to compute: steps, tokens, its longest pack, and a few rows that represent them.

It is computed from the rows' lengths and their order alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from corral.data.packing import pack_sequences
from corral.training.objective_table import build_objective
from corral.training.sampler import BatchSampler

if TYPE_CHECKING:
    from corral.data.example_store import SizedExamples
    from corral.recipe import Train
    from corral.training.stage_rows import StageRows

_MOST_STEPS = 20_000  # steps whose packs are computed
_HEAVY_PACKS = 2  # the second pass of a step has the first one's gradients beside it
_TYPICAL_PACKS = 4
_EVALUATED_PACKS = 2


@dataclass(frozen=True, slots=True)
class Workload:
    """What a stage has to compute.

    Args:
        steps: optimizer steps.
        tokens: of all steps, prompts and what is read for a statistic included.
        trained_share: share of the tokens that is trained.
        rows: rows to train on, repetitions included.
        heavy: rows that make the longest packs of any step.
        longest: tokens of the longest pack, and how many of them are trained.
        typical: rows of some packs of a step of median size.
        evaluations: number of evaluations on validation rows, with the one before the first step.
        evaluated: tokens of one evaluation.
        held_out: some of its rows, for a trial; `held_out_tokens` of them.
        checkpoints: number of checkpoints written.
        reference: tokens whose log-probabilities under the reference are computed before the first step.
    """

    steps: int
    tokens: int
    trained_share: float
    rows: int
    heavy: tuple[int, ...]
    longest: tuple[int, int]
    typical: tuple[int, ...]
    evaluations: int
    evaluated: int
    held_out: tuple[int, ...]
    held_out_tokens: int
    checkpoints: int
    reference: int = 0

    @classmethod
    def from_stage(cls, train: Train, stage_rows: StageRows, seed: int) -> Workload:
        """The workload of a stage, whose `pack_length` is a number, over its rows."""
        assert isinstance(train.pack_length, int)
        rows, limit = stage_rows.train, train.pack_length
        sampler = BatchSampler(train, rows.lengths.tolist(), seed)
        interval = math.ceil(sampler.steps / _MOST_STEPS)
        batches = [sampler.batch(step) for step in range(1, sampler.steps + 1, interval)]
        tokens = [int(rows.lengths[batch].sum()) for batch in batches]
        sizes = [int(rows.loss_lengths[batch].sum()) for batch in batches]
        heavy = _heaviest(batches, sizes, rows, limit)
        typical = batches[sorted(range(len(sizes)), key=sizes.__getitem__)[len(sizes) // 2]]
        held_out = stage_rows.validation.lengths[: train.evaluate_rows].tolist()
        sample = [i for pack in _evenly_spaced(pack_sequences(held_out, limit), _EVALUATED_PACKS) for i in pack]
        return cls(
            steps=sampler.steps,
            tokens=sum(tokens) if interval == 1 else round(sum(tokens) / len(tokens) * sampler.steps),
            trained_share=float(rows.trained_tokens.sum() / rows.lengths.sum()),
            rows=len(rows),
            heavy=tuple(i for pack in heavy for i in pack),
            longest=_size(rows, heavy[0]),
            typical=tuple(i for pack in _evenly_spaced(_packs(rows, typical, limit), _TYPICAL_PACKS) for i in pack),
            evaluations=1 + math.ceil(sampler.steps / train.evaluate_every) if held_out else 0,
            evaluated=sum(held_out),
            held_out=tuple(sample),
            held_out_tokens=sum(held_out[i] for i in sample),
            checkpoints=math.ceil(sampler.steps / train.checkpoint_every),
            reference=int(rows.lengths.sum()) + sum(held_out) if build_objective(train).needs_reference else 0,
        )

    def seconds(self, rate: float, optimizer: float, evaluation_rate: float, save: float, checkpoint: float) -> float:
        """Of the whole stage. Rates are tokens per second, the rest seconds each. Every evaluation is assumed to save."""
        evaluations = self.evaluations * (self.evaluated / evaluation_rate + save) + self.reference / evaluation_rate
        return self.tokens / rate + self.steps * optimizer + evaluations + self.checkpoints * checkpoint


def _packs(rows: SizedExamples, batch: Sequence[int], limit: int) -> list[list[int]]:
    return [[batch[i] for i in pack] for pack in pack_sequences([int(rows.loss_lengths[i]) for i in batch], limit)]


def _size(rows: SizedExamples, pack: Sequence[int]) -> tuple[int, int]:
    return int(rows.loss_lengths[pack].sum()), int(rows.trained_tokens[pack].sum())


def _heaviest(batches: Sequence[list[int]], sizes: Sequence[int], rows: SizedExamples, limit: int) -> list[list[int]]:
    """The longest pack of all steps, and the next longest of the same step."""
    best: list[list[int]] = []
    longest = (0, 0)
    for batch, size in zip(batches, sizes, strict=True):
        if size < longest[0]:
            continue
        if size <= limit and size == longest[0] and int(rows.trained_tokens[batch].sum()) <= longest[1]:
            continue
        by_size = sorted(_packs(rows, batch, limit), key=lambda pack: _size(rows, pack), reverse=True)
        if _size(rows, by_size[0]) > longest:
            best, longest = by_size[:_HEAVY_PACKS], _size(rows, by_size[0])
    return best


def _evenly_spaced(items: Sequence[list[int]], count: int) -> list[list[int]]:
    """At most `count` of the items, at equal distances from first to last."""
    if len(items) <= count:
        return list(items)
    return [items[i * (len(items) - 1) // (count - 1)] for i in range(count)]
