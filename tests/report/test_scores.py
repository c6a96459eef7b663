from __future__ import annotations

from corral.evaluation.scorecard import MetricValue
from corral.report.scores import scores_by_metric, variant_names
from tests.report.conftest import card, tiny_card


def test_scores_are_the_scorecards_metric_by_metric() -> None:
    scores = scores_by_metric(card())
    assert [score.name for score in scores] == ["loss", "rouge1", "rouge2", "rougeL", "bleu"]
    for score in scores:
        assert score.values == {name: variant.metrics[score.name] for name, variant in card().variants.items()}
        assert score.comparisons == [c for c in card().comparisons if c.metric == score.name]
        assert [(variant, c and c.a) for variant, _, c in score.lines] == [("base", None), ("tuned", "tuned")]
    assert variant_names(scores) == ["base", "tuned"]
    assert scores_by_metric(None) == []


def test_a_metric_that_corral_does_not_know_comes_last_without_a_direction() -> None:
    value = tiny_card()
    value.variants["tuned"].metrics["accuracy of dates"] = MetricValue(mean=0.7, se=None, n=9)
    last = scores_by_metric(value)[-1]
    assert (last.metric.label, last.metric.better, last.values.keys()) == ("accuracy of dates", None, {"tuned"})
