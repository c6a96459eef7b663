"""What decides whether an aligned model is promoted."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from corral.evaluation.alignment_gate import (
    AFTER,
    BEFORE,
    COMPARISON_FOLDER,
    PRIMARY,
    QUANTISED,
    SCORECARD,
    check_aligned_model,
    quantisation_gap,
    read_comparison,
)
from corral.evaluation.scorecard import build_scorecard
from corral.evaluation.scoring import PairSums, Row, VariantRows
from corral.recipe.alignment import Guards


def rows(seed: int, *, right: float, loss: float, margin: float = 0, prompts: int = 60) -> list[Row]:
    """Prompts of three pairs each, of which this share is in the right order, and answers with this loss."""
    rng = random.Random(seed)
    ranked = [PairSums(3, sum(rng.random() < right for _ in range(3)), rng.gauss(margin, 1)) for _ in range(prompts)]
    pairs = [Row(f"prompt-{n}", ranked=sums) for n, sums in enumerate(ranked)]
    return [*pairs, *(Row(f"row-{n}", 20 * (loss + rng.gauss(0, 0.01)), 20) for n in range(20))]


def stage(folder: Path, after: list[Row], quantised: list[Row] | None = None, **guards: float) -> Path:
    variants = {BEFORE: VariantRows(rows(1, right=0.6, loss=2)), AFTER: VariantRows(after)}
    if quantised is not None:
        variants[QUANTISED] = VariantRows(quantised)
    card = build_scorecard(variants, baseline=BEFORE, primary=PRIMARY)
    (folder / COMPARISON_FOLDER).mkdir(parents=True)
    (folder / COMPARISON_FOLDER / SCORECARD).write_text(card.to_json())
    (folder / "outcome.json").write_text(json.dumps({"steps": 9, "guards": guards}))
    return folder


def test_a_model_with_more_pairs_in_the_right_order_is_better(tmp_path: Path) -> None:
    result = check_aligned_model(stage(tmp_path, rows(2, right=0.9, loss=2.05)), Guards())
    assert (result.outcome, result.faults) == ("better", ())
    assert str(result).startswith("better than the model that it started from, on the validation rows")
    assert "which also chose its best weights; preference accuracy " in str(result)
    assert "60 prompts" in str(result)
    assert "held-out loss 2.0" in str(result)


def test_a_model_that_cannot_be_told_apart_is_not_said_to_be_better(tmp_path: Path) -> None:
    result = check_aligned_model(stage(tmp_path, rows(2, right=0.6, loss=2)), Guards())
    assert (result.outcome, result.faults) == ("equal", ())
    assert "by more than its guards allow, nor seen to be better" in str(result)


def test_fewer_pairs_in_the_right_order_are_a_fault_that_no_limit_accepts(tmp_path: Path) -> None:
    result = check_aligned_model(stage(tmp_path, rows(2, right=0.2, loss=2, margin=-3)), Guards(loss_rise=9))
    assert result.outcome == "worse"
    assert [(fault.what, fault.setting) for fault in result.faults] == [
        ("it puts fewer pairs into the right order, and by a smaller margin", None)
    ]


def test_fewer_pairs_in_the_right_order_per_token_are_no_fault_if_the_margin_of_whole_answers_has_grown(
    tmp_path: Path,
) -> None:
    result = check_aligned_model(stage(tmp_path, rows(2, right=0.2, loss=2, margin=3)), Guards())
    assert (result.outcome, result.faults) == ("equal", ())


def test_what_quantised_weights_cost_is_no_rise_of_the_loss_by_training(tmp_path: Path) -> None:
    after = rows(2, right=0.9, loss=2.3)
    folder = stage(tmp_path, after, quantised=rows(1, right=0.6, loss=2.24))
    assert check_aligned_model(folder, Guards()).outcome == "better"
    (fault,) = check_aligned_model(folder, Guards(loss_rise=0.01)).faults
    assert "higher than that of its quantised start model, and guards.loss_rise = 0.01" in fault.what
    name, value = (fault.setting or "").split("=")
    assert not check_aligned_model(folder, Guards.model_validate({name: float(value)})).faults
    assert check_aligned_model(stage(tmp_path / "plain", after), Guards()).outcome == "worse"


@pytest.mark.parametrize(("limit", "outcome"), [(0.1, "worse"), (0.5, "better")])
def test_a_loss_that_rises_too_far_is_a_fault_under_the_present_limit(
    limit: float, outcome: str, tmp_path: Path
) -> None:
    folder = stage(tmp_path, rows(2, right=0.9, loss=2.3))
    result = check_aligned_model(folder, Guards(loss_rise=limit))
    assert result.outcome == outcome
    for fault in result.faults:
        assert fault.what == "its held-out loss is 0.300 higher, and guards.loss_rise = 0.1"
        name, value = (fault.setting or "").split("=")
        accepted = Guards.model_validate({name: float(value)})
        assert not check_aligned_model(folder, accepted).faults, "the setting that is proposed accepts it"


def test_basic_prompts_of_the_kept_weights_count_against_those_of_the_start_model(tmp_path: Path) -> None:
    folder = stage(tmp_path, rows(2, right=0.9, loss=2), basic_prompts=18, basic_prompts_passed=15)
    assert "basic prompts answered well 18 → 15" in str(check_aligned_model(folder, Guards(failing_prompts=0.2)))
    (fault,) = check_aligned_model(folder, Guards()).faults
    assert "3 of 18 basic prompts" in fault.what
    assert fault.setting == "failing_prompts=0.17"
    (tmp_path / "outcome.json").write_text(json.dumps({"guards": {"basic_prompts": 300, "basic_prompts_passed": 1}}))
    (fault,) = check_aligned_model(folder, Guards()).faults
    assert fault.setting is None, "a limit of 1 is not a setting that is allowed"


def test_one_basic_prompt_may_fail_however_few_count(tmp_path: Path) -> None:
    folder = stage(tmp_path, rows(2, right=0.9, loss=2), basic_prompts=4, basic_prompts_passed=3)
    assert not check_aligned_model(folder, Guards()).faults
    assert check_aligned_model(folder, Guards(failing_prompts=0)).faults, "unless the user wants all of them"


def test_a_fall_of_chosen_answers_is_judged_by_the_present_limit(tmp_path: Path) -> None:
    folder = stage(tmp_path, rows(2, right=0.9, loss=2), chosen_fall=1.234)
    (fault,) = check_aligned_model(folder, Guards()).faults
    assert (
        fault.what == "its log-probability of chosen answers is lower by 1.23 of its size, and guards.chosen_fall = 0.2"
    )
    assert fault.setting == "chosen_fall=1.24"
    assert not check_aligned_model(folder, Guards(chosen_fall=1.24)).faults


def test_a_stage_without_validation_rows_says_that_nothing_was_compared(tmp_path: Path) -> None:
    result = check_aligned_model(tmp_path, Guards())
    assert (result.outcome, result.figures, result.faults) == ("unknown", (), ())
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "outcome.json").write_text(json.dumps({"guards": {"basic_prompts": 9}}))
    assert check_aligned_model(tmp_path / "prompts", Guards()).outcome == "worse", "basic prompts need no rows"


def test_the_gap_of_quantised_weights_is_the_rise_of_the_loss(tmp_path: Path) -> None:
    start = rows(1, right=0.6, loss=2)
    card = build_scorecard(
        {BEFORE: VariantRows(start), QUANTISED: VariantRows(rows(1, right=0.6, loss=2.25))}, baseline=BEFORE
    )
    assert quantisation_gap(card) == pytest.approx(0.25)
    other = read_comparison(stage(tmp_path, start))
    assert other is not None
    assert quantisation_gap(other) is None
