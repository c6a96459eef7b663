from __future__ import annotations

import pytest

from corral.errors import InputError
from corral.evaluation.scoring import PairSums, Row, VariantRows, describe_metric, score_rows, score_variant
from corral.evaluation.statistics import estimate
from corral.metrics.bleu import bleu, bleu_statistics
from corral.metrics.rouge import Rouge
from tests.evaluation.conftest import TEXT_METRICS, make_graded_rows, make_rows


def test_each_metric_equals_a_direct_computation() -> None:
    rows = make_rows(0.4, seed=1)
    columns = score_rows("base", rows)
    references, answers = [row.reference or "" for row in rows], [row.answer or "" for row in rows]
    expected = [
        sum(row.nll or 0 for row in rows) / sum(row.tokens or 0 for row in rows),
        *Rouge().score_pairs(references, answers).mean(axis=0),
        float(bleu(bleu_statistics(references, answers).sum(axis=0))),
    ]
    assert list(columns) == ["loss", *TEXT_METRICS]
    assert [column.measure.value for column in columns.values()] == pytest.approx(expected)
    assert {len(column.ids) for column in columns.values()} == {40}


def test_an_empty_answer_counts_as_a_bad_one_and_a_missing_answer_does_not_count() -> None:
    columns = score_rows("v", [Row("a", reference="x y", answer=""), Row("b", reference="x y"), Row("c", answer="x")])
    scored = {name: (column.ids, column.measure.value) for name, column in columns.items()}
    assert scored == dict.fromkeys(TEXT_METRICS, (("a",), 0.0))


def test_the_best_of_several_references_counts_and_there_is_no_bleu() -> None:
    rows = [Row("a", reference="nothing alike", answer="eggs and peas", other_references=("eggs and peas", "rice"))]
    columns = score_rows("v", rows)
    assert columns.keys() == {"rouge1", "rouge2", "rougeL"}
    assert columns["rougeL"].measure.value == 1.0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([Row("x", 1.0, 2), Row("x", 1.0, 2)], "more than once: x"),
        ([Row("x", 1.0)], "row x has no tokens"),
        ([Row("x", tokens=3)], "row x has no nll"),
        ([Row("x", float("nan"), 3)], "row x has nll nan"),
        ([Row("x", float("inf"), 3)], "row x has nll inf"),
        ([Row("x", 0.0, 0)], "over 0 tokens"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused_by_id(bad: list[Row], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        score_rows("tuned", bad)
    assert caught.value.where == "variant tuned"


def test_metrics_of_own_rows_come_first_then_task_by_task() -> None:
    tasks = {"xsum": make_rows(0.5, seed=1, count=5), "mmlu": make_graded_rows(0.5, seed=1)}
    assert list(score_variant("v", VariantRows(make_rows(0.5, seed=1, count=5), {}, tasks))) == [
        *("loss", *TEXT_METRICS),
        *("mmlu/accuracy", "mmlu/logprob", "mmlu/logprob_byte"),
        *("xsum/loss", *(f"xsum/{name}" for name in TEXT_METRICS)),
    ]


def test_an_unknown_metric_is_labelled_with_its_name_and_has_no_direction() -> None:
    unknown = describe_metric("mmlu/accuracy of dates")
    assert (unknown.label, unknown.better) == ("mmlu/accuracy of dates", None)
    assert describe_metric("mmlu/accuracy").label == "mmlu: accuracy"


def ranked(name: str, logprobs: list[float], tokens: list[int], *pairs: tuple[int, int]) -> Row:
    return Row(name, ranked=PairSums.of(logprobs, tokens, pairs))


def test_the_better_answer_is_the_likelier_one_per_token_and_the_margin_is_a_sum() -> None:
    rows = [
        ranked("a", [-30.0, -8.0], [10, 2], (0, 1)),  # less likely as a whole, and likelier per token
        ranked("b", [-2.0, -3.0, -4.0], [1, 1, 2], (0, 1), (0, 2), (2, 1)),  # right, a tie, right
    ]
    columns = score_rows("v", rows)
    assert list(columns) == ["preference_accuracy", "preference_margin"]
    assert columns["preference_accuracy"].measure.value == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert columns["preference_margin"].measure.value == pytest.approx((-22 + 1 + 2 - 1) / 4)
    assert columns["preference_accuracy"].ids == ("a", "b"), "a prompt is one unit, whatever its pairs"


def test_preferences_of_one_pair_to_a_prompt_are_a_rate_with_an_exact_interval() -> None:
    right, wrong, tie = (
        ranked(name, [-1.0, other], [1, 1], (0, 1)) for name, other in (("a", -2), ("b", 0), ("c", -1))
    )
    assert score_rows("v", [right, wrong])["preference_accuracy"].measure.kind == "rate"
    assert score_rows("v", [right, wrong, tie])["preference_accuracy"].measure.kind == "ratio"
    assert estimate(score_rows("v", [right] * 1)["preference_accuracy"].clustered, seed=0).high == 1
