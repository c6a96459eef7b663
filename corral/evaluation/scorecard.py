"""The scorecard: what evaluating some variants on the same rows came to, how they differ, and what they cost.

Rows are scored once (`scoring`) and read many ways: each variant's metrics, each comparison, a file, tables. Knows nothing
about how the answers and losses were made, nor where the file lies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from corral.errors import InputError
from corral.evaluation import statistics
from corral.evaluation.scoring import (
    Direction,
    Metric,
    MetricColumns,
    VariantRows,
    abbreviate,
    score_variant,
    sort_metrics,
)
from corral.evaluation.scoring import known_metric as known_metric
from corral.metrics.bleu import bleu_signature
from corral.metrics.rouge import Rouge, rouge_signature

if TYPE_CHECKING:
    from rich.table import Table

SIGNIFICANT = 0.05
UNKNOWN = Metric("", "", "higher", 3)


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

    `p` is for this metric alone; `p_holm` is adjusted for all metrics of this pair (Holm). `mde`: the smallest true difference
    that so many rows show with 80 % power after that; None where nothing tells, as where no row differs.
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
    def is_identical(self) -> bool:
        """Whether no row differs."""
        return self.difference == 0 and not self.mde and self.low == 0 == self.high

    @property
    def winner(self) -> str | None:
        """The variant that is better on this metric, or None when the data do not tell (p_holm ≥ 0.05)."""
        if self.p_holm >= SIGNIFICANT or not self.difference:
            return None
        return self.a if (self.difference < 0) == (self.better == "lower") else self.b


class Unpaired(_Record):
    """Metrics that only one of two variants was measured by, so that they were not compared."""

    a: str
    b: str
    only_a: list[str]
    only_b: list[str]


class Variant(_Record):
    """One variant's metrics by name, and figures about its run as a whole."""

    metrics: dict[str, MetricValue]
    info: dict[str, float] = Field(default_factory=dict)


class Scorecard(_Record):
    """The content of `evaluate/scorecard.json`. A metric without rows is absent.

    Attributes:
        variants: by name.
        comparisons: every other variant against the one it belongs beside, metric by metric.
        baseline: the name of the variant that is compared with none.
        seed: of resampling and randomisation.
        signatures: how the text metrics were computed.
        unpaired: what could not be compared, pair by pair.
    """

    variants: dict[str, Variant]
    comparisons: list[Comparison]
    baseline: str
    seed: int
    signatures: dict[str, str]
    unpaired: list[Unpaired] = Field(default_factory=list[Unpaired])

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


def compare_variants(a: MetricColumns, b: MetricColumns, *, names: tuple[str, str], seed: int) -> list[Comparison]:
    """a against b, on every metric that both were measured by.

    Raises:
        InputError: the two were not measured on the same rows, or not against the same references.
    """
    metrics = [name for name in a if name in b]
    for name in metrics:
        _check_paired(name, a, b, names)
    results = [
        statistics.compare(a[name].measure, b[name].measure, seed=seed, metric_count=len(metrics)) for name in metrics
    ]
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
            better=(known_metric(name) or UNKNOWN).better,
        )
        for name, result, p_holm in zip(metrics, results, adjusted, strict=True)
    ]


def build_scorecard(
    variants: Mapping[str, VariantRows], *, baseline: str, compared_with: Mapping[str, str] | None = None, seed: int = 0
) -> Scorecard:
    """Scores all variants and compares each with another one (difference = variant − the other).

    Losses per token can be compared between variants with the same tokenizer only; nothing here can see that.

    Args:
        against: which variant each is compared with, where that is not the baseline.

    Raises:
        InputError: `baseline`, or a variant named by `against`, is not among the variants; or as `score_rows` and `compare`
            say.
    """
    pairs = {name: (compared_with or {}).get(name, baseline) for name in variants if name != baseline}
    for name in (baseline, *pairs.values()):
        if name not in variants:
            raise InputError(
                f"no variant is called {name!r}", where="baseline", hint=f"choose of {abbreviate(variants)}"
            )
    rouge = Rouge()
    scores = {name: score_variant(name, rows, rouge) for name, rows in variants.items()}
    return Scorecard(
        variants={
            name: Variant(metrics=_metric_values(scores[name], seed), info=dict(variant.info))
            for name, variant in variants.items()
        },
        comparisons=[
            comparison
            for name, other in pairs.items()
            for comparison in compare_variants(scores[name], scores[other], names=(name, other), seed=seed)
        ],
        baseline=baseline,
        seed=seed,
        signatures={"rouge": rouge_signature(), "bleu": bleu_signature()},
        unpaired=[pair for name, other in pairs.items() if (pair := _unpaired(name, other, scores))],
    )


def _unpaired(a: str, b: str, scores: Mapping[str, MetricColumns]) -> Unpaired | None:
    only_a, only_b = ([name for name in scores[one] if name not in scores[other]] for one, other in ((a, b), (b, a)))
    return Unpaired(a=a, b=b, only_a=only_a, only_b=only_b) if only_a or only_b else None


def table_rows(card: Scorecard) -> list[tuple[str, ...]]:
    """The scorecard as text cells, header first, a line per metric and variant; ↓ and ↑ say which way is better.

    The column of differences is headed by the variant that all are compared with, or else each names its own.
    """
    compared = {(c.a, c.metric): c for c in card.comparisons}
    others = {c.b for c in card.comparisons} or {card.baseline}
    one = f"− {next(iter(others))}" if len(others) == 1 else "difference"
    rows: list[tuple[str, ...]] = [
        ("metric", "variant", "mean ± se", "rows", one, f"{statistics.LEVEL:.0%} interval", "p")
    ]
    for name in sort_metrics(metric for measured in card.variants.values() for metric in measured.metrics):
        metric = known_metric(name) or Metric(name, "", "higher", 3)
        label = f"{metric.label} {'↓' if metric.better == 'lower' else '↑'}"
        for variant, measured in card.variants.items():
            if value := measured.metrics.get(name):
                cells = _comparison_cells(compared.get((variant, name)), metric, name_other=len(others) > 1)
                rows.append((label, variant, _spread(value, metric), str(value.n), *cells))
                label = ""
    return rows


COST_NAMES = (
    *("answers", "prompt_tokens", "answer_tokens", "seconds", "answers_per_second"),
    *("candidates", "cancelled"),
)
"""Figures about a variant's run that are set side by side, of its own rows and, as `TASK/NAME`, of each task's."""


def cost_rows(infos: Mapping[str, Mapping[str, float]]) -> list[tuple[str, ...]]:
    """What answers cost, header first: a line per set of rows and variant that has figures; tokens are per answer. Where there
    was a vote, also the share of its candidates that was not needed.

    Args:
        infos: `Variant.info` by the variant's name.
    """
    voted = any(key.rpartition("/")[2] == "candidates" for info in infos.values() for key in info)
    rows: list[tuple[str, ...]] = [
        ("rows", "variant", "answers", "prompt tokens", "answer tokens", "seconds", "answers/s", "saved")[: 7 + voted]
    ]
    for task in dict.fromkeys(key.rpartition("/")[0] for info in infos.values() for key in info):
        label = task or "test rows"
        for name, info in infos.items():
            answers, prompt, answer, seconds, rate, candidates, cancelled = (
                info.get(f"{task}/{cost}" if task else cost, 0.0) for cost in COST_NAMES
            )
            if answers:
                each = (f"{answers:.0f}", f"{prompt / answers:.1f}", f"{answer / answers:.1f}")
                saved = f"{cancelled / candidates:.0%}" if candidates else ""
                rows.append((label, name, *each, f"{seconds:.1f}", f"{rate:.2f}", saved)[: 7 + voted])
                label = ""
    return rows


def render_scores(card: Scorecard) -> Table:
    """`table_rows` as a table for a terminal, 80 columns wide with names of usual length."""
    caption = [f"p: Holm over metrics; better ✓ or worse ✗ at {SIGNIFICANT}"]
    for pair in card.unpaired:
        for name, metrics in ((pair.a, pair.only_a), (pair.b, pair.only_b)):
            if metrics:
                labels = abbreviate(
                    [(known_metric(metric) or UNKNOWN).label or metric for metric in metrics], len(metrics)
                )
                caption.append(f"{pair.a} and {pair.b}, not compared: only {name} has {labels}")
    return _table(table_rows(card), "\n".join(caption))


def render_costs(card: Scorecard) -> Table:
    """`cost_rows` as a table for a terminal."""
    return _table(
        cost_rows({name: variant.info for name, variant in card.variants.items()}),
        "tokens: mean of an answer, examples and all candidates counted; saved: candidates that a vote did not need",
    )


def _table(rows: Sequence[tuple[str, ...]], caption: str) -> Table:
    from rich import box
    from rich.table import Table

    header, *lines = rows
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0), pad_edge=False, caption=caption)
    for column, title in enumerate(header):
        table.add_column(title, justify="right" if column > 1 else "left")
    for line in lines:
        table.add_row(*line)
    return table


def _metric_values(scores: MetricColumns, seed: int) -> dict[str, MetricValue]:
    return {
        name: MetricValue(**asdict(statistics.estimate(column.measure, seed=seed))) for name, column in scores.items()
    }


def _check_paired(metric: str, a: MetricColumns, b: MetricColumns, names: tuple[str, str]) -> None:
    one, other = a[metric], b[metric]
    where = f"{names[0]} against {names[1]}"
    of = f" of {task}" if (task := metric.rpartition("/")[0]) else ""
    if one.ids != other.ids:
        sides = (sorted(set(one.ids) - set(other.ids)), sorted(set(other.ids) - set(one.ids)))
        faults = [f"only in {name}: {abbreviate(ids)}" for name, ids in zip(names, sides, strict=True) if ids]
        raise InputError(
            f"the rows{of} with {one.source} are not the same: {'; '.join(faults)}",
            where=where,
            hint="evaluate both variants on the same rows",
        )
    if one.references != other.references:
        pairs = zip(one.ids, one.references, other.references, strict=True)
        differing = [name for name, first, second in pairs if first != second]
        raise InputError(
            f"the reference text differs in rows {abbreviate(differing)}",
            where=where,
            hint="compare variants that were evaluated on the same data",
        )


def _spread(value: MetricValue, metric: Metric) -> str:
    mean = f"{value.mean:.{metric.digits}f}"
    return mean if value.se is None else f"{mean} ± {value.se:.{metric.digits}f}"


def _comparison_cells(comparison: Comparison | None, metric: Metric, *, name_other: bool) -> tuple[str, str, str]:
    if comparison is None:
        return "", "", ""
    digits = metric.digits
    interval = ""
    if comparison.low is not None and comparison.high is not None:
        interval = f"{comparison.low:+.{digits}f} … {comparison.high:+.{digits}f}"
    p = f"{comparison.p_holm:.3f}" if comparison.p_holm >= 0.001 else "<0.001"
    mark = {comparison.a: " ✓", comparison.b: " ✗"}.get(comparison.winner or "", "  ")
    other = f" vs {comparison.b}" if name_other else ""
    return f"{comparison.difference:+.{digits}f}{other}", interval, p + mark
