"""A scorecard by metric, as the page and its pictures show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from corral.evaluation.scorecard import Comparison, MetricValue, Scorecard
from corral.evaluation.scoring import Metric, describe_metric, sort_metrics

OUTCOME_WORDS = {"better": "better", "worse": "worse", "undecided": "not told apart"}


@dataclass(frozen=True, slots=True)
class MetricScores:
    """One metric of all variants.

    Attributes:
        values: by variant; a variant that was not measured is absent.
        comparisons: between variants, on this metric.
    """

    name: str
    metric: Metric
    values: Mapping[str, MetricValue]
    comparisons: Sequence[Comparison]

    @property
    def lines(self) -> list[tuple[str, MetricValue | None, Comparison | None]]:
        """(variant, its value, its comparison with another) for each line of a table; a line for each variant at least."""
        variants = dict.fromkeys([*self.values, *(comparison.a for comparison in self.comparisons)])
        return [
            (variant, self.values.get(variant), comparison)
            for variant in variants
            for comparison in ([c for c in self.comparisons if c.a == variant] or [None])
        ]


def scores_by_metric(card: Scorecard | None) -> list[MetricScores]:
    """The scores in the order of `sort_metrics`; none without a scorecard."""
    if card is None:
        return []
    names = [name for variant in card.variants.values() for name in variant.metrics]
    names += [comparison.metric for comparison in card.comparisons]
    return [
        MetricScores(
            name,
            describe_metric(name),
            {variant: value for variant, of in card.variants.items() if (value := of.metrics.get(name))},
            [comparison for comparison in card.comparisons if comparison.metric == name],
        )
        for name in sort_metrics(names)
    ]


def variant_names(scores: Sequence[MetricScores]) -> list[str]:
    """The names of all variants, in the order of the scorecard."""
    return list(dict.fromkeys(variant for score in scores for variant, _, _ in score.lines))
