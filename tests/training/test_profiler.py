"""The profiler over training steps."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from corral.training.profiler import PROFILED_STEPS, SKIPPED_STEPS, WARM_UP_STEPS, StepProfiler


def steps(folder: Path, count: int) -> list[str]:
    said: list[str] = []
    with StepProfiler(folder, said.append, cuda=False) as profile:
        for _ in range(count):
            torch.ones(300, 300) @ torch.ones(300, 300)
            profile.step()
    return said


def test_the_counted_steps_are_traced_and_the_dearest_operations_named(tmp_path: Path) -> None:
    said = steps(tmp_path / "profile", SKIPPED_STEPS + WARM_UP_STEPS + PROFILED_STEPS + 2)
    assert f"processor time of {PROFILED_STEPS} steps" in said[0]
    assert str(tmp_path / "profile" / "trace.json") in said[0]
    assert any(line.endswith(" aten::mm") and f" {PROFILED_STEPS} ×" in line for line in said[1:])
    events = json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) == PROFILED_STEPS


def test_what_is_there_of_fewer_steps_is_told_as_that(tmp_path: Path) -> None:
    said = steps(tmp_path / "profile", SKIPPED_STEPS + WARM_UP_STEPS + 1)
    assert "processor time of 1 step, by operation" in said[0]
    assert any(line.endswith(" aten::mm") and " 1 ×" in line for line in said[1:])


def test_too_few_steps_to_profile_are_said(tmp_path: Path) -> None:
    said = steps(tmp_path / "profile", SKIPPED_STEPS + WARM_UP_STEPS)
    assert said == ["nothing is profiled: the first 2 steps are not counted, and there were 2"]
    assert not (tmp_path / "profile").exists()
