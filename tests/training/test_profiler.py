"""The profiler over training steps."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from corral.training.profiler import PROFILED_STEPS, SKIPPED_STEPS, WARM_UP_STEPS, StepProfiler


def profile(folder: Path, count: int) -> list[str]:
    output: list[str] = []
    with StepProfiler(folder, output.append, cuda=False) as profiler:
        for _ in range(count):
            torch.ones(300, 300) @ torch.ones(300, 300)
            profiler.step()
    return output


def test_the_counted_steps_are_traced_and_the_slowest_operations_listed(tmp_path: Path) -> None:
    output = profile(tmp_path / "profile", SKIPPED_STEPS + WARM_UP_STEPS + PROFILED_STEPS + 2)
    assert f"processor time of {PROFILED_STEPS} steps" in output[0]
    assert str(tmp_path / "profile" / "trace.json") in output[0]
    assert any(line.endswith(" aten::mm") and f" {PROFILED_STEPS} ×" in line for line in output[1:])
    events = json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) == PROFILED_STEPS


def test_fewer_steps_are_reported_as_fewer(tmp_path: Path) -> None:
    output = profile(tmp_path / "profile", SKIPPED_STEPS + WARM_UP_STEPS + 1)
    assert "processor time of 1 step, by operation" in output[0]
    assert any(line.endswith(" aten::mm") and " 1 ×" in line for line in output[1:])


def test_too_few_steps_are_reported(tmp_path: Path) -> None:
    output = profile(tmp_path / "profile", SKIPPED_STEPS + WARM_UP_STEPS)
    assert output == ["nothing is profiled: the first 2 steps are not counted, and there were 2"]
    assert not (tmp_path / "profile").exists()
