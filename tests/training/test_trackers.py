"""StepMetrics as TensorBoard reads them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from corral.errors import TrainingError
from corral.training.step_metrics import StepMetrics
from corral.training.trackers import Trackers


def metrics(step: int, loss: float | None, eval_loss: float | None = None) -> StepMetrics:
    return StepMetrics(step, loss, eval_loss, 1e-4, 0.5, 100 * step, 50.0, 2**30, 2.0 * step)


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def send(folder: Path, *lines: StepMetrics) -> list[str]:
    warnings: list[str] = []
    trackers = Trackers(["tensorboard"], folder, "recipe", {"lr": 1e-4}, warnings.append)
    for line in lines:
        trackers.log(line)
    trackers.finish()
    return warnings


def test_tensorboard_shows_training_and_held_out_loss(tmp_path: Path) -> None:
    assert send(tmp_path, metrics(0, None, 2.5), metrics(1, 2.0), metrics(2, 1.5, 1.75)) == []
    assert scalars(tmp_path, "train/loss") == [(1, 2.0), (2, 1.5)]
    assert scalars(tmp_path, "eval/loss") == [(0, 2.5), (2, 1.75)]
    assert [step for step, rate in scalars(tmp_path, "train/lr") if math.isclose(rate, 1e-4, rel_tol=1e-6)] == [0, 1, 2]


def test_tensorboard_shows_the_metrics_of_the_objective(tmp_path: Path) -> None:
    line = replace(metrics(1, 0.7, 0.6), objective={"reward_margin": 0.5, "eval_reward_margin": 0.25})
    assert send(tmp_path, line) == []
    assert scalars(tmp_path, "train/reward_margin") == [(1, 0.5)]
    assert scalars(tmp_path, "eval/reward_margin") == [(1, 0.25)]


def test_a_resumed_stage_replaces_the_steps_that_it_repeats(tmp_path: Path) -> None:
    send(tmp_path, metrics(0, None), metrics(1, 3.0), metrics(2, 9.0), metrics(3, 9.0))
    send(tmp_path, metrics(2, 2.0), metrics(3, 1.0))
    assert scalars(tmp_path, "train/loss") == [(1, 3.0), (2, 2.0), (3, 1.0)]


def test_a_tracker_that_cannot_start_stops_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    with pytest.raises(TrainingError, match="'tensorboard' cannot be started"):
        send(tmp_path, metrics(0, None))


def test_a_tracker_that_fails_later_is_dropped_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.tracking import TensorBoardTracker

    log = TensorBoardTracker.log

    def full(self: Any, values: dict[str, Any], step: int | None = None) -> None:
        if step == 1:
            raise OSError(28, "No space left on device")
        log(self, values, step)

    monkeypatch.setattr(TensorBoardTracker, "log", full)
    warnings = send(tmp_path, metrics(0, None, 2.5), metrics(1, 2.0), metrics(2, 1.5))
    assert warnings == ["tensorboard failed at step 1 and gets no more metrics: [Errno 28] No space left on device"]
    assert scalars(tmp_path, "eval/loss") == [(0, 2.5)]
