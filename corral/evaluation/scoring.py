"""Scores rows: turns losses, answers and correctness into a column of per-row statistics for each metric."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import numpy as np

from corral.errors import InputError
from corral.evaluation.statistics import Measure
from corral.evaluation.text_metrics import TextMetrics
from corral.recipe.evaluate import DEFAULT_ANSWER_METRICS

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
    "bits_per_byte": Metric("Held-out loss in bits per byte", "bits per byte of UTF-8", "lower"),
    "preference_accuracy": Metric("preference accuracy", "share of pairs, 0–1", "higher"),
    "preference_margin": Metric("preference margin", "nats", "higher", 2),
    "rouge1": Metric("ROUGE-1", "F, 0–1", "higher"),
    "rouge2": Metric("ROUGE-2", "F, 0–1", "higher"),
    "rougeL": Metric("ROUGE-L", "F, 0–1", "higher"),
    "bleu": Metric("BLEU", "0–100", "higher", 2),
    "chrf": Metric("chrF", "0–100", "higher", 2),
    "exact_match": Metric("exact match", "share, 0–1", "higher"),
    "token_f1": Metric("token F1", "F, 0–1", "higher"),
    "bertscore": Metric("BERTScore", "F, 1 for equal texts", "higher"),
    "accuracy": Metric("accuracy", "share, 0–1", "higher"),
    "logprob": Metric("by log-prob", "share, 0–1", "higher"),
    "logprob_byte": Metric("by log-prob/byte", "share, 0–1", "higher"),
}
"""By the name for a run's own rows; the name for a task's rows is `TASK/NAME`. `accuracy`: whether the answer is right.
`logprob`: whether the correct option has the highest log-probability; `logprob_byte`: the same after division by the bytes of
the option's text (lm-eval's acc_norm).

`preference_accuracy`: of the pairs of answers to one prompt, the share in which the better one has the higher log-probability
per token (½ for equal ones). `preference_margin`: the mean over the pairs of log π(better) − log π(worse). The difference of
two variants is then the mean of r of the better answer − r of the worse one, where r = log π − log π_reference as in DPO,
and the reference is the other variant."""


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
class PairSums:
    """Sums over the pairs of better and worse answers to one prompt.

    Attributes:
        pairs: their number.
        right: in how many the better answer has the higher log-probability per token; ½ for equal ones.
        margin: log π(better) − log π(worse), in nats.
    """

    pairs: int
    right: float
    margin: float

    @classmethod
    def of(cls, logprobs: Sequence[float], tokens: Sequence[int], pairs: Sequence[tuple[int, int]]) -> PairSums:
        """From the log-probability and tokens of each answer, and (better, worse) of each pair as their indices."""
        means = [logprob / count for logprob, count in zip(logprobs, tokens, strict=True)]
        right = sum((means[b] > means[w]) + (means[b] == means[w]) / 2 for b, w in pairs)
        return cls(len(pairs), right, sum(logprobs[b] - logprobs[w] for b, w in pairs))


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured for one row and one variant.

    Attributes:
        id: names the row; the same in every variant.
        nll: sum of −log p over the tokens of the reference answer or document, in nats.
        tokens: number of tokens in that sum.
        reference: the text an answer is compared with.
        answer: the generated text; None if none was generated.
        other_references: more texts that are as good. ROUGE is then the best over all references, and there is no BLEU.
        correct: `accuracy`, `logprob`, `logprob_byte`: those that were measured.
        bytes: of the reference answer, or of the part of a document that `nll` is of, in UTF-8.
        passage: hash of the passage that it is about; rows about one passage are not independent.
        ranked: what `preferences` says of answers to one prompt.
        skipped: `loss`, `answers`, `preferences` or `options` → why the variant could not be measured on this row.
        kind: `text` for a document, of which only the loss is measured.
    """

    id: str
    nll: float | None = None
    tokens: int | None = None
    reference: str | None = None
    answer: str | None = None
    other_references: tuple[str, ...] = ()
    correct: Mapping[str, bool] = field(default_factory=dict[str, bool])
    bytes: int | None = None
    passage: str | None = None
    ranked: PairSums | None = None
    skipped: Mapping[str, str] = field(default_factory=dict[str, str])
    kind: Literal["conversation", "text"] = "conversation"


@dataclass(frozen=True, slots=True)
class VariantRows:
    """A variant's rows.

    Attributes:
        rows: of the run's own test data.
        info: figures about all answers (tokens, seconds, answers_per_second); those of a task are `TASK/NAME`.
        tasks: rows of each task, by its name.
        conditions: what they depend on besides the rows, as `AnswerIdentity.conditions`; empty if not known.
    """

    rows: Sequence[Row]
    info: Mapping[str, float] = field(default_factory=dict[str, float])
    tasks: Mapping[str, Sequence[Row]] = field(default_factory=dict[str, Sequence[Row]])
    conditions: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def has_texts(self) -> bool:
        """Whether documents are among the rows."""
        return any(row.kind == "text" for row in self.rows)


@dataclass(frozen=True, slots=True)
class Column:
    """One metric over n rows.

    Attributes:
        ids: of the rows; the measure's rows are in the same order.
        source: `loss`, `answers`, `preferences` or `options`, for messages.
        references: the references of each row's answer; empty for a metric without references.
        passages: what each row is about; rows about the same are one unit of `clustered`. Empty: each is about its own.
        skipped: rows without a score by id, and why.
        signature: how it was computed, where there are several ways.
    """

    ids: tuple[str, ...]
    source: str
    measure: Measure
    references: tuple[tuple[str, ...], ...] = ()
    passages: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict[str, str])
    signature: str = ""

    @property
    def clustered(self) -> Measure:
        """The measure with the rows about one passage as one unit."""
        return self.measure.clustered(self.passages) if self.passages else self.measure

    def select(self, ids: Collection[str]) -> Column:
        """The rows with these ids."""
        places = [place for place, id_ in enumerate(self.ids) if id_ in ids]
        if len(places) == len(self.ids):
            return self
        return replace(
            self,
            ids=tuple(self.ids[place] for place in places),
            measure=self.measure.select(places),
            references=tuple(self.references[place] for place in places) if self.references else (),
            passages=tuple(self.passages[place] for place in places) if self.passages else (),
        )


MetricColumns: TypeAlias = Mapping[str, Column]
"""A column for each metric that was measured, by its full name, in the order of `sort_metrics`."""


def score_variant(variant: str, rows: VariantRows, metrics: TextMetrics | None = None) -> MetricColumns:
    """Score all rows of a variant; answers to tasks by the default metrics. Raises: as `score_rows`."""
    metrics = metrics or TextMetrics()
    columns = dict(score_rows(variant, rows.rows, metrics))
    for task, task_rows in rows.tasks.items():
        scored = score_rows(f"{variant}, task {task}", task_rows, metrics, DEFAULT_ANSWER_METRICS)
        columns |= {f"{task}/{name}": column for name, column in scored.items()}
    return {name: columns[name] for name in sort_metrics(columns)}


def score_rows(
    variant: str,
    rows: Sequence[Row],
    metrics: TextMetrics | None = None,
    names: Collection[str] | None = None,
) -> MetricColumns:
    """Score rows. Text metrics use the rows with both a reference and an answer.

    Args:
        variant: its name, for messages.
        rows: in any order.
        metrics: of answers; pass one to reuse what it has loaded.
        names: the metrics of answers, in place of those of `metrics`.

    Raises:
        InputError: a repeated id, an nll without its tokens or the reverse, or a loss that is not a finite number; or as
            `TextMetrics.score`.
    """
    where = f"variant {variant}"
    repeated = sorted(name for name, times in Counter(row.id for row in rows).items() if times > 1)
    if repeated:
        raise InputError(f"row ids appear more than once: {abbreviate(repeated)}", where=where, hint="one row per id")
    rows = sorted(rows, key=lambda row: row.id)
    metrics = metrics or TextMetrics()
    columns = {
        **_loss_columns(rows, where),
        **_preference_columns(rows),
        **_text_columns(rows, metrics, metrics.names if names is None else names),
        **_correctness_columns(rows),
    }
    return {name: column for name, column in columns.items() if column.ids}


def _column(all_rows: Sequence[Row], rows: Sequence[Row], source: str, measure: Measure) -> Column:
    """A column over some of the rows, with the reasons why others are skipped."""
    skipped = {row.id: row.skipped[source] for row in all_rows if source in row.skipped}
    passages = tuple(row.passage or row.id for row in rows) if any(row.passage for row in rows) else ()
    return Column(tuple(row.id for row in rows), source, measure, passages=passages, skipped=skipped)


def _loss_columns(rows: Sequence[Row], where: str) -> dict[str, Column]:
    known = [row for row in rows if row.nll is not None or row.tokens is not None]
    sums = np.array([_checked_loss(row, where) for row in known], dtype=np.float64).reshape(-1, 2)
    columns = {"loss": _column(rows, known, "loss", Measure.ratio(sums[:, 0], sums[:, 1]))}
    if all(row.bytes is not None for row in known):
        sizes = np.array([row.bytes for row in known], dtype=np.float64)
        sized = sizes > 0  # a document of one token that is predicted from nothing, or an empty answer, has no bytes
        bits = Measure.ratio(sums[sized, 0] / math.log(2), sizes[sized])
        columns["bits_per_byte"] = _column(rows, [row for row in known if row.bytes], "loss", bits)
    return columns


def _preference_columns(rows: Sequence[Row]) -> dict[str, Column]:
    """One unit for each prompt, with all its pairs; their share is a rate where every prompt has one pair, and no two answers
    are equally likely."""
    known = [(row, row.ranked) for row in rows if row.ranked is not None]
    sums = np.array([(pairs.right, pairs.margin, pairs.pairs) for _, pairs in known], dtype=np.float64).reshape(-1, 3)
    right, margin, pairs = sums.T
    if (pairs == 1).all() and np.isin(right, (0, 1)).all():
        accuracy = Measure.rate(right.astype(bool).tolist())
    else:
        accuracy = Measure.ratio(right, pairs)
    measures = {"preference_accuracy": accuracy, "preference_margin": Measure.ratio(margin, pairs)}
    return {name: _column(rows, [row for row, _ in known], "preferences", value) for name, value in measures.items()}


def _text_columns(rows: Sequence[Row], metrics: TextMetrics, names: Collection[str]) -> dict[str, Column]:
    texts = [row for row in rows if row.reference is not None and row.answer is not None]
    if not texts:
        return {}
    references = [(row.reference or "", *row.other_references) for row in texts]
    columns: dict[str, Column] = {}
    for name, scores in metrics.score(references, [row.answer or "" for row in texts], names).items():
        places = frozenset(scores.places)
        column = _column(rows, [texts[place] for place in scores.places], "answers", scores.measure)
        columns[name] = replace(
            column,
            references=tuple(references[place] for place in scores.places),
            skipped={
                **column.skipped,
                **{row.id: scores.missing for place, row in enumerate(texts) if place not in places},
            },
            signature=scores.signature,
        )
    return columns


def _correctness_columns(rows: Sequence[Row]) -> dict[str, Column]:
    columns: dict[str, Column] = {}
    for name, source in (("accuracy", "answers"), ("logprob", "options"), ("logprob_byte", "options")):
        graded = [row for row in rows if name in row.correct]
        columns[name] = _column(rows, graded, source, Measure.rate([row.correct[name] for row in graded]))
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
