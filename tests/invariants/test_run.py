"""`corral run`, killed or stopped anywhere: the same command resumes, and ends with the same model."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.invariants.work import Instant, killed

SAME_BYTES = (
    "train-1-sft/adapter/adapter_model.safetensors",
    "train-1-sft/last/adapter_model.safetensors",
    "train-1-sft/checkpoints/step-000008/optimizer.safetensors",
    "train-1-sft/merged/model.safetensors",
    "train-1-sft/merged/contract.json",
)
"""Files that a run writes without times."""


def assert_same_run(folder: Path, expected: Path) -> None:
    for name in SAME_BYTES:
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
    for name in ("losses", "completions"):
        assert read_rows(folder / f"evaluate/{name}.jsonl") == read_rows(expected / f"evaluate/{name}.jsonl")
    metrics = [(f / "train-1-sft/metrics.jsonl").read_text().splitlines() for f in (folder, expected)]
    assert len(metrics[0]) == len(metrics[1]) == 9
    assert not [p for p in folder.rglob(".*") if p.is_dir()], "no half-written directories are left"


def read_rows(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    rows = {(row["variant"], row["id"]): {k: v for k, v in row.items() if k != "seconds"} for row in lines}
    assert len(rows) == len(lines), "no row is repeated"
    return rows


INSTANTS = {
    "before the prepared rows are in place": Instant("rename", "prepare/rows"),
    "in a step": Instant("backward", nth=3),
    "while a checkpoint is written": Instant("save_file", "step-000004"),
    "between the old adapter and the new": Instant("rename", ".corral-tmp-adapter", nth=1),
    "before training is recorded": Instant("replace", "train-1-sft/stage.json"),
    "between finishing the stage and promoting its model": Instant("replace", "run/model"),
    "while it evaluates": Instant("add", "tuned", nth=3),
}


def test_killed_at_one_instant_after_another(
    run_recipe: Callable[..., Any], finished_run: Path, tmp_path: Path
) -> None:
    for name, instant in INSTANTS.items():
        assert killed(run_recipe(tmp_path / "run", instant=instant)), name
    assert not killed(run_recipe(tmp_path / "run"))
    assert_same_run(tmp_path / "run", finished_run)


@pytest.mark.full
def test_killed_at_any_write_of_a_file(run_recipe: Callable[..., Any], finished_run: Path, tmp_path: Path) -> None:
    generator = random.Random(0)
    kills = rounds = 0
    while kills < 30 or rounds < 2:
        instant = Instant(generator.choice(["rename", "replace", "fsync"]), nth=generator.randint(1, 40))
        if killed(run_recipe(tmp_path / f"run-{rounds}", instant=instant)):
            kills += 1
        else:
            assert_same_run(tmp_path / f"run-{rounds}", finished_run)
            rounds += 1


STOPS = (
    ("prepare", Instant("replace", "prepare/.corral-tmp-ledger.json", signal=signal.SIGTERM)),
    ("train-1-sft", Instant("backward", nth=3, signal=signal.SIGHUP)),
    ("train-1-sft", Instant("replace", "contract.json", signal=signal.SIGINT)),
    ("evaluate", Instant("add", "base", nth=3, signal=signal.SIGTERM)),
    ("report", Instant("replace", "loss.png", signal=signal.SIGTERM)),
)


def test_stopped_by_a_signal_in_one_stage_after_another(
    run_recipe: Callable[..., Any], finished_run: Path, tmp_path: Path
) -> None:
    for stage, instant in STOPS:
        process = run_recipe(tmp_path / "run", instant=instant)
        process.join()
        assert process.exitcode == 128 + instant.signal, stage
        record = json.loads((tmp_path / "run" / stage / "stage.json").read_text())
        assert record["status"] == "running", stage
        if instant.call == "backward":
            assert sorted(p.name for p in (tmp_path / "run" / stage / "checkpoints").iterdir()) == [
                "step-000002",
                "step-000003",
            ]
    assert not killed(run_recipe(tmp_path / "run"))
    assert_same_run(tmp_path / "run", finished_run)


def test_a_disk_that_refuses_stops_with_2_and_afterwards_it_goes_on(
    run_recipe: Callable[..., Any], finished_run: Path, tmp_path: Path
) -> None:
    for largest, reached in ((30_000, "train-1-sft"), (100_000, "train-1-sft/last")):
        process = run_recipe(tmp_path / "run", largest=largest)
        process.join()
        assert process.exitcode == 2
        assert (tmp_path / "run" / reached).is_dir()
        assert not (tmp_path / "run" / "model").exists()
    assert not killed(run_recipe(tmp_path / "run"))
    assert_same_run(tmp_path / "run", finished_run)
