from __future__ import annotations

from typing import Any

import pytest

from corral.evaluation.scorecard import Scorecard
from corral.report import run_record, verdict
from corral.report.formatting import JOIN
from corral.report.verdict import Verdict
from tests.report.conftest import Maker, card, completions, contract, write


def scorecard(**comparison: Any) -> dict[str, Any]:
    """One metric, one comparison."""
    return {
        "variants": {
            "base": {"metrics": {"loss": {"mean": 2.28, "se": 0.03, "n": 100}}},
            "tuned": {"metrics": {"loss": {"mean": 1.84, "se": 0.02, "n": 100}}},
        },
        "comparisons": [
            {
                "a": "tuned",
                "b": "base",
                "metric": "loss",
                "difference": -0.44,
                "low": -0.47,
                "high": -0.41,
                "p": 0.0001,
                "n": 100,
            }
            | comparison
        ],
    }


def verdict_of(make_run: Maker, value: dict[str, Any]) -> Verdict:
    run = make_run("nothing else")
    write(run / "evaluate" / "scorecard.json", value)
    record = run_record.read_run(run)
    return verdict.verdict(record, verdict.scores(record.scorecard))


def plain(verdict: Verdict) -> str:
    return f"{verdict.headline} {verdict.figures}".replace(JOIN, " ")


def test_a_fall_of_the_loss_is_said_in_one_sentence(make_run: Maker) -> None:
    found = verdict_of(make_run, scorecard())
    assert plain(found) == (
        "The tuned model’s held-out loss fell from 2.280 to 1.840 "
        "(difference −0.440, 95 % interval −0.470 to −0.410, p < 0.001) on 100 rows."
    )
    assert found.tone == "better"


def test_a_rise_of_the_loss_is_bad_news(make_run: Maker) -> None:
    found = verdict_of(make_run, scorecard(difference=0.05, low=0.02, high=0.08))
    assert "held-out loss rose" in plain(found)
    assert found.tone == "worse"


def test_a_difference_that_could_be_chance_is_not_called_one(make_run: Maker) -> None:
    found = verdict_of(make_run, scorecard(difference=-0.01, low=-0.03, high=0.01, p=0.3, mde=0.028))
    assert plain(found).startswith("The data cannot tell the tuned model’s held-out loss from the base model’s")
    assert found.tone == "undecided"
    assert [d.replace(JOIN, " ") for d in found.details] == [
        "A true difference of 0.028 would have shown with 80 % power."
    ]


@pytest.mark.parametrize("mde", [None, 0.0])
def test_variants_that_never_differ_are_not_said_to_have_shown_everything(make_run: Maker, mde: float | None) -> None:
    found = verdict_of(make_run, scorecard(difference=0.0, low=0.0, high=0.0, p=1.0, mde=mde))
    assert [d.replace(JOIN, " ") for d in found.details] == [
        "They came out the same in every row; of such rows at most 3% differ, at the 95 % level."
    ]


def test_the_adjusted_p_value_decides(make_run: Maker) -> None:
    found = verdict_of(make_run, scorecard(p=0.03, p_holm=0.09))
    assert found.tone == "undecided"
    assert "p = 0.090" in plain(found)


def test_without_p_values_the_interval_decides() -> None:
    for low, high, outcome in ((-0.47, -0.41, "better"), (-0.47, 0.1, "undecided"), (None, None, "undecided")):
        value = scorecard(low=low, high=high)
        del value["comparisons"][0]["p"]
        assert verdict.scores(value)[0].differences[0].outcome == outcome


def test_outcomes_are_those_of_the_scorecard() -> None:
    value = card()
    real = {(c.metric, c.a): c.winner for c in Scorecard.model_validate(value).comparisons}
    found = {
        (s.metric, d.a): d.a if d.outcome == "better" else None for s in verdict.scores(value) for d in s.differences
    }
    assert len(found) == 5
    assert found == real


def test_the_other_metrics_are_summed_up(make_run: Maker) -> None:
    assert verdict_of(make_run, card()).details == ["Other metrics: better on ROUGE-1, ROUGE-2, ROUGE-L and BLEU."]


def test_figures_are_the_scorecards() -> None:
    value = card()
    scores = verdict.scores(value)
    assert [s.metric for s in scores] == ["loss", "rouge1", "rouge2", "rougeL", "bleu"]
    for score in scores:
        for found in score.values:
            given = value["variants"][found.variant]["metrics"][score.metric]
            assert (found.mean, found.low, found.high, found.n) == tuple(given[k] for k in ("mean", "low", "high", "n"))


def test_an_interval_is_made_from_the_standard_error_where_there_is_none() -> None:
    low, high = ((v := verdict.scores(scorecard())[0].values[0]).low, v.high)
    assert (low, high) == (pytest.approx(2.28 - 1.96 * 0.03), pytest.approx(2.28 + 1.96 * 0.03))


def test_unknown_metrics_come_last_and_claim_no_direction() -> None:
    value = scorecard()
    value["variants"]["tuned"]["metrics"]["accuracy of dates"] = {"mean": 0.7, "se": None, "n": 9}
    value["comparisons"].append(
        {"a": "tuned", "b": "base", "metric": "accuracy of dates", "difference": 0.2, "p": 0.01}
    )
    last = verdict.scores(value)[-1]
    assert (last.label, last.better, last.differences[0].outcome) == ("accuracy of dates", None, "different")
    assert last.values[0].low is None


def test_a_broken_contract_comes_before_any_score(make_run: Maker) -> None:
    run = make_run()
    write(run / "merge" / "model" / "contract.json", contract(passed=False))
    record = run_record.read_run(run)
    found = verdict.verdict(record, verdict.scores(record.scorecard))
    assert "its contract failed (adapter and merged model)" in found.headline
    assert found.tone == "worse"


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (["nothing else"], "a recipe and nothing else yet"),
        (["ledger"], "3,268 rows are prepared; training has not begun"),
        (["ledger", "metrics"], "train-1-sft has reached step 60: held-out loss went from 2.300 to 1.848 at step 60"),
    ],
)
def test_an_unfinished_run_says_how_far_it_got(make_run: Maker, parts: list[str], words: str) -> None:
    found = verdict.verdict(run_record.read_run(make_run(*parts)), [])
    assert words in found.headline
    assert found.tone == "pending"


def line(variant: str, number: int, answer: str, **more: Any) -> dict[str, Any]:
    return {
        "id": str(number),
        "variant": variant,
        "prompt": [],
        "reference": "one two three four",
        "answer": answer,
    } | more


def test_best_typical_and_worst_prompts_are_shown_by_their_rouge_l_difference() -> None:
    answers = ["one two three four", "one two three", "one two", "one", "x", "x", "x", "x"]
    lines = [line("base", n, "one two") for n in range(8)] + [line("tuned", n, a) for n, a in enumerate(answers)]
    choice, shown = verdict.examples(lines, {}, each=1)
    differences = [e.scores["tuned"] - e.scores["base"] for e in shown]
    assert [e.title.split(":")[0] for e in shown] == ["Best", "Typical", "Worst"]
    assert differences[0] == pytest.approx(1 - 2 / 3)
    assert differences == sorted(differences, reverse=True)
    assert differences[2] == pytest.approx(-2 / 3)
    assert choice.startswith("3 of 8 prompts, chosen by how much ROUGE-L")


@pytest.mark.parametrize("rows", range(1, 9))
def test_no_prompt_is_shown_twice(rows: int) -> None:
    _, shown = verdict.examples([c for c in completions() if int(c["id"], 16) < rows], {})
    prompts = [id(e.prompt) for e in shown]
    assert len(set(prompts)) == len(prompts) == min(rows, 6)


def test_scores_in_the_file_are_taken_as_they_are() -> None:
    lines = [line("base", 0, "x", scores={"rougeL": 0.25}), line("tuned", 0, "x", scores={"rougeL": 0.75})]
    _, (shown,) = verdict.examples(lines, {})
    assert shown.scores == {"base": 0.25, "tuned": 0.75}
    assert shown.title == "Best: ROUGE-L 0.25 → 0.75 (+0.50)"


@pytest.mark.parametrize("variants", [("tuned",), ("base", "tuned")])
def test_the_first_prompts_are_shown_when_nothing_can_be_compared(variants: tuple[str, ...]) -> None:
    lines = [line(v, n, "text", reference=None) for v in variants for n in range(9)]
    choice, shown = verdict.examples(lines, {})
    assert choice == "The first 6 of 9 prompts, in the order of the file."
    assert [list(e.answers) for e in shown] == [list(variants)] * 6


def test_the_baseline_stands_left_and_the_tuned_model_right() -> None:
    lines = [line(v, 0, "one") for v in ("tuned", "few-shot", "base")]
    _, (shown,) = verdict.examples(lines, {"baseline": "base"})
    assert list(shown.answers) == ["base", "few-shot", "tuned"]
