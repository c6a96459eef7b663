"""Resumed ≡ uninterrupted, bit for bit on a CPU, for a table of settings: weights, moments, best weights, metrics."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from corral.recipe import Optimizer, Train
from corral.training.objective_table import TAKES
from tests.invariants.work import Case, Instant, Job, assert_same, killed, read_result, train
from tests.training.tiny import newest_checkpoint, run_until

Uninterrupted = Callable[[Case], tuple[Job, Path]]
# Only parameters of at least 4,096 weights get 8-bit moments: an adapter of rank 64 on this model has such.
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
    "dpo, dropout": Case({"objective": "dpo"}, lora={"dropout": 0.1}),
    "dpo, all weights": Case({"objective": "dpo", "method": "full"}),
    "ipo, nf4": Case({"objective": "ipo", "quantization": "nf4"}),
    "kto": Case({"objective": "kto", "group_by_length": True}),
    "kto, int8": Case({"objective": "kto", "quantization": "int8"}),
    "orpo": Case({"objective": "orpo"}),
    "simpo": Case({"objective": "simpo"}),
    "ulma, all weights": Case({"objective": "ulma", "method": "full"}),
}


def choices(section: Any, key: str) -> set[str]:
    return set(get_args(section.model_fields[key].annotation))


def test_the_table_has_every_objective_optimizer_quantisation_and_method() -> None:
    configs = [case.config for case in CASES.values()]
    assert {c.objective for c in configs} == set(TAKES) == choices(Train, "objective")
    assert {c.optimizer.kind for c in configs} == choices(Optimizer, "kind")
    assert {c.quantization for c in configs} == choices(Train, "quantization")
    assert {c.method for c in configs} == choices(Train, "method")
    assert {(c.quantization, c.optimizer.kind.endswith("8bit")) for c in configs} == {
        (q, eight) for q in choices(Train, "quantization") for eight in (False, True)
    }


@pytest.mark.parametrize("name", CASES)
def test_stopped_on_request_and_resumed(name: str, uninterrupted: Uninterrupted, tmp_path: Path) -> None:
    job, expected = uninterrupted(CASES[name])
    last = read_result(expected)["state"]
    for step in (1, min(7, last["step"] - 1)):
        run_until(job.trainer(tmp_path), step)
        assert newest_checkpoint(tmp_path).name == f"step-{step:06d}"
    assert job.run(tmp_path).best_step == last["best_step"]
    assert_same(tmp_path, expected)


def test_the_cases_do_what_their_names_say(uninterrupted: Uninterrupted) -> None:
    early, result = (read_result(uninterrupted(CASES[name])[1]) for name in ("ended early", "8-bit moments"))
    assert early["state"]["best_step"] < early["state"]["step"] < 40
    assert {str(t.dtype) for t in result["moments"].values()} == {"torch.uint8", "torch.float32"}
    assert set(result["numbers"].values()) == {"12"}, "bitsandbytes counts steps in a plain number"


def test_the_comparison_finds_one_flipped_bit(uninterrupted: Uninterrupted, tmp_path: Path) -> None:
    _, expected = uninterrupted(CASES["an adapter"])
    copy = Path(shutil.copytree(expected, tmp_path / "copy"))
    assert_same(copy, expected)
    path = newest_checkpoint(copy) / "optimizer.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        numbers = file.metadata()
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("exp_avg"))
    tensors[name].view(torch.int32).view(-1)[0] ^= 1
    save_file(tensors, path, metadata=numbers)
    with pytest.raises(AssertionError, match="exp_avg"):
        assert_same(copy, expected)


INSTANTS = {
    "in a step": Instant("backward", nth=7),
    "while a checkpoint is written": Instant("save_file", "step-000006"),
    "while the best weights are put in place of others": Instant("rename", ".corral-old-best", nth=1),
    "between the old best weights and the new": Instant("rename", "/best", nth=5),
    "while metrics are written": Instant("append", nth=8),
}


@pytest.mark.parametrize("write", [1, 3, 5])
def test_killed_while_the_reference_is_computed(write: int, uninterrupted: Uninterrupted, tmp_path: Path) -> None:
    """Each write is synced: of a file's first line, and of the rows."""
    job, expected = uninterrupted(CASES["dpo, dropout"])
    assert killed(train(job, tmp_path, Instant("fsync", nth=write)))
    assert (tmp_path / "reference").exists()
    assert not (tmp_path / "metrics.jsonl").exists()
    job.run(tmp_path)
    assert_same(tmp_path, expected)
    for name in ("train.jsonl", "validation.jsonl"):
        assert (tmp_path / "reference" / name).read_bytes() == (expected / "reference" / name).read_bytes()


@pytest.mark.parametrize("name", INSTANTS)
def test_killed_and_resumed(name: str, uninterrupted: Uninterrupted, tmp_path: Path) -> None:
    job, expected = uninterrupted(CASES["nf4, dropout, 8-bit moments"])
    assert killed(train(job, tmp_path, INSTANTS[name]))
    job.run(tmp_path)
    assert_same(tmp_path, expected)
