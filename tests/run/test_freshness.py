"""What a run holds of another state than its present one is named, so that no page mixes two."""

from __future__ import annotations

from pathlib import Path

from corral.run.freshness import stale_stages
from corral.storage import write_json


def record(run: Path, name: str, fingerprint: str, *, status: str = "done", **stages: str) -> None:
    before = {key.replace("_", "-"): value for key, value in stages.items()}
    write_json(run / name / "stage.json", {"fingerprint": fingerprint, "status": status, "inputs": {"stages": before}})


def whole_run(run: Path) -> Path:
    record(run, "prepare", "p1")
    record(run, "train-1-sft", "a1")
    record(run, "train-2-sft", "b1", train_1_sft="a1")
    record(run, "evaluate", "e1", train_2_sft="b1")
    names = {"prepare": "p1", "train-1-sft": "a1", "train-2-sft": "b1", "evaluate": "e1"}
    write_json(run / "lineage.json", {"stages": [{"name": n, "fingerprint": f} for n, f in names.items()]})
    return run


def test_a_finished_run_is_of_one_state(tmp_path: Path) -> None:
    assert stale_stages(whole_run(tmp_path)) == {}


def test_what_was_made_from_a_stage_that_is_being_made_again_is_stale_and_that_stage_is_not(tmp_path: Path) -> None:
    run = whole_run(tmp_path)
    record(run, "train-1-sft", "a2", status="running")
    stale = stale_stages(run)
    assert list(stale) == ["train-2-sft", "evaluate"]
    assert stale["train-2-sft"] == "it was made from an earlier train-1-sft"


def test_while_the_rows_are_prepared_again_everything_else_is_stale(tmp_path: Path) -> None:
    run = whole_run(tmp_path)
    record(run, "prepare", "p2", status="running")
    assert list(stale_stages(run)) == ["train-1-sft", "train-2-sft", "evaluate"]


def test_a_stage_that_the_lineage_does_not_know_is_stale(tmp_path: Path) -> None:
    run = whole_run(tmp_path)
    write_json(run / "lineage.json", {"stages": [{"name": "prepare", "fingerprint": "p1"}]})
    assert stale_stages(run)["train-1-sft"] == "it was made for other settings or rows"


RECIPE = """
name = "two"
model.base = "m"
data.sources = [{ path = "a.jsonl" }]
train = [{}, {}]
"""


def test_scores_from_before_there_was_a_last_stage_are_stale_and_a_stage_that_the_recipe_lost_too(
    tmp_path: Path,
) -> None:
    run = whole_run(tmp_path)
    (run / "recipe.toml").write_text(RECIPE)
    write_json(
        run / "evaluate" / "stage.json",
        {"fingerprint": "e1", "status": "done", "format": 2, "inputs": {"stages": {"train-1-sft": "a1"}}},
    )
    assert stale_stages(run) == {"evaluate": "it was made without train-2-sft"}
    (run / "recipe.toml").write_text(RECIPE.replace("{}, {}", "{}"))
    assert stale_stages(run) == {"train-2-sft": "the recipe has no such stage"}
