"""Rows → what each adds to each metric, once: losses, text scores, right or wrong. Everything else reads these columns.

Knows nothing about how answers and losses were made, about files, or about how two variants are compared.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from corral.errors import InputError
from corral.evaluation.statistics import Measure
from corral.metrics.bleu import bleu, bleu_statistics
from corral.metrics.rouge import Rouge

Direction = Literal["lower", "higher"]
TEXT_METRICS = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True, slots=True)
class Metric:
    """What a reader must know to read a metric's figures. `digits` after the point are worth showing."""

    label: str
    unit: str
    better: Direction
    digits: int


METRICS: Mapping[str, Metric] = {
    "loss": Metric("Held-out loss", "nats per token", "lower", 3),
    "rouge1": Metric("ROUGE-1", "F, 0–1", "higher", 3),
    "rouge2": Metric("ROUGE-2", "F, 0–1", "higher", 3),
    "rougeL": Metric("ROUGE-L", "F, 0–1", "higher", 3),
    "bleu": Metric("BLEU", "0–100", "higher", 2),
    "accuracy": Metric("accuracy", "share, 0–1", "higher", 3),
    "logprob": Metric("by log-prob", "share, 0–1", "higher", 3),
    "logprob_byte": Metric("by log-prob/byte", "share, 0–1", "higher", 3),
}
"""On a run's own rows by these names; on a task's as `TASK/NAME`. `accuracy`: of what was answered. `logprob`: of the option
with the highest log-probability; `logprob_byte`: the same divided by the bytes of the option's text (lm-eval's acc_norm)."""


def known_metric(name: str) -> Metric | None:
    """What is known of a metric, by its full name; None for one that is not corral's."""
    task, _, short = name.rpartition("/")
    known = METRICS.get(short)
    if known is None or not task:
        return known
    return Metric(f"{task}: {known.label}", known.unit, known.better, known.digits)


def sort_metrics(names: Iterable[str]) -> list[str]:
    """Metrics as they are shown: a run's own rows first, then task by task; those that corral does not know last."""
    places = {name: place for place, name in enumerate(METRICS)}

    def key(name: str) -> tuple[bool, str, int, str]:
        task, _, short = name.rpartition("/")
        return short not in places, task, places.get(short, 0), name

    return sorted(set(names), key=key)


@dataclass(frozen=True, slots=True)
class Row:
    """What one variant made of one row: its loss, its answer, whether that is right, or several of them.

    Attributes:
        id: names the row; the same in every variant.
        nll: sum of −log p over the reference answer's tokens, in nats.
        tokens: how many tokens that sum runs over.
        reference: the text an answer is compared with.
        answer: what the variant generated; None where it was not asked, "" where it said nothing.
        others: further texts that are as good a reference; ROUGE is that of the best, and there is no BLEU.
        right: `accuracy`, `logprob`, `logprob_byte`, those that were measured.
    """

    id: str
    nll: float | None = None
    tokens: int | None = None
    reference: str | None = None
    answer: str | None = None
    other_references: tuple[str, ...] = ()
    correct: Mapping[str, bool] = field(default_factory=dict[str, bool])


@dataclass(frozen=True, slots=True)
class VariantRows:
    """A variant's rows, with figures about the run as a whole (tokens, seconds, answers_per_second)."""

    rows: Sequence[Row]
    info: Mapping[str, float] = field(default_factory=dict[str, float])
    tasks: Mapping[str, Sequence[Row]] = field(default_factory=dict[str, Sequence[Row]])
    """Rows of each task, by its name."""


@dataclass(frozen=True, slots=True)
class Column:
    """One metric over n rows.

    Attributes:
        ids: of the rows, in order; the measure's rows are in the same order.
        kind: of what it was taken, for messages: loss, answers, options.
        references: what the answers were compared with, or nothing.
    """

    ids: tuple[str, ...]
    source: str
    measure: Measure
    references: tuple[tuple[str, ...], ...] = ()


MetricColumns: TypeAlias = Mapping[str, Column]
"""A column for each metric that was measured, by its full name, in the order in which they are shown."""


def score_variant(variant: str, rows: VariantRows, rouge: Rouge | None = None) -> MetricColumns:
    """All that a variant was measured by. Raises: as `score_rows`."""
    columns = dict(score_rows(variant, rows.rows, rouge))
    for task, of_task in rows.tasks.items():
        columns |= {f"{task}/{name}": c for name, c in score_rows(f"{variant}, task {task}", of_task, rouge).items()}
    return {name: columns[name] for name in sort_metrics(columns)}


def score_rows(variant: str, rows: Sequence[Row], rouge: Rouge | None = None) -> MetricColumns:
    """Scores rows once. Text metrics are taken of rows with both a reference and an answer.

    Args:
        variant: its name, for messages.
        rows: in any order.
        rouge: `Rouge()` unless given; give one to keep its vocabulary between calls.

    Raises:
        InputError: an id twice; an nll without its tokens, or the reverse; a loss that is not a finite number.
    """
    where = f"variant {variant}"
    repeated = sorted(name for name, times in Counter(row.id for row in rows).items() if times > 1)
    if repeated:
        raise InputError(f"row ids appear more than once: {abbreviate(repeated)}", where=where, hint="one row per id")
    rows = sorted(rows, key=lambda row: row.id)
    found = {**_loss_columns(rows, where), **_text_columns(rows, rouge or Rouge()), **_correctness_columns(rows)}
    return {name: column for name, column in found.items() if column.ids}


def _loss_columns(rows: Sequence[Row], where: str) -> dict[str, Column]:
    losses = [(row.id, *_checked_loss(row, where)) for row in rows if row.nll is not None or row.tokens is not None]
    sums = np.array([(nll, tokens) for _, nll, tokens in losses], dtype=np.float64).reshape(-1, 2)
    return {"loss": Column(tuple(name for name, _, _ in losses), "loss", Measure.ratio(sums[:, 0], sums[:, 1]))}


def _text_columns(rows: Sequence[Row], rouge: Rouge) -> dict[str, Column]:
    texts = [(row, row.reference, row.answer) for row in rows if row.reference is not None and row.answer is not None]
    if not texts:
        return {}
    ids, answers = tuple(row.id for row, _, _ in texts), [answer for _, _, answer in texts]
    references = tuple((reference, *row.other_references) for row, reference, _ in texts)
    scores = np.array(
        [
            rouge.score_pairs(several, [answer] * len(several)).max(axis=0)
            for several, answer in zip(references, answers, strict=True)
        ]
    )
    columns = {
        name: Column(ids, "answers", Measure.mean(scores[:, place]), references)
        for place, name in enumerate(TEXT_METRICS)
    }
    if all(len(several) == 1 for several in references):
        counts = bleu_statistics([first for first, *_ in references], answers)
        columns["bleu"] = Column(ids, "answers", Measure.corpus(counts, bleu), references)
    return columns


def _correctness_columns(rows: Sequence[Row]) -> dict[str, Column]:
    columns: dict[str, Column] = {}
    for name, kind in (("accuracy", "answers"), ("logprob", "options"), ("logprob_byte", "options")):
        judged = [(row.id, row.correct[name]) for row in rows if name in row.correct]
        values = np.array([right for _, right in judged], dtype=np.float64)
        columns[name] = Column(tuple(id_ for id_, _ in judged), kind, Measure.mean(values))
    return columns


def _checked_loss(row: Row, where: str) -> tuple[float, int]:
    if row.nll is None or row.tokens is None:
        missing = "tokens" if row.tokens is None else "nll"
        raise InputError(f"row {row.id} has no {missing}", where=where, hint="a loss needs both nll and tokens")
    if not math.isfinite(row.nll) or row.tokens < 1:
        raise InputError(
            f"row {row.id} has nll {row.nll} over {row.tokens} tokens",
            where=where,
            hint="leave rows without trained tokens out; a loss that is not a number means a broken model",
        )
    return row.nll, row.tokens


def abbreviate(names: Sequence[str] | Mapping[str, object], limit: int = 5) -> str:
    """Names for a message: the first few, and how many more there are."""
    shown = list(names)[:limit]
    return ", ".join(shown) + (f" and {len(names) - limit} more" if len(names) > limit else "")
