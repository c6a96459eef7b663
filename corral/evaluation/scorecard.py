"""The scorecard: what evaluating some variants on the same rows came to, and how they differ.

Rows are scored once (`score_rows`) and read many ways: each variant's metrics, each comparison, a file, a table. Knows
nothing about how the answers and losses were made, nor where the file lies.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from corral.errors import InputError
from corral.evaluation import statistics
from corral.evaluation.metrics import Rouge, bleu, bleu_signature, bleu_statistics, rouge_signature
from corral.evaluation.statistics import Measure

if TYPE_CHECKING:
    from rich.table import Table

Direction = Literal["lower", "higher"]
SIGNIFICANT = 0.05


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
}


@dataclass(frozen=True, slots=True)
class Row:
    """What one variant made of one row: its loss, its answer, or both.

    Attributes:
        id: names the row; the same in every variant.
        nll: sum of −log p over the reference answer's tokens, in nats.
        tokens: how many tokens that sum runs over.
        reference: the text an answer is compared with.
        answer: what the variant generated; None where it was not asked, "" where it said nothing.
    """

    id: str
    nll: float | None = None
    tokens: int | None = None
    reference: str | None = None
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class VariantRows:
    """A variant's rows, with figures about the run as a whole (tokens, seconds, tokens_per_second)."""

    rows: Sequence[Row]
    info: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True)
class RowScores:
    """Every row scored once, in the order of row ids: n rows with a loss, m with an answer.

    Attributes:
        loss_ids, loss: n ids, and [n, 2] nll and tokens.
        text_ids, references: m ids and the texts the answers were compared with.
        rouge: [m, 3] F of ROUGE-1, ROUGE-2, ROUGE-L.
        bleu: [m, 10] `bleu_statistics`.
    """

    loss_ids: tuple[str, ...]
    loss: NDArray[np.float64]
    text_ids: tuple[str, ...]
    references: tuple[str, ...]
    rouge: NDArray[np.float64]
    bleu: NDArray[np.float64]

    def ids(self, metric: str) -> tuple[str, ...]:
        """The rows that a metric was measured on."""
        return self.loss_ids if metric == "loss" else self.text_ids

    def measure(self, metric: str) -> Measure:
        """The metric as what it is: loss a ratio, ROUGE a mean, BLEU a corpus score."""
        match metric:
            case "loss":
                return Measure.ratio(self.loss[:, 0], self.loss[:, 1])
            case "bleu":
                return Measure.corpus(self.bleu, bleu)
            case _:
                return Measure.mean(self.rouge[:, ("rouge1", "rouge2", "rougeL").index(metric)])


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class MetricValue(_Record):
    """A variant's figure: score, standard error, 95 % interval (None where one row cannot tell), rows."""

    mean: float
    se: float | None
    n: int
    low: float | None = None
    high: float | None = None


class Comparison(_Record):
    """Two variants on one metric over the same n rows; `difference` = a − b, with its 95 % interval.

    `p` is for this metric alone; `p_holm` is adjusted for all metrics of this pair. `mde`: the smallest true difference
    that so many rows show with 80 % power.
    """

    a: str
    b: str
    metric: str
    difference: float
    low: float | None
    high: float | None
    p: float
    n: int
    p_holm: float
    mde: float | None
    better: Direction

    @property
    def winner(self) -> str | None:
        """The variant that is better on this metric, or None when the data do not tell (p_holm ≥ 0.05)."""
        if self.p_holm >= SIGNIFICANT or not self.difference:
            return None
        return self.a if (self.difference < 0) == (self.better == "lower") else self.b


class Variant(_Record):
    """One variant's metrics by name, and figures about its run as a whole."""

    metrics: dict[str, MetricValue]
    info: dict[str, float] = Field(default_factory=dict)


class Scorecard(_Record):
    """The content of `evaluate/scorecard.json`. A metric without rows is absent.

    Attributes:
        variants: by name.
        comparisons: every other variant against the baseline, metric by metric.
        baseline: the name of that one.
        seed: of resampling and randomisation.
        signatures: how the text metrics were computed.
    """

    variants: dict[str, Variant]
    comparisons: list[Comparison]
    baseline: str
    seed: int
    signatures: dict[str, str]

    def to_json(self) -> str:
        """Indented JSON, closed by a newline."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str | None = None) -> Scorecard:
        """The inverse of `to_json`.

        Raises:
            InputError: the text is not a scorecard; `where` names its source.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"])) or "the file"
            raise InputError(
                f"not a scorecard: {key}: {first['msg']}", where=where, hint="evaluate again to write a new one"
            ) from error


def score_rows(variant: str, rows: Sequence[Row], rouge: Rouge | None = None) -> RowScores:
    """Scores a variant's rows once. Text metrics are taken of rows with both a reference and an answer.

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
        raise InputError(f"row ids appear more than once: {_listed(repeated)}", where=where, hint="one row per id")
    ordered = sorted(rows, key=lambda row: row.id)
    losses = [(row.id, *_loss_of(row, where)) for row in ordered if row.nll is not None or row.tokens is not None]
    texts = [(r.id, r.reference, r.answer) for r in ordered if r.reference is not None and r.answer is not None]
    references, answers = [reference for _, reference, _ in texts], [answer for _, _, answer in texts]
    return RowScores(
        loss_ids=tuple(name for name, _, _ in losses),
        loss=np.array([(nll, tokens) for _, nll, tokens in losses], dtype=np.float64).reshape(-1, 2),
        text_ids=tuple(name for name, _, _ in texts),
        references=tuple(references),
        rouge=(rouge or Rouge()).score_all(references, answers),
        bleu=bleu_statistics(references, answers),
    )


def compare(a: RowScores, b: RowScores, *, names: tuple[str, str], seed: int) -> list[Comparison]:
    """a against b, on every metric that both were measured by.

    Raises:
        InputError: the two were not measured on the same rows, or not against the same references.
    """
    metrics = [name for name in METRICS if a.ids(name) and b.ids(name)]
    for ids_a, ids_b, kind in ((a.loss_ids, b.loss_ids, "loss"), (a.text_ids, b.text_ids, "answers")):
        if ids_a and ids_b:
            _check_paired(ids_a, ids_b, names, kind)
    if a.text_ids and b.text_ids and a.references != b.references:
        pairs = zip(a.text_ids, a.references, b.references, strict=True)
        differing = [name for name, one, other in pairs if one != other]
        raise InputError(
            f"the reference text differs in rows {_listed(differing)}",
            where=f"{names[0]} against {names[1]}",
            hint="compare variants that were evaluated on the same data",
        )
    results = [statistics.compare(a.measure(name), b.measure(name), seed=seed) for name in metrics]
    adjusted = statistics.holm([result.p for result in results])
    return [
        Comparison(
            a=names[0],
            b=names[1],
            metric=name,
            difference=result.difference,
            low=result.low,
            high=result.high,
            p=result.p,
            n=result.n,
            p_holm=p_holm,
            mde=result.mde,
            better=METRICS[name].better,
        )
        for name, result, p_holm in zip(metrics, results, adjusted, strict=True)
    ]


def build(variants: Mapping[str, VariantRows], *, baseline: str, seed: int = 0) -> Scorecard:
    """Scores all variants and compares each with the baseline (difference = variant − baseline).

    Losses per token can be compared between variants with the same tokenizer only; nothing here can see that.

    Raises:
        InputError: `baseline` is not among the variants; or as `score_rows` and `compare` say.
    """
    if baseline not in variants:
        raise InputError(f"no variant is called {baseline!r}", where="baseline", hint=f"choose of {_listed(variants)}")
    rouge = Rouge()
    scores = {name: score_rows(name, variant.rows, rouge) for name, variant in variants.items()}
    return Scorecard(
        variants={
            name: Variant(metrics=_metric_values(scores[name], seed), info=dict(variant.info))
            for name, variant in variants.items()
        },
        comparisons=[
            comparison
            for name in variants
            if name != baseline
            for comparison in compare(scores[name], scores[baseline], names=(name, baseline), seed=seed)
        ],
        baseline=baseline,
        seed=seed,
        signatures={"rouge": rouge_signature(), "bleu": bleu_signature()},
    )


def table_rows(card: Scorecard) -> list[tuple[str, ...]]:
    """The scorecard as text cells, header first, a line per metric and variant; ↓ and ↑ say which way is better."""
    compared = {(c.a, c.metric): c for c in card.comparisons}
    rows: list[tuple[str, ...]] = [
        ("metric", "variant", "mean ± se", "rows", f"− {card.baseline}", f"{statistics.LEVEL:.0%} interval", "p")
    ]
    for name, metric in METRICS.items():
        label = f"{metric.label} {'↓' if metric.better == 'lower' else '↑'}"
        for variant, measured in card.variants.items():
            if value := measured.metrics.get(name):
                cells = _comparison_cells(compared.get((variant, name)), metric)
                rows.append((label, variant, _spread(value, metric), str(value.n), *cells))
                label = ""
    return rows


def render(card: Scorecard) -> Table:
    """`table_rows` as a table for a terminal, 80 columns wide with names of usual length."""
    from rich import box
    from rich.table import Table

    header, *rows = table_rows(card)
    caption = f"p: Holm over metrics; better ✓ or worse ✗ at {SIGNIFICANT}"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0), pad_edge=False, caption=caption)
    for column, title in enumerate(header):
        table.add_column(title, justify="right" if column > 1 else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _metric_values(scores: RowScores, seed: int) -> dict[str, MetricValue]:
    measured = [name for name in METRICS if scores.ids(name)]
    return {name: MetricValue(**asdict(statistics.estimate(scores.measure(name), seed=seed))) for name in measured}


def _loss_of(row: Row, where: str) -> tuple[float, int]:
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


def _check_paired(a: tuple[str, ...], b: tuple[str, ...], names: tuple[str, str], kind: str) -> None:
    if a != b:
        only_a, only_b = sorted(set(a) - set(b)), sorted(set(b) - set(a))
        faults = [f"only in {name}: {_listed(ids)}" for name, ids in zip(names, (only_a, only_b), strict=True) if ids]
        raise InputError(
            f"the rows with {kind} are not the same: {'; '.join(faults)}",
            where=f"{names[0]} against {names[1]}",
            hint="evaluate both variants on the same rows",
        )


def _listed(names: Sequence[str] | Mapping[str, object], limit: int = 5) -> str:
    shown = list(names)[:limit]
    return ", ".join(shown) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _spread(value: MetricValue, metric: Metric) -> str:
    mean = f"{value.mean:.{metric.digits}f}"
    return mean if value.se is None else f"{mean} ± {value.se:.{metric.digits}f}"


def _comparison_cells(comparison: Comparison | None, metric: Metric) -> tuple[str, str, str]:
    if comparison is None:
        return "", "", ""
    digits = metric.digits
    interval = ""
    if comparison.low is not None and comparison.high is not None:
        interval = f"{comparison.low:+.{digits}f} … {comparison.high:+.{digits}f}"
    p = f"{comparison.p_holm:.3f}" if comparison.p_holm >= 0.001 else "<0.001"
    mark = {comparison.a: " ✓", comparison.b: " ✗"}.get(comparison.winner or "", "  ")
    return f"{comparison.difference:+.{digits}f}", interval, p + mark
