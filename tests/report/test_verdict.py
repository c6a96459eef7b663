from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from corral.evaluation.alignment_gate import Fault, GateResult
from corral.evaluation.scorecard import Scorecard
from corral.formatting import JOIN
from corral.report.run_record import read_run
from corral.report.scores import scores_by_metric
from corral.report.verdict import Verdict, give_verdict
from corral.run.stage_record import FORMAT, StageFolder, claim_stage, record_interruption
from tests.report.conftest import MakeRun, card, contract, promote_model, tiny_card


def verdict_on(make_run: MakeRun, value: Scorecard) -> Verdict:
    return give_verdict(read_run(make_run("nothing else", name=f"{id(value)}")), scores_by_metric(value))


def with_plain_spaces(text: str) -> str:
    return text.replace(JOIN, " ")


CHANCE = {"difference": -0.01, "low": -0.03, "high": 0.01, "p": 0.3, "p_holm": 0.3}
LOSS_FELL = (
    "The tuned model’s held-out loss fell from 2.280 to 1.840 "
    "(difference −0.440, 95 % interval −0.470 to −0.410, p < 0.001) on 100 rows."
)


@pytest.mark.parametrize(
    ("comparison", "words", "tone", "details"),
    [
        ({}, LOSS_FELL, "better", []),
        ({"difference": 0.05, "low": 0.02, "high": 0.08}, "held-out loss rose from", "worse", []),
        (CHANCE, "The data cannot tell the tuned model’s held-out loss from the base model’s", "undecided", []),
        (
            CHANCE | {"mde": 0.028},
            "(difference −0.010, 95 % interval −0.030 to +0.010, p = 0.300) on 100 rows.",
            "undecided",
            ["A true difference of 0.028 would have shown with 80 % power."],
        ),
        # The adjusted p decides.
        ({"p": 0.03, "p_holm": 0.09}, "p = 0.090", "undecided", []),
        ({"low": None, "high": None, "n": 1}, "(difference −0.440, p < 0.001) on 1 row.", "better", []),
        *(
            (
                {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0, "p_holm": 1.0, "mde": mde},
                "The data cannot tell",
                "undecided",
                ["They came out the same in every row; of such rows at most 4% differ, at the 95 % level."],
            )
            for mde in (None, 0.0)
        ),
    ],
)
def test_the_first_metric_of_the_tuned_model_is_the_headline(
    make_run: MakeRun, comparison: dict[str, Any], words: str, tone: str, details: list[str]
) -> None:
    verdict = verdict_on(make_run, tiny_card(**comparison))
    assert words in with_plain_spaces(f"{verdict.headline} {verdict.figures}")
    assert verdict.tone == tone
    assert [with_plain_spaces(detail) for detail in verdict.details] == details


def test_the_other_metrics_are_summed_up(make_run: MakeRun) -> None:
    assert verdict_on(make_run, card()).details == ["Secondary metrics: better on ROUGE-1, ROUGE-2, ROUGE-L and BLEU."]
    value = card()
    outcomes = {"rouge1": {"p_holm": 0.2}, "bleu": {"difference": -1.0}}
    changed = [c.model_copy(update=outcomes.get(c.metric, {})) for c in value.comparisons]
    assert verdict_on(make_run, value.model_copy(update={"comparisons": changed})).details == [
        "Secondary metrics: better on ROUGE-2 and ROUGE-L; worse on BLEU; not told apart by ROUGE-1."
    ]


def test_the_headline_is_about_the_primary_metric_wherever_it_stands(make_run: MakeRun) -> None:
    comparisons = [c.model_copy(update={"primary": c.metric == "bleu"}) for c in card().comparisons]
    verdict = verdict_on(make_run, card().model_copy(update={"comparisons": comparisons, "primary": "bleu"}))
    assert verdict.headline.startswith("The tuned model’s BLEU rose from")
    assert verdict.details == ["Secondary metrics: better on held-out loss, ROUGE-1, ROUGE-2 and ROUGE-L."]


def test_scores_that_were_not_compared_are_given_as_they_are(make_run: MakeRun) -> None:
    verdict = verdict_on(make_run, tiny_card().model_copy(update={"comparisons": []}))
    assert verdict.headline == "Held-out loss: base 2.280 and tuned 1.840. Nothing was compared."
    assert verdict.tone == "pending"


def test_a_broken_contract_comes_before_any_score(make_run: MakeRun) -> None:
    run = make_run()
    promote_model(run, contract(passed=False))
    record = read_run(run)
    verdict = give_verdict(record, scores_by_metric(record.scorecard))
    assert "its contract failed (adapter and merged model)" in verdict.headline
    assert verdict.tone == "worse"


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (["nothing else"], "a recipe and nothing else yet"),
        (["ledger"], "3,268 rows are prepared; training has not begun"),
        (["ledger", "metrics"], "train-1-sft has reached step 60: held-out loss went from 2.300 to 1.848 at step 60"),
    ],
)
def test_an_unfinished_run_says_how_far_it_got(make_run: MakeRun, parts: list[str], words: str) -> None:
    verdict = give_verdict(read_run(make_run(*parts)), [])
    assert words in verdict.headline
    assert verdict.tone == "pending"


def test_a_stage_that_a_guard_stopped_is_not_one_that_has_just_not_ended(make_run: MakeRun) -> None:
    run = make_run("ledger", "metrics")
    inputs, reason = {"rows": "abc"}, "stopped after step 60, as training breaks the model: chosen answers fell by 30%"
    stage = StageFolder("train-1-sft", run / "train-1-sft", "", done=False)
    (run / "train-1-sft" / "stage.json").write_text(
        json.dumps({"name": "train-1-sft", "format": FORMAT, "status": "running", "fingerprint": "f", "inputs": inputs})
    )
    record_interruption(stage, 1.0, reason)
    verdict = give_verdict(read_run(run), [])
    assert (verdict.headline, verdict.tone) == (f"train-1-sft did not come to its end: {reason}.", "worse")
    claim_stage(run, "train-1-sft", inputs)  # with a higher limit it goes on
    assert "has reached step 60" in give_verdict(read_run(run), []).headline


def test_of_several_aligned_models_the_last_is_judged_and_a_promoted_one_is_not_said_to_be_kept_aside(
    make_run: MakeRun,
) -> None:
    record = read_run(make_run("ledger", "metrics"))
    worse = replace(record.trainings[0], gate=GateResult("worse", (), (Fault("its loss rose", None),)))
    judged = give_verdict(replace(record, trainings=[worse]), [])
    assert "is worse than the model that it started from: its loss rose." in judged.headline
    assert judged.details == ["It was kept, not promoted. Both models’ figures are below."]
    promoted = give_verdict(replace(record, trainings=[replace(worse, promoted=True)]), [])
    assert promoted.details == ["The run stands for it all the same. Both models’ figures are below."]
    assert "has reached step" in give_verdict(replace(record, trainings=[worse, record.trainings[0]]), []).headline
