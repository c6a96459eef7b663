from __future__ import annotations

import io
import json
import random
from dataclasses import replace

import pytest
from rich.console import Console

from corral.errors import InputError
from corral.evaluation import statistics
from corral.evaluation.scorecard import (
    Scorecard,
    build_scorecard,
    compare_variants,
    cost_rows,
    render_scores,
    table_rows,
)
from corral.evaluation.scoring import Row, VariantRows, score_rows
from corral.evaluation.statistics import holm
from corral.metrics.bleu import bleu, bleu_statistics
from corral.metrics.rouge import Rouge

SAMPLE = "boil the rice in salted water then drain it and stir in butter peas and two beaten eggs until set"
WORDS = SAMPLE.split()


def rows(quality: float, *, seed: int, count: int = 40) -> list[Row]:
    """Rows whose references and tokens depend on their number only; a higher quality answers closer at less loss."""
    noise = random.Random(seed)
    made: list[Row] = []
    for number in range(count):
        fixed = random.Random(number)
        reference = fixed.choices(WORDS, k=20)
        answer = [word if noise.random() < quality else noise.choice(WORDS) for word in reference]
        tokens = fixed.randrange(10, 40)
        nll = tokens * (fixed.uniform(2, 3) - quality + noise.gauss(0, 0.1))
        made.append(Row(f"row-{number:02}", nll, tokens, " ".join(reference), " ".join(answer)))
    return made


@pytest.fixture(scope="module")
def card() -> Scorecard:
    info = {"tokens": 800.0, "seconds": 2.5, "tokens_per_second": 320.0}
    variants = {"base": VariantRows(rows(0.4, seed=1)), "tuned": VariantRows(rows(0.8, seed=2), info)}
    return build_scorecard(variants, baseline="base", seed=3)


def test_each_metric_is_computed_as_what_it_is(card: Scorecard) -> None:
    made = rows(0.4, seed=1)
    metrics = card.variants["base"].metrics
    references, answers = [row.reference or "" for row in made], [row.answer or "" for row in made]
    assert list(metrics) == ["loss", "rouge1", "rouge2", "rougeL", "bleu"]
    assert metrics["loss"].mean == pytest.approx(sum(r.nll or 0 for r in made) / sum(r.tokens or 0 for r in made))
    rouge = Rouge().score_pairs(references, answers).mean(axis=0)
    assert [metrics[name].mean for name in ("rouge1", "rouge2", "rougeL")] == pytest.approx(rouge.tolist())
    assert metrics["bleu"].mean == pytest.approx(float(bleu(bleu_statistics(references, answers).sum(axis=0))))
    assert {value.n for value in metrics.values()} == {40}


def test_the_file_has_the_names_that_others_read(card: Scorecard) -> None:
    content = json.loads(card.to_json())
    assert set(content["variants"]) == {"base", "tuned"}
    for variant in content["variants"].values():
        assert set(variant["metrics"]) == {"loss", "rouge1", "rouge2", "rougeL", "bleu"}
        assert all({"mean", "se", "n"} <= set(value) for value in variant["metrics"].values())
    assert len(content["comparisons"]) == 5
    for comparison in content["comparisons"]:
        assert {"a", "b", "metric", "difference", "low", "high", "p", "n"} <= set(comparison)
        assert (comparison["a"], comparison["b"]) == ("tuned", "base")
    assert content["variants"]["tuned"]["info"]["tokens_per_second"] == 320.0
    assert content["signatures"]["bleu"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")


def test_a_scorecard_survives_its_file(card: Scorecard) -> None:
    assert Scorecard.from_json(card.to_json()) == card


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
        assert comparison.winner == "tuned"


def test_p_is_adjusted_over_the_metrics_of_a_pair() -> None:
    a, b = score_rows("a", rows(0.52, seed=1)), score_rows("b", rows(0.5, seed=2))
    compared = compare_variants(a, b, names=("a", "b"), seed=0)
    assert [c.p_holm for c in compared] == holm([c.p for c in compared])
    assert any(c.p_holm > c.p for c in compared)


def test_comparing_the_other_way_round_turns_differences_and_keeps_the_winner() -> None:
    a, b = score_rows("a", rows(0.8, seed=1)), score_rows("b", rows(0.4, seed=2))
    there, back = compare_variants(a, b, names=("a", "b"), seed=0), compare_variants(b, a, names=("b", "a"), seed=0)
    for one, other in zip(there, back, strict=True):
        assert one.difference == -other.difference
        assert (one.p, one.n, one.winner) == (other.p, other.n, other.winner)


def test_identical_variants_differ_by_nothing_and_nobody_wins() -> None:
    same = rows(0.5, seed=1)
    card = build_scorecard({"one": VariantRows(same), "two": VariantRows(same)}, baseline="one")
    assert len(card.comparisons) == 5
    for comparison in card.comparisons:
        assert (comparison.difference, comparison.low, comparison.high) == (0.0, 0.0, 0.0)
        assert (comparison.p, comparison.p_holm, comparison.winner) == (1.0, 1.0, None)
        assert comparison.mde is None
        assert comparison.is_identical


def test_what_the_data_could_have_shown_is_what_would_have_won_among_all_metrics() -> None:
    a, b = score_rows("a", rows(0.52, seed=1)), score_rows("b", rows(0.5, seed=2))
    together = compare_variants(a, b, names=("a", "b"), seed=0)
    (alone,) = compare_variants({"loss": a["loss"]}, b, names=("a", "b"), seed=0)
    assert together[0].mde == statistics.compare(a["loss"].measure, b["loss"].measure, seed=0, metric_count=5).mde
    assert not together[0].is_identical
    assert alone.mde is not None
    assert (together[0].mde or 0) > 1.1 * alone.mde


def test_the_order_of_rows_changes_nothing() -> None:
    base, tuned = rows(0.4, seed=1), rows(0.5, seed=2)
    shuffled = random.Random(0).sample(tuned, len(tuned))
    one = build_scorecard({"base": VariantRows(base), "tuned": VariantRows(tuned)}, baseline="base")
    assert build_scorecard({"base": VariantRows(base), "tuned": VariantRows(shuffled)}, baseline="base") == one


def test_every_variant_is_compared_with_the_baseline() -> None:
    variants = {name: VariantRows(rows(0.5, seed=i, count=5)) for i, name in enumerate(("base", "sft", "dpo"))}
    pairs = {(c.a, c.b) for c in build_scorecard(variants, baseline="base").comparisons}
    assert pairs == {("sft", "base"), ("dpo", "base")}


def test_loss_is_over_rows_with_a_loss_and_text_metrics_over_rows_with_an_answer() -> None:
    def half(made: list[Row]) -> list[Row]:
        silent = [replace(row, answer=None, reference=None) for row in made[:25]]
        return silent + [replace(row, nll=None, tokens=None) for row in made[25:]]

    card = build_scorecard(
        {"base": VariantRows(half(rows(0.4, seed=1))), "tuned": VariantRows(half(rows(0.8, seed=2)))}, baseline="base"
    )
    assert {name: value.n for name, value in card.variants["base"].metrics.items()} == {
        "loss": 25,
        **dict.fromkeys(("rouge1", "rouge2", "rougeL", "bleu"), 15),
    }
    assert {c.metric: c.n for c in card.comparisons}["loss"] == 25


def test_an_empty_answer_counts_as_a_bad_one_and_a_missing_answer_does_not_count() -> None:
    scores = score_rows("v", [Row("a", reference="x y", answer=""), Row("b", reference="x y"), Row("c", answer="x")])
    found = {name: (column.ids, column.measure.value) for name, column in scores.items()}
    assert found == dict.fromkeys(("rouge1", "rouge2", "rougeL", "bleu"), (("a",), 0.0))


def test_a_metric_without_rows_is_absent_and_not_compared() -> None:
    silent = [replace(row, answer=None) for row in rows(0.4, seed=1)]
    card = build_scorecard({"base": VariantRows(rows(0.4, seed=1)), "tuned": VariantRows(silent)}, baseline="base")
    assert list(card.variants["tuned"].metrics) == ["loss"]
    assert [c.metric for c in card.comparisons] == ["loss"]
    nothing = build_scorecard({"base": VariantRows([])}, baseline="base")
    assert nothing.variants["base"].metrics == {}
    assert nothing.comparisons == []


def test_metrics_that_only_one_side_has_are_named(several: Scorecard, card: Scorecard) -> None:
    loss_only = [replace(row, answer=None) for row in rows(0.4, seed=1)]
    of_task = VariantRows(loss_only, {}, {"mmlu": answered(0.5, seed=1)})
    made = build_scorecard({"a": VariantRows(rows(0.4, seed=1)), "b": of_task}, baseline="a")
    (pair,) = made.unpaired
    assert (pair.a, pair.only_a) == ("b", ["mmlu/accuracy", "mmlu/logprob", "mmlu/logprob_byte"])
    assert (pair.b, pair.only_b) == ("a", ["rouge1", "rouge2", "rougeL", "bleu"])
    assert Scorecard.from_json(made.to_json()) == made
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render_scores(made))
    printed = " ".join(console.export_text().split())
    assert "b and a, not compared: only b has mmlu: accuracy, mmlu: by log-prob, mmlu: by log-prob/byte" in printed
    assert "b and a, not compared: only a has ROUGE-1, ROUGE-2, ROUGE-L, BLEU" in printed
    assert [(each.a, each.b, each.only_a, each.only_b) for each in several.unpaired] == [
        ("shots", "tuned", [], ["loss"])
    ]
    assert card.unpaired == []


def test_one_row_gives_figures_without_uncertainty_and_a_valid_file() -> None:
    variants = {"base": VariantRows(rows(0.4, seed=1, count=1)), "tuned": VariantRows(rows(0.8, seed=2, count=1))}
    card = build_scorecard(variants, baseline="base")
    content = json.loads(card.to_json())
    assert content["variants"]["base"]["metrics"]["loss"]["se"] is None
    assert all(c.p == 1.0 and c.low is None and c.winner is None for c in card.comparisons)
    assert Scorecard.from_json(card.to_json()) == card
    assert table_rows(card)


def test_row_sets_that_differ_are_refused_with_the_ids_of_both_sides() -> None:
    a = score_rows("a", rows(0.5, seed=1)[:-1])
    b = score_rows("b", rows(0.5, seed=1)[8:])
    with pytest.raises(InputError) as caught:
        compare_variants(a, b, names=("tuned", "base"), seed=0)
    message = str(caught.value)
    assert "only in tuned: row-00, row-01, row-02, row-03, row-04 and 3 more; only in base: row-39" in message
    assert "tuned against base" in message


def test_answers_missing_on_one_side_only_are_refused_though_losses_match() -> None:
    made = rows(0.5, seed=1)
    with pytest.raises(InputError, match="rows with answers are not the same: only in b: row-00"):
        compare_variants(
            score_rows("a", [replace(made[0], answer=None), *made[1:]]), score_rows("b", made), names=("a", "b"), seed=0
        )


def test_other_references_for_the_same_rows_are_refused() -> None:
    made = rows(0.5, seed=1)
    changed = [replace(made[0], reference="something else"), *made[1:]]
    with pytest.raises(InputError, match="reference text differs in rows row-00"):
        compare_variants(score_rows("a", made), score_rows("b", changed), names=("a", "b"), seed=0)


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
        build_scorecard({"tuned": VariantRows(bad)}, baseline="tuned")
    assert caught.value.where == "variant tuned"


def test_an_unknown_baseline_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(InputError, match="no variant is called 'bass'") as caught:
        build_scorecard({"base": VariantRows([]), "tuned": VariantRows([])}, baseline="bass")
    assert "base, tuned" in str(caught.value)


def test_the_table_has_a_line_for_each_metric_of_each_variant(card: Scorecard) -> None:
    header, *lines = table_rows(card)
    assert len(lines) == 10
    assert {len(line) for line in lines} == {len(header)}
    base, tuned = lines[:2]
    loss = card.variants["base"].metrics["loss"]
    assert base == ("Held-out loss ↓", "base", f"{loss.mean:.3f} ± {loss.se:.3f}", "40", "", "", "")
    assert tuned[1] == "tuned"
    assert tuned[4].startswith("-")
    assert tuned[6] == "<0.001 ✓"


def test_the_table_fits_a_terminal_of_80_columns(card: Scorecard) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render_scores(card))
    printed = console.export_text()
    assert "…" in printed
    assert all(label in printed for label in ("Held-out loss ↓", "ROUGE-L ↑", "BLEU ↑"))
    assert max(len(line) for line in printed.splitlines()) <= 80
    assert len(printed.strip().splitlines()) <= 15


def answered(right: float, *, seed: int, count: int = 60) -> list[Row]:
    """Rows of a task, each right with that probability; which are hard depends on their number only."""
    made = random.Random(seed)
    return [
        Row(f"q-{n:02}", correct={"accuracy": made.random() < right, "logprob": n % 3 == 0, "logprob_byte": n % 2 == 0})
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def several() -> Scorecard:
    """Four variants with rows of their own, of a task of choices and of one of texts."""
    asked = {"base": 0.3, "tuned": 0.5, "shots": 0.9, "int8": 0.5}
    info = {"answers": 40.0, "prompt_tokens": 400.0, "answer_tokens": 200.0, "seconds": 8.0, "answers_per_second": 5.0}
    variants = {
        name: VariantRows(
            rows(right, seed=i)
            if name != "shots"
            else [replace(r, nll=None, tokens=None) for r in rows(right, seed=i)],
            info | {f"mmlu/{key}": value for key, value in info.items()},
            {"mmlu": answered(right, seed=i), "xsum": rows(right, seed=10 + i, count=20)},
        )
        for i, (name, right) in enumerate(asked.items())
    }
    return build_scorecard(variants, baseline="base", compared_with={"shots": "tuned", "int8": "tuned"}, seed=3)


def test_each_variant_is_compared_with_the_one_it_belongs_beside(several: Scorecard) -> None:
    pairs = {(c.a, c.b) for c in several.comparisons}
    assert pairs == {("tuned", "base"), ("shots", "tuned"), ("int8", "tuned")}
    assert all(c.metric != "loss" for c in several.comparisons if c.a == "shots")
    with pytest.raises(InputError, match="no variant is called 'nobody'"):
        build_scorecard(
            {"base": VariantRows([]), "tuned": VariantRows([])}, baseline="base", compared_with={"tuned": "nobody"}
        )


def test_accuracy_is_the_share_of_right_answers_with_its_standard_error(several: Scorecard) -> None:
    for name, seed, right in (("base", 0, 0.3), ("shots", 2, 0.9)):
        hits = [row.correct["accuracy"] for row in answered(right, seed=seed)]
        share = sum(hits) / 60
        value = several.variants[name].metrics["mmlu/accuracy"]
        assert (value.mean, value.n) == (pytest.approx(share), 60)
        assert value.se == pytest.approx((share * (1 - share) / 59) ** 0.5)
    (compared,) = [c for c in several.comparisons if (c.a, c.metric) == ("shots", "mmlu/accuracy")]
    assert compared.winner == "shots"
    (same,) = [c for c in several.comparisons if (c.a, c.metric) == ("int8", "mmlu/logprob")]
    assert (same.difference, same.winner) == (0.0, None)


def test_metrics_stand_with_the_runs_own_first_then_task_by_task(several: Scorecard) -> None:
    assert list(several.variants["base"].metrics) == [
        *("loss", "rouge1", "rouge2", "rougeL", "bleu"),
        *("mmlu/accuracy", "mmlu/logprob", "mmlu/logprob_byte"),
        *("xsum/loss", "xsum/rouge1", "xsum/rouge2", "xsum/rougeL", "xsum/bleu"),
    ]
    assert Scorecard.from_json(several.to_json()) == several


def test_where_variants_have_different_counterparts_each_line_names_its_own(several: Scorecard) -> None:
    header, *lines = table_rows(several)
    assert header[4] == "difference"
    differences = {(line[1], line[4].rpartition(" vs ")[2]) for line in lines if line[4]}
    assert differences == {("tuned", "base"), ("shots", "tuned"), ("int8", "tuned")}
    assert any(line[0] == "mmlu: accuracy ↑" for line in lines)


def test_costs_are_set_side_by_side_for_each_set_of_rows(several: Scorecard, card: Scorecard) -> None:
    _, *lines = cost_rows({name: variant.info for name, variant in several.variants.items()})
    assert lines[0] == ("test rows", "base", "40", "10.0", "5.0", "8.0", "5.00")
    assert [line[:2] for line in lines if line[0]] == [("test rows", "base"), ("mmlu", "base")]
    assert len(lines) == 8
    assert len(cost_rows({name: variant.info for name, variant in card.variants.items()})) == 1, (
        "a card without such figures has none to show"
    )


def test_what_a_vote_saved_stands_beside_what_it_cost(several: Scorecard) -> None:
    infos = {name: dict(variant.info) for name, variant in several.variants.items()}
    infos["shots"] |= {"mmlu/candidates": 200.0, "mmlu/cancelled": 50.0}
    header, *lines = cost_rows(infos)
    assert header[-1] == "saved"
    assert {len(line) for line in lines} == {len(header)}
    assert [line[-1] for line in lines] == ["", "", "", "", "", "", "25%", ""]


def test_the_best_of_several_references_counts_and_there_is_no_bleu() -> None:
    made = [Row("a", reference="nothing alike", answer="eggs and peas", other_references=("eggs and peas", "rice"))]
    columns = score_rows("v", made)
    assert columns.keys() == {"rouge1", "rouge2", "rougeL"}
    assert columns["rougeL"].measure.value == 1.0


def test_rows_of_a_task_that_differ_are_named_with_the_task() -> None:
    one = VariantRows([], {}, {"mmlu": answered(0.5, seed=1)})
    other = VariantRows([], {}, {"mmlu": answered(0.5, seed=1)[1:]})
    with pytest.raises(InputError, match="the rows of mmlu with answers are not the same: only in tuned: q-00"):
        build_scorecard({"base": other, "tuned": one}, baseline="base")
