from __future__ import annotations

import io

from rich.console import Console

from corral.evaluation.scorecard import Scorecard, Variant, build_scorecard
from corral.evaluation.scoring import Row, VariantRows
from corral.evaluation.tables import cost_rows, render_costs, render_scores, table_rows
from tests.evaluation.conftest import make_rows


def printed(card: Scorecard) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render_scores(card))
    return console.export_text()


def test_the_table_has_a_line_for_each_metric_of_each_variant(card: Scorecard) -> None:
    header, *lines = table_rows(card)
    assert len(lines) == 10
    assert {len(line) for line in lines} == {len(header)}
    base, tuned = lines[:2]
    loss = card.variants["base"].metrics["loss"]
    assert base == ("Held-out loss ↓", "base", f"{loss.mean:.3f} ± {loss.se:.3f}", "40", "", "", "")
    assert (header[4], tuned[1], tuned[4][0], tuned[6]) == ("− base", "tuned", "-", "<0.001 ✓")


def test_the_table_fits_a_terminal_of_80_columns(card: Scorecard) -> None:
    text = printed(card)
    assert all(label in text for label in ("…", "Held-out loss ↓", "ROUGE-L ↑", "BLEU ↑"))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert len(text.strip().splitlines()) <= 15


def test_variants_with_different_counterparts_name_them_line_by_line(task_card: Scorecard) -> None:
    header, *lines = table_rows(task_card)
    assert header[4] == "difference"
    differences = {(line[1], line[4].rpartition(" vs ")[2]) for line in lines if line[4]}
    assert differences == {("tuned", "base"), ("shots", "tuned"), ("int8", "tuned")}
    assert any(line[0] == "mmlu: accuracy ↑" for line in lines)


def test_metrics_that_only_one_variant_has_are_named_below_the_table(task_card: Scorecard) -> None:
    words = " ".join(printed(task_card).split())
    assert "shots and tuned, not compared: only tuned has Held-out loss" in words


def test_one_row_has_no_uncertainty_to_show() -> None:
    rows = {name: VariantRows(make_rows(0.5, seed=i, count=1)) for i, name in enumerate(("base", "tuned"))}
    assert {line[5] for line in table_rows(build_scorecard(rows, baseline="base"))[1:]} == {""}


def test_costs_have_a_line_for_each_set_of_rows_and_variant(task_card: Scorecard, card: Scorecard) -> None:
    _, *lines = cost_rows(task_card.variants)
    assert lines[0] == ("test rows", "base", "40", "10.0", "5.0", "8.0", "5.00")
    assert [line[:2] for line in lines if line[0]] == [("test rows", "base"), ("mmlu", "base")]
    assert len(lines) == 8
    assert len(cost_rows(card.variants)) == 1, "only a header if no costs are known"


def test_costs_of_a_vote_include_the_share_it_saved(task_card: Scorecard) -> None:
    shots = task_card.variants["shots"]
    votes = Variant(metrics={}, info={**shots.info, "mmlu/candidates": 200.0, "mmlu/cancelled": 50.0})
    header, *lines = cost_rows({**task_card.variants, "shots": votes})
    assert header[-1] == "saved"
    assert {len(line) for line in lines} == {len(header)}
    assert [line[-1] for line in lines] == ["", "", "", "", "", "", "25%", ""]


def test_there_is_no_table_of_costs_where_nothing_was_answered(task_card: Scorecard) -> None:
    assert len(render_costs(task_card)) == 1
    assert render_costs(build_scorecard({"base": VariantRows(make_rows(0.4, seed=1))}, baseline="base")) == []


def test_a_rate_without_a_spread_shows_what_the_true_one_may_be() -> None:
    graded = {
        name: [Row(f"{i}", correct={"accuracy": right}) for i in range(50)]
        for name, right in (("a", False), ("b", True))
    }
    variants = {name: VariantRows([], {}, {"mmlu": rows}) for name, rows in graded.items()}
    lines = table_rows(build_scorecard(variants, baseline="a", primary="mmlu/accuracy"))[1:]
    assert [line[2] for line in lines] == ["0.000 (≤ 0.071)", "1.000 (≥ 0.929)"]
    alike = [Row(f"{i}", reference="a b", answer="c d") for i in range(9)]
    lines = table_rows(build_scorecard({"a": VariantRows(alike)}, baseline="a"))[1:]
    assert {line[2] for line in lines} == {"0.000", "0.00"}


def test_the_primary_metric_and_all_cautions_are_below_the_table() -> None:
    variants = {
        name: VariantRows(make_rows(0.5, seed=i), conditions={"answer": {"max_tokens": 64 * (i + 1)}})
        for i, name in enumerate(("base", "tuned"))
    }
    words = " ".join(printed(build_scorecard(variants, baseline="base", primary="bleu")).split())
    assert "primary: BLEU, 95% interval" in words
    assert "! tuned and base differ in more than the model: answer.max_tokens = 128, not 64" in words
