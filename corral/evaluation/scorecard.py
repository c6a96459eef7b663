"""The scorecard: metrics of several variants on the same rows, and their comparisons (`evaluate/scorecard.json`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from corral.errors import InputError
from corral.evaluation import cautions, statistics
from corral.evaluation.distributions import binomial_interval
from corral.evaluation.documents import keep_common_documents
from corral.evaluation.scoring import (
    Column,
    Direction,
    MetricColumns,
    VariantRows,
    abbreviate,
    describe_metric,
    score_variant,
)
from corral.evaluation.text_metrics import TextMetrics

SIGNIFICANT = 0.05
PRIMARY = "loss"
"""The primary metric where none is named."""
IN_BYTES = "bits_per_byte"
Outcome: TypeAlias = Literal["better", "worse", "undecided"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class MetricValue(_Frozen):
    """A variant's mean on one metric, with standard error and 95 % interval (None where the data show no spread), over n rows,
    or n passages that rows share."""

    mean: float
    se: float | None
    n: int
    low: float | None = None
    high: float | None = None


class Comparison(_Frozen):
    """Two variants on one metric and the same n rows; `difference` = a − b.

    `p` is for this metric alone. The primary metric is judged by it; of the others, `p_holm` is adjusted for their number
    (Holm). `low` and `high` are the interval at `level`: 0.95, or as much wider as the adjustment asks, so that 0 is outside
    if and only if p_holm is below 0.05. `mde` is the smallest true difference that n such rows show with 80 % power after the
    adjustment; None if it is unknown, as where no row differs.
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
    level: float = statistics.LEVEL
    primary: bool = False

    @property
    def is_identical(self) -> bool:
        """Whether no row differs."""
        return self.difference == 0 and not self.mde

    @property
    def differing_at_most(self) -> float:
        """If no row differs: the share of differing rows, in [0, 1], that n rows rule out at the 95 % level."""
        return binomial_interval(0, self.n, statistics.ALPHA)[1]

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
    """One variant's metrics by name, figures about its answers as a whole (tokens, seconds), and what both depend on."""

    metrics: dict[str, MetricValue]
    info: dict[str, float] = Field(default_factory=dict)
    conditions: dict[str, Any] = Field(default_factory=dict)


class Scorecard(_Frozen):
    """The content of `evaluate/scorecard.json`. A metric without rows is absent.

    Attributes:
        variants: by name.
        comparisons: every other variant against its counterpart, metric by metric.
        baseline: the name of the variant that has no counterpart.
        seed: for resampling.
        signatures: how the text metrics were computed, by metric.
        unpaired: metrics that could not be compared, for each pair.
        primary: the metric that decides between two variants.
        cautions: sentences to know before the figures are read.
    """

    variants: dict[str, Variant]
    comparisons: list[Comparison]
    baseline: str
    seed: int
    signatures: dict[str, str]
    unpaired: list[Unpaired] = Field(default_factory=list[Unpaired])
    primary: str = PRIMARY
    cautions: list[str] = Field(default_factory=list[str])

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


def compare_variants(
    a: MetricColumns, b: MetricColumns, *, names: tuple[str, str], seed: int, primary: str = PRIMARY
) -> list[Comparison]:
    """Compare a with b on every metric that both have; rows that either could not be measured on are left out.

    Raises:
        InputError: their rows, or the references of their answers, are not the same.
    """
    results: dict[str, statistics.PairedDifference] = {}
    for name in a:
        if name in b:
            one, other = _pair_rows(name, a[name], b[name], names)
            if one.ids:
                results[name] = statistics.compare(one.clustered, other.clustered, seed=seed)
    others = [name for name in results if name != primary]
    p_values = [results[name].p for name in others]
    adjusted = {primary: results[primary].p if primary in results else 1.0} | dict(
        zip(others, statistics.holm(p_values), strict=True)
    )
    alphas = {primary: SIGNIFICANT} | dict(zip(others, statistics.holm_levels(p_values, SIGNIFICANT), strict=True))
    comparisons: list[Comparison] = []
    for name, result in results.items():
        low, high = result.interval(alphas[name]) or (None, None)
        comparisons.append(
            Comparison(
                a=names[0],
                b=names[1],
                metric=name,
                difference=result.difference,
                low=low,
                high=high,
                p=result.p,
                n=result.n,
                p_holm=adjusted[name],
                # The smallest p of the others counts below 5 % divided by their number (Bonferroni).
                mde=result.detectable(SIGNIFICANT if name == primary else SIGNIFICANT / len(others)),
                better=describe_metric(name).better or "higher",
                level=1 - alphas[name],
                primary=name == primary,
            )
        )
    return comparisons


def choose_primary(named: Mapping[str, str]) -> tuple[str, list[str]]:
    """The primary metric of a comparison, and sentences about the choice.

    Args:
        named: by variant, the metric that the recipe of its run names.
    """
    if len(set(named.values())) == 1:
        return next(iter(named.values())), []
    each = ", ".join(f"{name} names {describe_metric(metric).label} ({metric})" for name, metric in named.items())
    return PRIMARY, [
        f"the recipes have different primary metrics ({each}): {describe_metric(PRIMARY).label} decides here"
    ]


def build_scorecard(
    variants: Mapping[str, VariantRows],
    *,
    baseline: str,
    compared_with: Mapping[str, str] | None = None,
    seed: int = 0,
    primary: str = PRIMARY,
    metrics: TextMetrics | None = None,
    notes: Sequence[str] = (),
) -> Scorecard:
    """Score all variants and compare each with its counterpart (difference = variant − counterpart).

    Losses are compared per token, or in bits per byte between two variants whose tokenizers are known to differ; those of
    documents in both.

    Args:
        compared_with: the counterpart of a variant, if it is not the baseline.
        primary: the metric that decides; it is not adjusted for the number of the others.
        metrics: of the answers to the run's own rows; by default ROUGE and BLEU.
        notes: sentences to know before the figures are read, besides those that are found here.

    Raises:
        InputError: the baseline or a counterpart is not among the variants; or as `score_rows` and `compare_variants`.
    """
    pairs = {name: (compared_with or {}).get(name, baseline) for name in variants if name != baseline}
    for name in (baseline, *pairs.values()):
        if name not in variants:
            raise InputError(
                f"no variant is called {name!r}", where="baseline", hint=f"choose one of {abbreviate(variants)}"
            )
    variants, on_documents = keep_common_documents(variants)
    metrics = metrics or TextMetrics()
    scores = {name: score_variant(name, rows, metrics) for name, rows in variants.items()}
    signatures = _signatures(scores.values())
    said = [*notes, *on_documents, *cautions.word_cautions(signatures)]
    for name, columns in scores.items():
        said += cautions.row_cautions(name, variants[name], columns)
    comparisons: list[Comparison] = []
    unpaired: list[Unpaired] = []
    of_texts = by_bytes = any(rows.has_texts for rows in variants.values())
    for name, other in pairs.items():
        conditions = variants[name].conditions, variants[other].conditions
        said += cautions.pair_cautions((name, other), conditions)
        hidden, decides = None if of_texts else IN_BYTES, primary
        if cautions.tokenizers_differ(*conditions):
            has_bytes = all(IN_BYTES in scores[side] for side in (name, other))
            by_bytes |= has_bytes
            said.append(cautions.tokenizer_caution((name, other), has_bytes=has_bytes))
            hidden, decides = "loss", IN_BYTES if primary == "loss" else primary
        one, two = ({k: v for k, v in scores[side].items() if k != hidden} for side in (name, other))
        comparisons += compare_variants(one, two, names=(name, other), seed=seed, primary=decides)
        only_a, only_b = ([k for k in x if k not in y] for x, y in ((one, two), (two, one)))
        if only_a or only_b:
            unpaired.append(Unpaired(a=name, b=other, only_a=only_a, only_b=only_b))
    return Scorecard(
        variants={
            name: Variant(
                metrics=_metric_values(scores[name], seed, by_bytes=by_bytes),
                info=dict(variant.info),
                conditions=dict(variant.conditions),
            )
            for name, variant in variants.items()
        },
        comparisons=comparisons,
        baseline=baseline,
        seed=seed,
        signatures=signatures,
        unpaired=unpaired,
        primary=primary,
        cautions=list(dict.fromkeys(said)),
    )


def _signatures(scores: Iterable[MetricColumns]) -> dict[str, str]:
    """How each text metric was computed: `rouge`, `bleu` …, and `TASK/rouge` and `TASK/bleu`."""
    signatures: dict[str, str] = {}
    for columns in scores:
        for name, column in columns.items():
            if column.signature:
                signatures.setdefault(name[:-1] if "rouge" in name else name, column.signature)
    return signatures


def _metric_values(scores: MetricColumns, seed: int, *, by_bytes: bool) -> dict[str, MetricValue]:
    return {
        name: MetricValue(**asdict(statistics.estimate(column.clustered, seed=seed)))
        for name, column in scores.items()
        if by_bytes or name != IN_BYTES
    }


def _pair_rows(metric: str, one: Column, other: Column, names: tuple[str, str]) -> tuple[Column, Column]:
    """The rows that both variants were measured on. Raises InputError if one lacks rows without saying why."""
    where = f"{names[0]} against {names[1]}"
    of = f" of {task}" if (task := metric.rpartition("/")[0]) else ""
    in_one, in_other = frozenset(one.ids), frozenset(other.ids)
    lacking = in_one - in_other - other.skipped.keys(), in_other - in_one - one.skipped.keys()
    faults = [f"only in {name}: {abbreviate(sorted(ids))}" for name, ids in zip(names, lacking, strict=True) if ids]
    if faults:
        raise InputError(
            f"the rows{of} with {one.source} are not the same: {'; '.join(faults)}",
            where=where,
            hint="evaluate both variants on the same rows",
        )
    one, other = one.select(in_other), other.select(in_one)
    passages = one.passages or other.passages
    one, other = replace(one, passages=passages), replace(other, passages=passages)
    if one.references != other.references:
        pairs = zip(one.ids, one.references, other.references, strict=True)
        differing = [name for name, first, second in pairs if first != second]
        raise InputError(
            f"the reference text differs in rows {abbreviate(differing)}",
            where=where,
            hint="compare variants that were evaluated on the same data",
        )
    return one, other
