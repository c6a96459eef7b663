from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from typing import Any

import pytest

from corral.errors import InputError
from corral.evaluation import statistics
from corral.evaluation.scorecard import Scorecard, build_scorecard, choose_primary, compare_variants
from corral.evaluation.scoring import Row, VariantRows, score_rows
from corral.evaluation.statistics import holm, holm_levels
from tests.evaluation.conftest import TEXT_METRICS, make_graded_rows, make_rows

NAMES = ("a", "b")
NEARLY_EQUAL = score_rows("a", make_rows(0.52, seed=1)), score_rows("b", make_rows(0.5, seed=2))


def test_the_file_has_the_names_that_others_read(card: Scorecard) -> None:
    content = json.loads(card.to_json())
    assert set(content["variants"]) == {"base", "tuned"}
    for variant in content["variants"].values():
        assert list(variant["metrics"]) == ["loss", *TEXT_METRICS]
        assert all({"mean", "se", "n", "low", "high"} <= set(value) for value in variant["metrics"].values())
    assert len(content["comparisons"]) == 5
    for comparison in content["comparisons"]:
        names = {
            "a",
            "b",
            "metric",
            "difference",
            "low",
            "high",
            "p",
            "n",
            "p_holm",
            "mde",
            "better",
            "level",
            "primary",
        }
        assert names == set(comparison)
        assert (comparison["a"], comparison["b"]) == ("tuned", "base")
    assert content["variants"]["tuned"]["info"]["tokens_per_second"] == 320.0
    assert content["signatures"]["bleu"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")


def test_a_scorecard_survives_its_file(card: Scorecard, task_card: Scorecard) -> None:
    for each in (card, task_card):
        assert Scorecard.from_json(each.to_json()) == each


@pytest.mark.parametrize("text", ["", "{", "[]", '{"variants": 3}', '{"variants": {"a": {"metrics": {"loss": {}}}}}'])
def test_a_file_that_is_no_scorecard_is_refused_by_name(text: str) -> None:
    with pytest.raises(InputError, match="not a scorecard") as caught:
        Scorecard.from_json(text, where="run/evaluate/scorecard.json")
    assert caught.value.where == "run/evaluate/scorecard.json"


def test_a_difference_is_a_minus_b_and_the_better_side_follows_the_metrics_direction(card: Scorecard) -> None:
    base, tuned = card.variants["base"].metrics, card.variants["tuned"].metrics
    for comparison in card.comparisons:
        name = comparison.metric
        assert comparison.difference == pytest.approx(tuned[name].mean - base[name].mean)
        assert comparison.low is not None
        assert comparison.high is not None
        assert comparison.low <= comparison.difference <= comparison.high
        assert (comparison.difference < 0) == (name == "loss")
        assert comparison.better == ("lower" if name == "loss" else "higher")
        assert (comparison.outcome, comparison.winner) == ("better", "tuned")


def test_the_primary_metric_is_not_adjusted_and_the_others_are_for_their_number() -> None:
    a, b = NEARLY_EQUAL
    compared = compare_variants(a, b, names=NAMES, seed=0)
    loss, *others = compared
    assert loss.primary
    assert (loss.p_holm, loss.level) == (loss.p, pytest.approx(0.95))
    assert not any(c.primary for c in others)
    assert [c.p_holm for c in others] == holm([c.p for c in others])
    assert any(c.p_holm > c.p for c in others)
    assert [c.level for c in others] == [1 - level for level in holm_levels([c.p for c in others], 0.05)]
    by_bleu = compare_variants(a, b, names=NAMES, seed=0, primary="bleu")
    assert [c.metric for c in by_bleu if c.primary] == ["bleu"]
    assert by_bleu[0].p_holm >= by_bleu[0].p
    # p alone would decide; the adjusted p does not.
    borderline = compared[0].model_copy(update={"difference": -1.0, "p": 0.03, "p_holm": 0.09})
    assert (borderline.outcome, borderline.winner) == ("undecided", None)


@pytest.mark.parametrize("seed", range(12))
def test_no_interval_contradicts_its_verdict(seed: int) -> None:
    rng = random.Random(seed)
    rows = [make_rows(rng.uniform(0.4, 0.55), seed=rng.randrange(999), count=30) for _ in NAMES]
    tasks = [{"mmlu": make_graded_rows(rng.uniform(0.3, 0.7), seed=rng.randrange(999), count=30)} for _ in NAMES]
    variants = {name: VariantRows(r, {}, t) for name, r, t in zip(NAMES, rows, tasks, strict=True)}
    card = build_scorecard(variants, baseline="b", primary=rng.choice(("loss", "bleu", "mmlu/accuracy")))
    assert sum(c.primary for c in card.comparisons) == 1
    for c in card.comparisons:
        if c.low is not None and c.high is not None:
            assert (c.outcome == "undecided") == (c.low <= 0 <= c.high), c


def test_comparing_the_other_way_round_turns_differences_and_keeps_the_winner() -> None:
    a, b = score_rows("a", make_rows(0.8, seed=1)), score_rows("b", make_rows(0.4, seed=2))
    forward = compare_variants(a, b, names=NAMES, seed=0)
    backward = compare_variants(b, a, names=("b", "a"), seed=0)
    for one, other in zip(forward, backward, strict=True):
        assert one.difference == -other.difference
        assert (one.p, one.n, one.winner) == (other.p, other.n, other.winner)
        assert {one.outcome, other.outcome} == {"better", "worse"}


def test_identical_variants_differ_by_nothing_and_nobody_wins() -> None:
    same = make_rows(0.5, seed=1)
    card = build_scorecard({"one": VariantRows(same), "two": VariantRows(same)}, baseline="one")
    assert len(card.comparisons) == 5
    for comparison in card.comparisons:
        assert (comparison.difference, comparison.low, comparison.high) == (0.0, None, None)
        assert (comparison.p, comparison.p_holm, comparison.winner) == (1.0, 1.0, None)
        assert comparison.mde is None
        assert comparison.is_identical
        # 40 rows of which 8.8 % differ would all be alike by chance once in forty times.
        assert (1 - comparison.differing_at_most) ** 40 == pytest.approx(0.025)


def test_the_detectable_difference_accounts_for_all_metrics_of_the_pair() -> None:
    a, b = NEARLY_EQUAL
    together = compare_variants(a, b, names=NAMES, seed=0)
    (alone,) = compare_variants({"loss": a["loss"]}, b, names=NAMES, seed=0)
    assert together[0].mde == alone.mde, "the primary metric is looked at alone"
    assert not together[0].is_identical
    four = statistics.compare(a["bleu"].measure, b["bleu"].measure, seed=0)
    assert together[-1].mde == four.detectable(0.05 / 4)
    assert (together[-1].mde or 0) > 1.1 * (four.detectable(0.05) or 0)


def test_the_order_of_rows_changes_nothing() -> None:
    base, tuned = make_rows(0.4, seed=1), make_rows(0.5, seed=2)
    shuffled = random.Random(0).sample(tuned, len(tuned))
    one, other = (
        build_scorecard({"base": VariantRows(base), "tuned": VariantRows(rows)}, baseline="base")
        for rows in (tuned, shuffled)
    )
    assert one == other


def test_loss_is_over_rows_with_a_loss_and_text_metrics_over_rows_with_an_answer() -> None:
    rows = make_rows(0.4, seed=1)
    half = [replace(row, answer=None, reference=None) for row in rows[:25]]
    half += [replace(row, nll=None, tokens=None) for row in rows[25:]]
    card = build_scorecard({"base": VariantRows(half), "tuned": VariantRows(half)}, baseline="base")
    expected = {"loss": 25, **dict.fromkeys(TEXT_METRICS, 15)}
    assert {name: value.n for name, value in card.variants["base"].metrics.items()} == expected
    assert {c.metric: c.n for c in card.comparisons} == expected


def test_metrics_that_only_one_side_has_are_named_and_not_compared(task_card: Scorecard, card: Scorecard) -> None:
    loss_only = [replace(row, answer=None) for row in make_rows(0.4, seed=1)]
    with_task = VariantRows(loss_only, {}, {"mmlu": make_graded_rows(0.5, seed=1)})
    mixed = build_scorecard({"a": VariantRows(make_rows(0.4, seed=1)), "b": with_task}, baseline="a")
    assert [c.metric for c in mixed.comparisons] == ["loss"]
    (pair,) = mixed.unpaired
    assert (pair.a, pair.only_a) == ("b", ["mmlu/accuracy", "mmlu/logprob", "mmlu/logprob_byte"])
    assert (pair.b, pair.only_b) == ("a", [*TEXT_METRICS])
    assert Scorecard.from_json(mixed.to_json()) == mixed
    assert [(p.a, p.b, p.only_a, p.only_b) for p in task_card.unpaired] == [("shots", "tuned", [], ["loss"])]
    assert card.unpaired == []


def test_a_variant_without_rows_has_no_metrics() -> None:
    nothing = build_scorecard({"base": VariantRows([])}, baseline="base")
    assert nothing.variants["base"].metrics == {}
    assert nothing.comparisons == []


def test_one_row_gives_figures_without_uncertainty_and_a_valid_file() -> None:
    rows = {"base": make_rows(0.4, seed=1, count=1), "tuned": make_rows(0.8, seed=2, count=1)}
    card = build_scorecard({name: VariantRows(of) for name, of in rows.items()}, baseline="base")
    assert json.loads(card.to_json())["variants"]["base"]["metrics"]["loss"]["se"] is None
    assert all(c.p == 1.0 and c.low is None and c.winner is None for c in card.comparisons)
    assert Scorecard.from_json(card.to_json()) == card


def test_row_sets_that_differ_are_refused_with_the_ids_of_both_sides() -> None:
    rows = make_rows(0.5, seed=1)
    with pytest.raises(InputError) as caught:
        compare_variants(score_rows("a", rows[:-1]), score_rows("b", rows[8:]), names=("tuned", "base"), seed=0)
    message = str(caught.value)
    assert "only in tuned: row-00, row-01, row-02, row-03, row-04 and 3 more; only in base: row-39" in message
    assert "tuned against base" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": None}, "rows with answers are not the same: only in b: row-00"),
        ({"reference": "something else"}, "reference text differs in rows row-00"),
    ],
)
def test_answers_that_cannot_be_paired_are_refused_though_losses_can(
    change: dict[str, str | None], message: str
) -> None:
    first, *others = make_rows(0.5, seed=1)
    a, b = score_rows("a", [replace(first, **change), *others]), score_rows("b", [first, *others])
    with pytest.raises(InputError, match=message):
        compare_variants(a, b, names=NAMES, seed=0)


def test_rows_of_a_task_that_differ_are_named_with_the_task() -> None:
    rows = make_graded_rows(0.5, seed=1)
    tuned, base = (VariantRows([], {}, {"mmlu": of}) for of in (rows, rows[1:]))
    with pytest.raises(InputError, match="the rows of mmlu with answers are not the same: only in tuned: q-00"):
        build_scorecard({"base": base, "tuned": tuned}, baseline="base")


def test_an_unknown_baseline_or_counterpart_is_refused_with_the_known_names() -> None:
    variants = {"base": VariantRows([]), "tuned": VariantRows([])}
    with pytest.raises(InputError, match="no variant is called 'bass'") as caught:
        build_scorecard(variants, baseline="bass")
    assert "base, tuned" in str(caught.value)
    with pytest.raises(InputError, match="no variant is called 'nobody'"):
        build_scorecard(variants, baseline="base", compared_with={"tuned": "nobody"})


def test_each_variant_is_compared_with_its_counterpart(task_card: Scorecard) -> None:
    pairs = {(c.a, c.b) for c in task_card.comparisons}
    assert pairs == {("tuned", "base"), ("shots", "tuned"), ("int8", "tuned")}
    assert all(c.metric != "loss" for c in task_card.comparisons if c.a == "shots")


def test_accuracy_is_the_share_of_right_answers_with_its_standard_error(task_card: Scorecard) -> None:
    for name, seed, accuracy in (("base", 0, 0.3), ("shots", 2, 0.9)):
        correct = [row.correct["accuracy"] for row in make_graded_rows(accuracy, seed=seed)]
        share = sum(correct) / 60
        value = task_card.variants[name].metrics["mmlu/accuracy"]
        assert (value.mean, value.n) == (pytest.approx(share), 60)
        assert value.se == pytest.approx((share * (1 - share) / 59) ** 0.5)
    winners = {(c.a, c.metric): (c.difference, c.winner) for c in task_card.comparisons}
    assert winners["shots", "mmlu/accuracy"][1] == "shots"
    assert winners["int8", "mmlu/logprob"] == (0.0, None)


def test_rows_that_one_variant_could_not_be_measured_on_are_left_out_of_both_and_counted() -> None:
    base, tuned = make_rows(0.4, seed=1, count=20), make_rows(0.8, seed=2, count=20)
    reasons = {"loss": "9000 ids exceed 8192", "answers": "9100 prompt + 64 new tokens exceed 8192"}
    tuned[3] = Row("row-03", skipped=reasons)
    tuned[4] = replace(tuned[4], answer=None, skipped={"answers": "9200 prompt + 64 new tokens exceed 8192"})
    card = build_scorecard({"base": VariantRows(base), "tuned": VariantRows(tuned)}, baseline="base")
    assert {c.metric: c.n for c in card.comparisons} == {"loss": 19, **dict.fromkeys(TEXT_METRICS, 18)}
    alone = build_scorecard({"base": VariantRows(base[:3] + base[4:]), "tuned": VariantRows(tuned)}, baseline="base")
    assert card.comparisons[0].difference == alone.comparisons[0].difference
    assert card.cautions == [
        "tuned: 1 of 20 rows of the test rows have no score (loss): 9000 ids exceed 8192 (row row-03)",
        "tuned: 2 of 20 rows of the test rows have no score (answers): 9100 prompt + 64 new tokens exceed 8192 (row row-03)",
    ]


def test_a_set_of_which_every_row_was_skipped_is_named_with_the_reason() -> None:
    reason = "9100 prompt + 64 new tokens exceed 8192"
    skipped = [Row(f"q-{i}", skipped={"answers": reason}) for i in range(3)]
    variants = {
        name: VariantRows(make_rows(0.4, seed=1, count=20), tasks={"mmlu": rows})
        for name, rows in (("base", make_graded_rows(0.5, seed=1, count=3)), ("tuned", skipped))
    }
    card = build_scorecard(variants, baseline="base")
    assert card.cautions == [f"tuned: 3 of 3 rows of mmlu have no score (answers): {reason} (row q-0)"]
    assert all(name.startswith("mmlu/") for name in card.unpaired[0].only_b)


def test_a_variant_that_nothing_was_measured_of_is_named() -> None:
    card = build_scorecard({"base": VariantRows(make_rows(0.4, seed=1)), "shots": VariantRows([])}, baseline="base")
    assert card.cautions == ["shots has no scores: there are no rows to measure it on"]


def test_documents_have_a_loss_per_token_and_in_bits_per_byte_and_both_are_compared() -> None:
    def documents(seed: int) -> VariantRows:
        rows = make_rows(0.5, seed=seed)
        return VariantRows(
            [replace(row, reference=None, answer=None, bytes=100, kind="text") for row in rows], conditions=conditions()
        )

    card = build_scorecard({"base": documents(1), "tuned": documents(2)}, baseline="base")
    assert [(c.metric, c.primary) for c in card.comparisons] == [("loss", True), ("bits_per_byte", False)]
    bits = sum(row.nll or 0 for row in documents(1).rows) / (40 * 100) / math.log(2)
    assert card.variants["base"].metrics["bits_per_byte"].mean == pytest.approx(bits)
    assert card.cautions == []


def test_two_recipes_that_name_different_primary_metrics_are_decided_by_the_loss_and_it_is_said() -> None:
    assert choose_primary({"a": "bleu", "b": "bleu"}) == ("bleu", [])
    primary, notes = choose_primary({"a": "bleu", "b": "mmlu/accuracy"})
    assert primary == "loss"
    assert notes == [
        "the recipes have different primary metrics (a names BLEU (bleu), b names mmlu: accuracy (mmlu/accuracy)): "
        "Held-out loss decides here"
    ]
    variants = {"a": VariantRows(make_rows(0.4, seed=1)), "b": VariantRows(make_rows(0.8, seed=2))}
    card = build_scorecard(variants, baseline="a", primary=primary, notes=notes)
    assert card.cautions == notes
    assert [c.metric for c in card.comparisons if c.primary] == ["loss"]


CONDITIONS = {
    "model": "a",
    "tokenizer": "t",
    "template": "x",
    "answer": {"max_tokens": 64, "consensus": {"method": "none"}},
}


def conditions(**changes: Any) -> dict[str, Any]:
    return {**CONDITIONS, **changes}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({}, []),
        ({"model": "b"}, []),
        (
            {"answer": {"max_tokens": 128, "consensus": {"method": "none"}}, "template": "y"},
            ["tuned and base differ in more than the model: another template; answer.max_tokens = 64, not 128"],
        ),
        (
            {"answer": {"max_tokens": 64, "consensus": {"method": "rouge-l"}}},
            [
                "tuned and base differ in more than the model: answer.consensus.method = none, not rouge-l",
                "base chose its answers by ROUGE-L, so its ROUGE is flattered: go by another metric",
            ],
        ),
    ],
)
def test_what_differs_between_two_variants_besides_the_model_is_said(other: dict[str, Any], said: list[str]) -> None:
    tuned = VariantRows(make_rows(0.8, seed=1), conditions=conditions())
    base = VariantRows(make_rows(0.4, seed=2), conditions=conditions(**other))
    card = build_scorecard({"base": base, "tuned": tuned}, baseline="base")
    assert card.cautions == said
    assert card.variants["tuned"].conditions == conditions()
    assert Scorecard.from_json(card.to_json()) == card


def test_a_variant_that_does_not_say_what_it_depends_on_is_named() -> None:
    tuned = VariantRows(make_rows(0.8, seed=1), conditions=conditions())
    card = build_scorecard({"old": VariantRows(make_rows(0.4, seed=2)), "new": tuned}, baseline="old")
    assert card.cautions == [
        "old does not say what its rows depend on, so new and old may differ in more than the model"
    ]


def test_losses_over_different_tokenizers_are_compared_in_bits_per_byte_only() -> None:
    # The same likelihood of the same bytes, in half as many tokens.
    base = [replace(row, bytes=100, tokens=20) for row in make_rows(0.4, seed=1)]
    tuned = [replace(row, tokens=10, nll=row.nll) for row in base]
    variants = {
        "base": VariantRows(base, conditions=conditions()),
        "tuned": VariantRows(tuned, conditions=conditions(tokenizer="u")),
    }
    card = build_scorecard(variants, baseline="base")
    (first, *_) = card.comparisons
    assert (first.metric, first.primary, first.difference) == ("bits_per_byte", True, 0.0)
    assert "loss" not in {c.metric for c in card.comparisons}
    expected = sum(row.nll or 0 for row in base) / (40 * 100) / math.log(2)
    assert card.variants["tuned"].metrics["bits_per_byte"].mean == pytest.approx(expected)
    assert "tuned and base have different tokenizers, so their losses are compared in bits per byte" in card.cautions
    without = {name: replace(v, rows=[replace(row, bytes=None) for row in v.rows]) for name, v in variants.items()}
    card = build_scorecard(without, baseline="base")
    assert {c.metric for c in card.comparisons} == {*TEXT_METRICS}
    assert any("their losses are not compared: evaluate both again" in caution for caution in card.cautions)
    same = build_scorecard({name: replace(v, conditions=conditions()) for name, v in variants.items()}, baseline="base")
    assert "bits_per_byte" not in same.variants["base"].metrics


def test_rows_about_one_passage_are_one_unit_also_if_only_one_side_knows_it() -> None:
    a, b = make_graded_rows(0.6, seed=1), make_graded_rows(0.4, seed=2)
    known = [replace(row, passage=f"p{i // 6}") for i, row in enumerate(a)]
    for other in (b, [replace(row, passage=f"p{i // 6}") for i, row in enumerate(b)]):
        variants = {"a": VariantRows([], {}, {"boolq": known}), "b": VariantRows([], {}, {"boolq": other})}
        card = build_scorecard(variants, baseline="b", primary="boolq/accuracy")
        assert {c.n for c in card.comparisons} == {10}
        assert card.variants["a"].metrics["boolq/accuracy"].n == 10


@pytest.mark.parametrize(
    ("text", "bleu"),
    [("我喜欢吃饭。", "tok:zh"), ("東京に行きました。", "tok:char"), ("ฉันชอบกินข้าว", "tok:char")],
)
def test_a_perfect_answer_in_a_script_without_spaces_has_perfect_scores_and_its_words_are_named(
    text: str, bleu: str
) -> None:
    rows = [Row(f"r{i}", reference=text, answer=text) for i in range(3)]
    card = build_scorecard({"tuned": VariantRows(rows)}, baseline="tuned")
    values = {name: value.mean for name, value in card.variants["tuned"].metrics.items()}
    assert values == pytest.approx({"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0, "bleu": 100.0})
    assert card.signatures["rouge"].endswith("words:unicode")
    assert bleu in card.signatures["bleu"]
    assert [caution.partition(" is over")[0] for caution in card.cautions] == ["rouge", "bleu"]


def test_a_reference_without_words_cannot_be_scored_by_rouge_and_is_counted() -> None:
    rows = [Row("a", reference="🙂", answer="🙂"), Row("b", reference="so it is", answer="so it is")]
    card = build_scorecard({"tuned": VariantRows(rows)}, baseline="tuned")
    value = card.variants["tuned"].metrics["rouge1"]
    assert (value.mean, value.n) == (1.0, 1)
    assert card.cautions == [
        "tuned: 1 of 2 rows of the test rows have no score (answers): the reference has no words (row a)"
    ]
