from __future__ import annotations

import json

import pytest

from corral.errors import RunError
from corral.report import run_record
from tests.report.conftest import MakeRun, completions, metrics


def test_a_whole_run_is_read_without_notes(make_run: MakeRun) -> None:
    record = run_record.read_run(make_run())
    assert record.name == "quickstart"
    assert [(t.name, len(t.metrics), t.settings["steps"]) for t in record.trainings] == [("train-1-sft", 61, 60)]
    assert record.completions == completions()
    assert record.promoted
    assert record.notes == []


def test_a_recipe_alone_is_a_run(make_run: MakeRun) -> None:
    record = run_record.read_run(make_run("nothing else"))
    assert (record.trainings, record.completions, record.scorecard, record.promoted) == ([], [], None, False)
    assert record.notes == []


def test_a_directory_without_a_recipe_is_refused_with_what_to_do(make_run: MakeRun) -> None:
    run = make_run("nothing else")
    (run / "recipe.toml").unlink()
    with pytest.raises(RunError, match=r"no readable recipe\.toml") as caught:
        run_record.read_run(run)
    assert caught.value.where == str(run)
    assert caught.value.hint


@pytest.mark.parametrize("content", [b"name = ", b"\xff\xfe\x00"])
def test_a_damaged_recipe_is_refused(make_run: MakeRun, content: bytes) -> None:
    run = make_run("nothing else")
    (run / "recipe.toml").write_bytes(content)
    with pytest.raises(RunError, match="damaged"):
        run_record.read_run(run)


@pytest.mark.parametrize("content", [b'{"variants": {', b"\xff\x00", b"[1, 2]", b""])
def test_a_damaged_file_is_named_and_hides_nothing_else(make_run: MakeRun, content: bytes) -> None:
    run = make_run()
    (run / "evaluate" / "scorecard.json").write_bytes(content)
    record = run_record.read_run(run)
    assert record.scorecard is None
    assert len(record.notes) == 1
    assert "evaluate/scorecard.json" in record.notes[0]
    assert len(record.completions) == 48


def test_the_last_line_of_a_repeated_step_counts_and_a_half_written_one_is_ignored_without_a_note(
    make_run: MakeRun,
) -> None:
    run = make_run("metrics")
    lines = metrics()
    lines[30] |= {"loss": 9.5}
    with (run / "train-1-sft" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(lines[30]) + '\n{"step": 61, "lo')
    record = run_record.read_run(run)
    assert record.trainings[0].metrics == lines
    assert record.notes == []


def test_bad_lines_in_the_middle_are_named(make_run: MakeRun) -> None:
    run = make_run("completions")
    path = run / "evaluate" / "completions.jsonl"
    lines = path.read_text().splitlines()
    lines[3], lines[6] = "{", "17"
    path.write_text("\n".join(lines))
    record = run_record.read_run(run)
    assert len(record.completions) == 46
    assert record.notes == ["evaluate/completions.jsonl: skipped lines that are not JSON objects: 4, 7"]


def test_training_stages_come_in_the_order_of_their_numbers(make_run: MakeRun) -> None:
    names = [f"train-{number}-sft" for number in (10, 2, 1)]
    record = run_record.read_run(make_run("metrics", stages=tuple(names)))
    assert [t.name for t in record.trainings] == ["train-1-sft", "train-2-sft", "train-10-sft"]


def test_the_contract_of_a_model_that_was_not_promoted_is_read(make_run: MakeRun) -> None:
    run = make_run("contract", "metrics")
    (run / "model").unlink()
    record = run_record.read_run(run)
    assert not record.promoted
    assert len(record.contract["checks"]) == 3


def test_series_leave_out_what_is_not_a_finite_number() -> None:
    lines = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": None},
        {"step": 3, "loss": float("nan")},
        {"step": 4},
        {"step": None, "loss": 1.0},
        {"step": 5, "loss": True},
        {"step": 6, "loss": 1.5},
    ]
    assert run_record.series(lines, "loss") == ([1, 6], [2.0, 1.5])
