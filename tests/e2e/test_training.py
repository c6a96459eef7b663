"""The settings of a training stage, through `corral run`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import corral


@pytest.fixture(scope="module")
def tuned(workspace: Callable[[], Path]) -> Path:
    """A run with TensorBoard, a profile, 8-bit AdamW, length grouping and an early stop; its output is in `said`."""
    folder = workspace()
    settings = {
        "trackers": '["tensorboard"]',
        "train.0.optimizer.kind": "paged_adamw_8bit",
        "train.0.optimizer.lr": "0.3",  # too high, so that the held-out loss rises at once
        "train.0.optimizer.warmup_steps": "0",
        "train.0.group_by_length": "true",
        "train.0.evaluate_every": "2",
        "train.0.early_stopping": "2",
        "train.0.steps": "40",
    }
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    done = corral("run", folder / "r.toml", "--out", folder / "run", "--profile", *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "said").write_text(done.stderr)
    return folder


def metrics(run: Path) -> list[dict[str, float | None]]:
    return [json.loads(line) for line in (run / "train-1-sft" / "metrics.jsonl").read_text().splitlines()]


def test_training_ends_early_once_the_held_out_loss_no_longer_falls(tuned: Path) -> None:
    lines = metrics(tuned / "run")
    losses = [line["eval_loss"] for line in lines if line["eval_loss"] is not None]
    best = losses.index(min(losses))
    assert len(losses) == best + 3
    assert lines[-1]["step"] == 2 * (best + 2)
    assert json.loads((tuned / "run/train-1-sft/outcome.json").read_text())["best_step"] == 2 * best


def test_tensorboard_holds_the_metrics_of_the_run(tuned: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tuned / "run/train-1-sft/tensorboard"))
    events.Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    assert losses == pytest.approx([line["loss"] for line in metrics(tuned / "run") if line["loss"] is not None])


def test_the_profile_is_printed_and_its_trace_kept(tuned: Path) -> None:
    assert "processor time of 3 steps, by operation" in (tuned / "said").read_text()
    trace = json.loads((tuned / "run/train-1-sft/profile/trace.json").read_text())
    assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])


def test_what_an_optimizer_does_not_do_here_is_said(tuned: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        assert "paged_adamw_8bit: there is no GPU" in (tuned / "said").read_text()
