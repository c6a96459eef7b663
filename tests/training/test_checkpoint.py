"""Checkpoints are whole or absent; a damaged one is reported and skipped; nothing is lost when the disk fills."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from corral.errors import CheckpointError, StorageError
from corral.recipe import Optimizer
from corral.training import checkpoint, optimizers, sharding
from corral.training.checkpoint import TrainingState
from corral.training.distributed import World
from corral.training.divergence import DivergenceMonitor
from corral.training.loop import Trainer
from tests.conftest import file_size_limit, unprivileged
from tests.training.tiny import newest_checkpoint, run_until

MakeTrainer = Callable[..., Trainer]


@pytest.fixture(scope="module")
def stopped_at_7(tiny_trainer: MakeTrainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopped")
    run_until(tiny_trainer(folder), 7)
    return folder


@pytest.fixture
def stage(stopped_at_7: Path, tmp_path: Path) -> Path:
    """A copy of a training that was stopped at step 7, with checkpoints of steps 6 and 7."""
    return Path(shutil.copytree(stopped_at_7, tmp_path / "stage"))


def resume(tiny_trainer: MakeTrainer, stage: Path) -> tuple[list[int], list[str]]:
    """Train to the end. Returns: steps, warnings."""
    steps: list[int] = []
    warnings: list[str] = []
    tiny_trainer(stage).run(on_step=lambda metrics: steps.append(metrics.step), warn=warnings.append)
    return steps, warnings


def kept_steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.iterdir())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut short": (lambda p: os.truncate(p / "adapter.safetensors", 1000), "adapter.safetensors has sha256"),
    "optimizer cut to nothing": (lambda p: os.truncate(p / "optimizer.safetensors", 0), "optimizer.safetensors has"),
    "file missing": (lambda p: (p / "optimizer.safetensors").unlink(), "optimizer.safetensors is missing"),
    "bit flipped": (lambda p: flip(p / "adapter.safetensors"), "adapter.safetensors has sha256"),
    "state changed": (lambda p: flip(p / "state.json"), "state.json has sha256"),
    "manifest cut short": (lambda p: (p / "manifest.json").write_text("{"), "manifest.json: "),
    "manifest of something else": (lambda p: (p / "manifest.json").write_text("[1]"), "manifest.json does not name"),
    "empty manifest": (lambda p: (p / "manifest.json").write_text("{}"), "manifest.json does not"),
    "manifest missing": (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    "empty": (empty, "manifest.json is missing"),
    "a file in its place": (
        lambda p: (p.rename(p.with_name("x")), p.write_text("")),
        "manifest.json cannot be read: Not",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_reported_and_an_older_one_used(
    name: str, tiny_trainer: MakeTrainer, stage: Path
) -> None:
    damage, expected = DAMAGE[name]
    damage(newest_checkpoint(stage))
    steps, warnings = resume(tiny_trainer, stage)
    assert "step-000007 is damaged" in warnings[0]
    assert expected in warnings[0]
    assert steps == list(range(7, 13))
    kept = sorted(p.name for p in (stage / "checkpoints").glob("[!x]*"))
    assert kept == ["step-000009", "step-000012"], "the damaged one does not count among those that are kept"


def test_a_checkpoint_that_the_user_may_not_read_is_skipped(tmp_path: Path) -> None:
    weight, optimizer = make_optimizer("adamw")
    for step in (1, 2):
        save(tmp_path, weight, optimizer, state(step))
    (tmp_path / "step-000002" / "optimizer.safetensors").chmod(0)
    warnings: list[str] = []
    with unprivileged(tmp_path):
        restored = sharding.restore(tmp_path, {"w": weight}, optimizer, World(), warn=warnings.append)
    assert restored is not None
    assert restored.step == 1
    assert "optimizer.safetensors cannot be read: Permission denied" in warnings[0]


def test_foreign_files_are_ignored_and_unfinished_checkpoints_removed(tiny_trainer: MakeTrainer, stage: Path) -> None:
    (newest_checkpoint(stage) / "notes.txt").write_text("mine")
    for name in ("step-9", "step-best", ".corral-tmp-step-000008.abcdefgh"):
        (stage / "checkpoints" / name).mkdir()
    steps, _ = resume(tiny_trainer, stage)
    assert steps == list(range(8, 13))
    names = {p.name for p in (stage / "checkpoints").iterdir()}
    assert names == {"step-000009", "step-000012", "step-best"}


def test_when_all_are_damaged_training_stops_and_changes_nothing(tiny_trainer: MakeTrainer, stage: Path) -> None:
    for path in (stage / "checkpoints").glob("step-*"):
        (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="all 2 checkpoints are damaged"):
        tiny_trainer(stage).run()
    assert kept_steps(stage / "checkpoints") == [6, 7]


def make_optimizer(kind: str, steps: int = 3) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(96, 64))
    optimizer = optimizers.build_optimizer([weight], Optimizer(kind=kind))  # pyright: ignore[reportArgumentType]
    for _ in range(steps):
        step(weight, optimizer)
    return weight, optimizer


def step(weight: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    weight.square().mean().backward()
    optimizer.step()


def save(folder: Path, weight: torch.nn.Parameter, optimizer: torch.optim.Optimizer, state: TrainingState) -> None:
    sharding.save(folder, {"w": weight}, optimizer, state, World())


def state(step: int, monitor: DivergenceMonitor = DivergenceMonitor((1.5, 2.0), 1.0, 0.1)) -> TrainingState:  # noqa: B008
    return TrainingState(step, 0, 0.0, 0, None, 0, monitor)


def test_any_changed_byte_is_found_or_has_no_effect(tmp_path: Path) -> None:
    weight, optimizer = make_optimizer("adamw_8bit")
    save(tmp_path, weight, optimizer, state(3))
    (folder,) = tmp_path.iterdir()
    expected = checkpoint.read_newest(tmp_path, warn=print)
    assert expected is not None
    generator = random.Random(0)
    detected = 0
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        for _ in range(150):
            data, position = bytearray(good), generator.randrange(len(good))
            data[position] ^= generator.randrange(1, 256)
            path.write_bytes(data)
            warnings: list[str] = []
            try:
                saved = checkpoint.read_newest(tmp_path, warn=warnings.append)
            except CheckpointError:
                assert path.name in warnings[0] or path.name == "manifest.json"
                detected += 1
            else:
                assert path.name == "manifest.json"
                assert data.split() == good.split(), "only white space replaced by other white space goes unnoticed"
                assert saved is not None
                assert saved.state == expected.state
        path.write_bytes(good)
    assert detected > 550
    assert checkpoint.read_newest(tmp_path, warn=print) is not None


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_a_fresh_optimizer_gets_all_state_of_the_saved_one(kind: str, tmp_path: Path) -> None:
    weight, optimizer = make_optimizer(kind)
    save(tmp_path, weight, optimizer, state(3))
    other, fresh = make_optimizer(kind, steps=0)
    assert sharding.restore(tmp_path, {"w": other}, fresh, World(), warn=print) == state(3)
    ours, theirs = fresh.state[other], optimizer.state[weight]
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert type(ours[key]) is type(value), key
        if isinstance(value, torch.Tensor):
            assert (ours[key].dtype, ours[key].device) == (value.dtype, value.device)
            assert torch.equal(ours[key], value), key
        else:
            assert ours[key] == value, key
    step(weight, optimizer)
    step(other, fresh)
    assert torch.equal(weight, other)


def test_a_tensor_that_parameters_share_is_written_for_each(tmp_path: Path) -> None:
    parameters = {name: torch.nn.Parameter(torch.randn(96, 64)) for name in "ab"}
    optimizer = optimizers.build_optimizer(parameters.values(), Optimizer(kind="adamw_8bit"))
    sum(p.square().mean() for p in parameters.values()).backward()  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()
    sharding.save(tmp_path, parameters, optimizer, state(1), World())
    saved = checkpoint.read_newest(tmp_path, warn=print)
    assert saved is not None
    expected: Any = optimizer.state[parameters["a"]]["qmap1"]
    assert all(torch.equal(saved.optimizer_state[name]["qmap1"], expected) for name in "ab")  # pyright: ignore


@pytest.mark.parametrize("other", [torch.randn(96, 32), torch.randn(96, 64, dtype=torch.float64)])
def test_a_checkpoint_of_another_model_is_refused_before_anything_changes(other: Any, tmp_path: Path) -> None:
    weight, optimizer = make_optimizer("adamw")
    save(tmp_path, weight, optimizer, state(1))
    different = torch.nn.Parameter(other.clone())
    fresh = optimizers.build_optimizer([different], Optimizer())
    with pytest.raises(CheckpointError, match=r"in the checkpoint w is \[96, 64\] torch.float32, in the model"):
        sharding.restore(tmp_path, {"w": different}, fresh, World(), warn=print)
    with pytest.raises(CheckpointError, match=r"other parameters, e.g. v"):
        sharding.restore(tmp_path, {"v": weight}, optimizer, World(), warn=print)
    assert torch.equal(different, other)


def test_a_checkpoint_holds_only_the_adapter(stopped_at_7: Path) -> None:
    from safetensors import safe_open

    with safe_open(newest_checkpoint(stopped_at_7) / "adapter.safetensors", "pt") as file:
        assert all("lora_" in name for name in file.keys())  # noqa: SIM118  (safetensors' handle is no mapping)


def test_while_the_loss_is_above_its_bound_earlier_checkpoints_stay(tmp_path: Path) -> None:
    weight, optimizer = make_optimizer("adamw")
    monitor = DivergenceMonitor()
    for loss in [1.0] * 220:
        monitor = monitor.updated(loss, 1.0)
    for number in range(121, 130):
        monitor = monitor.updated(9.0 if number > 124 else 1.0, 1.0)
        save(tmp_path, weight, optimizer, state(number, monitor))
    assert kept_steps(tmp_path) == [123, 124, 125, 126, 127, 128, 129]
    save(tmp_path, weight, optimizer, state(130, monitor.updated(1.0, 1.0)))
    assert kept_steps(tmp_path) == [129, 130]


def test_a_limit_on_file_sizes_stops_with_advice_and_older_checkpoints_stay(tmp_path: Path) -> None:
    weight, optimizer = make_optimizer("adamw")
    save(tmp_path, weight, optimizer, state(4))
    message = "larger than this disk or user may write"
    with file_size_limit(9000), pytest.raises(StorageError, match=message) as full:
        save(tmp_path, weight, optimizer, state(6))
    assert str(full.value.hint).endswith("then run the same command again: it resumes from step 4")
    assert kept_steps(tmp_path) == [4]


def test_a_checkpoint_larger_than_the_free_space_is_refused_with_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, optimizer = make_optimizer("adamw")
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=100_000))
    with pytest.raises(StorageError, match=r"the disk is full: .* free, .* needed") as full:
        save(tmp_path, weight, optimizer, state(6))
    assert str(full.value.hint).endswith("then run the same command again: it resumes from the start of this stage")
    assert list(tmp_path.iterdir()) == []
