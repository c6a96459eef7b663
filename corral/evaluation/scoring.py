"""Scores rows: turns losses, answers and correctness into a column of per-row statistics for each metric."""

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
from corral.metrics.rouge import Rouge, RougeScores

Direction = Literal["lower", "higher"]


@dataclass(frozen=True, slots=True)
class Metric:
    """How to read a metric's figures.

    Attributes:
        better: the direction that is better; None for a metric that corral does not know.
        digits: how many to show after the point.
    """

    label: str
    unit: str
    better: Direction | None
    digits: int = 3


METRICS: Mapping[str, Metric] = {
    "loss": Metric("Held-out loss", "nats per token", "lower"),
    "rouge1": Metric("ROUGE-1", "F, 0–1", "higher"),
    "rouge2": Metric("ROUGE-2", "F, 0–1", "higher"),
    "rougeL": Metric("ROUGE-L", "F, 0–1", "higher"),
    "bleu": Metric("BLEU", "0–100", "higher", 2),
    "accuracy": Metric("accuracy", "share, 0–1", "higher"),
    "logprob": Metric("by log-prob", "share, 0–1", "higher"),
    "logprob_byte": Metric("by log-prob/byte", "share, 0–1", "higher"),
}
"""By the name for a run's own rows; the name for a task's rows is `TASK/NAME`. `accuracy`: whether the answer is right.
`logprob`: whether the correct option has the highest log-probability; `logprob_byte`: the same after division by the bytes of
the option's text (lm-eval's acc_norm)."""


def describe_metric(name: str) -> Metric:
    """A metric by its full name; one that corral does not know is labelled with its name and has no direction."""
    task, _, short = name.rpartition("/")
    known = METRICS.get(short)
    if known is None:
        return Metric(name, "", None)
    return Metric(f"{task}: {known.label}", known.unit, known.better, known.digits) if task else known


def sort_metrics(names: Iterable[str]) -> list[str]:
    """Metrics in the order they are shown: those of the run's own rows, then task by task, then unknown ones by name."""
    order = {name: position for position, name in enumerate(METRICS)}

    def key(name: str) -> tuple[bool, str, int, str]:
        task, _, short = name.rpartition("/")
        return short not in order, task, order.get(short, 0), name

    return sorted(set(names), key=key)


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured for one row and one variant.

    Attributes:
        id: names the row; the same in every variant.
        nll: sum of −log p over the reference answer's tokens, in nats.
        tokens: number of tokens in that sum.
        reference: the text an answer is compared with.
        answer: the generated text; None if none was generated.
        other_references: more texts that are as good. ROUGE is then the best over all references, and there is no BLEU.
        correct: `accuracy`, `logprob`, `logprob_byte`: those that were measured.
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
    """A variant's rows.

    Attributes:
        rows: of the run's own test data.
        info: figures about all answers (tokens, seconds, answers_per_second); those of a task are `TASK/NAME`.
        tasks: rows of each task, by its name.
    """

    rows: Sequence[Row]
    info: Mapping[str, float] = field(default_factory=dict[str, float])
    tasks: Mapping[str, Sequence[Row]] = field(default_factory=dict[str, Sequence[Row]])


@dataclass(frozen=True, slots=True)
class Column:
    """One metric over n rows.

    Attributes:
        ids: of the rows; the measure's rows are in the same order.
        source: `loss`, `answers` or `options`, for messages.
        references: the references of each row's answer; empty for a metric without references.
    """

    ids: tuple[str, ...]
    source: str
    measure: Measure
    references: tuple[tuple[str, ...], ...] = ()


MetricColumns: TypeAlias = Mapping[str, Column]
"""A column for each metric that was measured, by its full name, in the order of `sort_metrics`."""


def score_variant(variant: str, rows: VariantRows, rouge: Rouge | None = None) -> MetricColumns:
    """Score all rows of a variant. Raises: as `score_rows`."""
    columns = dict(score_rows(variant, rows.rows, rouge))
    for task, task_rows in rows.tasks.items():
        scored = score_rows(f"{variant}, task {task}", task_rows, rouge)
        columns |= {f"{task}/{name}": column for name, column in scored.items()}
    return {name: columns[name] for name in sort_metrics(columns)}


def score_rows(variant: str, rows: Sequence[Row], rouge: Rouge | None = None) -> MetricColumns:
    """Score rows. Text metrics use the rows with both a reference and an answer.

    Args:
        variant: its name, for messages.
        rows: in any order.
        rouge: `Rouge()` by default; pass one to reuse its vocabulary.

    Raises:
        InputError: a repeated id, an nll without its tokens or the reverse, or a loss that is not a finite number.
    """
    where = f"variant {variant}"
    repeated = sorted(name for name, times in Counter(row.id for row in rows).items() if times > 1)
    if repeated:
        raise InputError(f"row ids appear more than once: {abbreviate(repeated)}", where=where, hint="one row per id")
    rows = sorted(rows, key=lambda row: row.id)
    columns = {"loss": _loss_column(rows, where), **_text_columns(rows, rouge or Rouge()), **_correctness_columns(rows)}
    return {name: column for name, column in columns.items() if column.ids}


def _loss_column(rows: Sequence[Row], where: str) -> Column:
    losses = [(row.id, *_checked_loss(row, where)) for row in rows if row.nll is not None or row.tokens is not None]
    sums = np.array([(nll, tokens) for _, nll, tokens in losses], dtype=np.float64).reshape(-1, 2)
    return Column(tuple(id_ for id_, _, _ in losses), "loss", Measure.ratio(sums[:, 0], sums[:, 1]))


def _text_columns(rows: Sequence[Row], rouge: Rouge) -> dict[str, Column]:
    texts = [(row, row.reference, row.answer) for row in rows if row.reference is not None and row.answer is not None]
    if not texts:
        return {}
    ids, answers = tuple(row.id for row, _, _ in texts), [answer for _, _, answer in texts]
    references = tuple((reference, *row.other_references) for row, reference, _ in texts)
    scores = np.array(
        [
            rouge.score_pairs(row_references, [answer] * len(row_references)).max(axis=0)
            for row_references, answer in zip(references, answers, strict=True)
        ]
    )
    columns = {
        name: Column(ids, "answers", Measure.mean(scores[:, index]), references)
        for index, name in enumerate(RougeScores._fields)
    }
    if all(len(row_references) == 1 for row_references in references):
        counts = bleu_statistics([first for first, *_ in references], answers)
        columns["bleu"] = Column(ids, "answers", Measure.corpus(counts, bleu), references)
    return columns


def _correctness_columns(rows: Sequence[Row]) -> dict[str, Column]:
    columns: dict[str, Column] = {}
    for name, source in (("accuracy", "answers"), ("logprob", "options"), ("logprob_byte", "options")):
        graded = [(row.id, row.correct[name]) for row in rows if name in row.correct]
        values = np.array([correct for _, correct in graded], dtype=np.float64)
        columns[name] = Column(tuple(id_ for id_, _ in graded), source, Measure.mean(values))
    return columns


def _checked_loss(row: Row, where: str) -> tuple[float, int]:
    if row.nll is None or row.tokens is None:
        missing = "tokens" if row.tokens is None else "nll"
        raise InputError(f"row {row.id} has no {missing}", where=where, hint="a loss needs both nll and tokens")
    if not math.isfinite(row.nll) or row.tokens < 1:
        raise InputError(
            f"row {row.id} has nll {row.nll} over {row.tokens} tokens",
            where=where,
            hint="leave out rows without trained tokens; a loss that is not a number means a broken model",
        )
    return row.nll, row.tokens


def abbreviate(names: Iterable[str]) -> str:
    """Names for a message: the first five, and how many more there are."""
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
