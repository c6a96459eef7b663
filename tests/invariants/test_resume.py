"""Resumed ≡ uninterrupted, to the last bit on a CPU, over a table of what can be trained: weights, moments, best weights,
metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from corral.recipe import Optimizer, Train
from corral.training.objectives import OBJECTIVES
from tests.invariants.work import Case, Instant, Job, assert_same, left, newest, train

# Moments are in 8 bits from 4,096 weights on: an adapter of rank 64 on this model has as many.
CASES = {
    "an adapter": Case(),
    "dropout, grouped by length, gradient checkpointing": Case(
        {"group_by_length": True, "gradient_checkpointing": True}, lora={"dropout": 0.1}
    ),
    "epochs, their last step smaller": Case({"epochs": 2.2, "group_by_length": True}, {"schedule": "linear"}),
    "ended early": Case({"steps": 40, "evaluate_every": 1, "early_stopping": 2}, {"lr": 0.1, "clip": 100}),
    "DoRA with dropout": Case({}, {"weight_decay": 0.1}, {"dora": True, "rslora": True, "dropout": 0.1}),
    "8-bit moments": Case({}, {"kind": "adamw_8bit"}, {"rank": 64}),
    "all weights": Case({"method": "full"}),
    "all weights, 8-bit paged moments": Case({"method": "full"}, {"kind": "paged_adamw_8bit", "weight_decay": 0.1}),
    "nf4": Case({"quantization": "nf4"}, {"kind": "paged_adamw_32bit"}),
    "nf4, dropout, 8-bit moments": Case(
        {"quantization": "nf4", "gradient_checkpointing": True}, {"kind": "adamw_8bit"}, {"rank": 64, "dropout": 0.1}
    ),
    "int8": Case({"quantization": "int8"}),
    "int8, all layers, 8-bit paged moments": Case(
        {"quantization": "int8", "int8_threshold": 0.0},
        {"kind": "paged_adamw_8bit"},
        {"rank": 64, "targets": "all-linear"},
    ),
}


def choices(section: Any, key: str) -> set[str]:
    return set(get_args(section.model_fields[key].annotation))


def test_the_table_has_every_objective_optimizer_quantisation_and_method() -> None:
    configs = [case.config for case in CASES.values()]
    assert {c.objective for c in configs} == set(OBJECTIVES) == choices(Train, "objective")
    assert {c.optimizer.kind for c in configs} == choices(Optimizer, "kind")
    assert {c.quantization for c in configs} == choices(Train, "quantization")
    assert {c.method for c in configs} == choices(Train, "method")
    assert {(c.quantization, c.optimizer.kind.endswith("8bit")) for c in configs} == {
        (q, eight) for q in choices(Train, "quantization") for eight in (False, True)
    }


@pytest.mark.parametrize("name", CASES)
def test_stopped_on_request_and_resumed(name: str, rows: Path, tmp_path: Path) -> None:
    job = Job(rows, CASES[name])
    outcome = job.run(tmp_path / "whole")
    for stop in (1, min(7, outcome.steps - 1)):
        with pytest.raises(KeyboardInterrupt):
            stop_after(stop, job, tmp_path / "parts")
        assert newest(tmp_path / "parts").name == f"step-{stop:06d}"
    assert job.run(tmp_path / "parts").best_step == outcome.best_step
    assert_same(tmp_path / "parts", tmp_path / "whole")


def stop_after(step: int, job: Job, folder: Path) -> None:
    seen: list[int] = []
    job.run(folder, on_step=lambda m: seen.append(m.step), should_stop=lambda: seen[-1] >= step)


def test_the_table_is_about_what_it_says(rows: Path, tmp_path: Path) -> None:
    stopped = Job(rows, CASES["ended early"]).run(tmp_path / "early")
    assert stopped.best_step < stopped.steps < 40
    job = Job(rows, CASES["8-bit moments"])
    job.run(tmp_path / "bits")
    kinds = {str(t.dtype) for t in left(tmp_path / "bits")["moments"].values()}
    assert kinds == {"torch.uint8", "torch.float32"}
    assert set(left(tmp_path / "bits")["numbers"].values()) == {"12"}, "bitsandbytes counts steps in a plain number"


def test_what_is_compared_would_show_one_flipped_bit(rows: Path, tmp_path: Path) -> None:
    job = Job(rows)
    job.run(tmp_path / "a")
    job.run(tmp_path / "b")
    assert_same(tmp_path / "a", tmp_path / "b")
    path = newest(tmp_path / "b") / "optimizer.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("exp_avg"))
    tensors[name].view(torch.int32).view(-1)[0] ^= 1
    save_file(tensors, path, metadata={})
    with pytest.raises(AssertionError, match="exp_avg"):
        assert_same(tmp_path / "a", tmp_path / "b")


@pytest.fixture(scope="module")
def uninterrupted(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Path]:
    """A job and what it leaves, done in a process of its own."""
    job = Job(rows, CASES["nf4, dropout, 8-bit moments"])
    folder = tmp_path_factory.mktemp("whole")
    process = train(job, folder)
    process.join()
    assert process.exitcode == 0
    return job, folder


INSTANTS = {
    "in a step": Instant("backward", nth=7),
    "while a checkpoint is written": Instant("save_file", "step-000006"),
    "while the best weights are put in place of others": Instant("rename", ".corral-old-best", nth=1),
    "between the old best weights and the new": Instant("rename", "/best", nth=5),
    "while metrics are written": Instant("append", nth=8),
}


@pytest.mark.parametrize("name", INSTANTS)
def test_killed_and_resumed(name: str, uninterrupted: tuple[Job, Path], tmp_path: Path) -> None:
    job, expected = uninterrupted
    process = train(job, tmp_path, INSTANTS[name])
    process.join()
    assert process.exitcode == -9
    job.run(tmp_path)
    assert_same(tmp_path, expected)
