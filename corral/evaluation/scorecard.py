"""The scorecard: metrics of several variants on the same rows, and their comparisons (`evaluate/scorecard.json`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from corral.errors import InputError
from corral.evaluation import statistics
from corral.evaluation.scoring import (
    Direction,
    MetricColumns,
    VariantRows,
    abbreviate,
    describe_metric,
    score_variant,
)
from corral.metrics.bleu import bleu_signature
from corral.metrics.rouge import Rouge, rouge_signature

SIGNIFICANT = 0.05
Outcome: TypeAlias = Literal["better", "worse", "undecided"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class MetricValue(_Frozen):
    """A variant's mean on one metric, with standard error and 95 % interval (None if there is one row only), over n rows."""

    mean: float
    se: float | None
    n: int
    low: float | None = None
    high: float | None = None


class Comparison(_Frozen):
    """Two variants on one metric and the same n rows; `difference` = a − b, with its 95 % interval.

    `p` is for this metric alone; `p_holm` is adjusted for all metrics of this pair (Holm). `mde` is the smallest true
    difference that n such rows show with 80 % power after the adjustment; None if it is unknown, as where no row differs.
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
    def differing_at_most(self) -> float:
        """If no row differs: the share of differing rows, in [0, 1], that n rows rule out at the 95 % level."""
        return 1 - (1 - statistics.LEVEL) ** (1 / self.n)

    @property
    def outcome(self) -> Outcome:
        """Whether a is better or worse than b, or the data do not decide (p_holm ≥ 0.05)."""
        if self.p_holm >= SIGNIFICANT or not self.difference:
            return "undecided"
        return "better" if (self.difference < 0) == (self.better == "lower") else "worse"

    @property
    def winner(self) -> str | None:
        """The variant that is better on this metric, or None if the data do not decide."""
        return {"better": self.a, "worse": self.b}.get(self.outcome)


class Unpaired(_Frozen):
    """Metrics that only one of two variants has, so that they were not compared."""

    a: str
    b: str
    only_a: list[str]
    only_b: list[str]


class Variant(_Frozen):
    """One variant's metrics by name, and figures about its answers as a whole (tokens, seconds)."""

    metrics: dict[str, MetricValue]
    info: dict[str, float] = Field(default_factory=dict)


class Scorecard(_Frozen):
    """The content of `evaluate/scorecard.json`. A metric without rows is absent.

    Attributes:
        variants: by name.
        comparisons: every other variant against its counterpart, metric by metric.
        baseline: the name of the variant that has no counterpart.
        seed: for resampling and randomisation.
        signatures: how the text metrics were computed.
        unpaired: metrics that could not be compared, for each pair.
    """

    variants: dict[str, Variant]
    comparisons: list[Comparison]
    baseline: str
    seed: int
    signatures: dict[str, str]
    unpaired: list[Unpaired] = Field(default_factory=list[Unpaired])

    def to_json(self) -> str:
        """Indented JSON that ends with a newline."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str | None = None) -> Scorecard:
        """The inverse of `to_json`; `where` names the file in the error.

        Raises:
            InputError: the text is not a scorecard.
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
    """Compare a with b on every metric that both have.

    Raises:
        InputError: their rows, or the references of their answers, are not the same.
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
            p_holm=p_holm,
            better=describe_metric(name).better or "higher",
            **asdict(result),
        )
        for name, result, p_holm in zip(metrics, results, adjusted, strict=True)
    ]


def build_scorecard(
    variants: Mapping[str, VariantRows],
    *,
    baseline: str,
    compared_with: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Scorecard:
    """Score all variants and compare each with its counterpart (difference = variant − counterpart).

    Losses per token are comparable only between variants with the same tokenizer; this is not checked here.

    Args:
        compared_with: the counterpart of a variant, if it is not the baseline.

    Raises:
        InputError: the baseline or a counterpart is not among the variants; or as `score_rows` and `compare_variants`.
    """
    pairs = {name: (compared_with or {}).get(name, baseline) for name in variants if name != baseline}
    for name in (baseline, *pairs.values()):
        if name not in variants:
            raise InputError(
                f"no variant is called {name!r}", where="baseline", hint=f"choose one of {abbreviate(variants)}"
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
        unpaired=[pair for name, other in pairs.items() if (pair := _find_unpaired(name, other, scores))],
    )


def _find_unpaired(a: str, b: str, scores: Mapping[str, MetricColumns]) -> Unpaired | None:
    only_a, only_b = ([name for name in scores[one] if name not in scores[other]] for one, other in ((a, b), (b, a)))
    return Unpaired(a=a, b=b, only_a=only_a, only_b=only_b) if only_a or only_b else None


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
