"""A checkpoint is whole or it is not there; a damaged one is passed over; nothing is lost when the disk fills."""

from __future__ import annotations

import os
import random
import resource
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
from tests.conftest import unprivileged


def newest(folder: Path) -> Path:
    return sorted((folder / "checkpoints").glob("step-*"))[-1]


def stop_at(training: Any, step: int) -> None:
    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        training.run(on_step=lambda m: seen.append(m.step), should_stop=lambda: seen[-1] >= step)


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
    "manifest that vouches for nothing": (lambda p: (p / "manifest.json").write_text("{}"), "manifest.json does not"),
    "manifest missing": (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    "empty": (empty, "manifest.json is missing"),
    "a file in its place": (
        lambda p: (p.rename(p.with_name("x")), p.write_text("")),
        "manifest.json cannot be read: Not",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_said_and_an_older_one_taken(
    name: str, training: Callable[..., Any], tmp_path: Path
) -> None:
    damage, said = DAMAGE[name]
    stop_at(training(tmp_path), 7)
    damage(newest(tmp_path))
    told: list[str] = []
    seen: list[int] = []
    training(tmp_path).run(on_step=lambda m: seen.append(m.step), warn=told.append)
    assert "step-000007 is damaged" in told[0]
    assert said in told[0]
    assert seen == list(range(7, 13))
    kept = sorted(p.name for p in (tmp_path / "checkpoints").glob("[!x]*"))
    assert kept == ["step-000009", "step-000012"], "a damaged one is not among those that are kept"


def test_a_checkpoint_that_may_not_be_read_is_passed_over(tmp_path: Path) -> None:
    weight, optimizer = made("adamw")
    for step in (1, 2):
        sharding.save(tmp_path, {"w": weight}, optimizer, state(step), World())
    (tmp_path / "step-000002" / "optimizer.safetensors").chmod(0)
    told: list[str] = []
    with unprivileged(tmp_path):
        found = sharding.restore(tmp_path, {"w": weight}, optimizer, World(), warn=told.append)
    assert found is not None
    assert found.step == 1
    assert "optimizer.safetensors cannot be read: Permission denied" in told[0]


def test_files_that_are_too_many_harm_nothing(training: Callable[..., Any], tmp_path: Path) -> None:
    stop_at(training(tmp_path), 7)
    (newest(tmp_path) / "notes.txt").write_text("mine")
    (tmp_path / "checkpoints" / "step-9").mkdir()
    (tmp_path / "checkpoints" / "step-best").mkdir()
    (tmp_path / "checkpoints" / ".corral-tmp-step-000008.abcdefgh").mkdir()
    seen: list[int] = []
    training(tmp_path).run(on_step=lambda m: seen.append(m.step))
    assert seen == list(range(8, 13))
    names = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step-000009", "step-000012", "step-best"}


def test_when_all_are_damaged_it_says_so_and_touches_nothing(training: Callable[..., Any], tmp_path: Path) -> None:
    stop_at(training(tmp_path), 7)
    for path in (tmp_path / "checkpoints").glob("step-*"):
        (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="all 2 checkpoints are damaged"):
        training(tmp_path).run()
    assert len(list((tmp_path / "checkpoints").glob("step-*"))) == 2


def made(kind: str, steps: int = 3) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
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


def state(number: int) -> TrainingState:
    return TrainingState(number, 0, 0.0, 0, None, 0, DivergenceMonitor((1.5, 2.0), 1.0, 0.1))


def test_any_changed_byte_is_found_or_makes_no_difference(tmp_path: Path) -> None:
    weight, optimizer = made("adamw_8bit")
    sharding.save(tmp_path, {"w": weight}, optimizer, state(3), World())
    (folder,) = tmp_path.iterdir()
    expected = checkpoint.read_newest(tmp_path, warn=print)
    assert expected is not None
    generator = random.Random(0)
    found = 0
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        for _ in range(150):
            data, place = bytearray(good), generator.randrange(len(good))
            data[place] ^= generator.randrange(1, 256)
            path.write_bytes(data)
            told: list[str] = []
            try:
                saved = checkpoint.read_newest(tmp_path, warn=told.append)
            except CheckpointError:
                assert path.name in told[0] or path.name == "manifest.json"
                found += 1
            else:
                assert path.name == "manifest.json"
                assert data.split() == good.split(), "only one kind of white space for another goes unseen"
                assert saved is not None
                assert saved.state == expected.state
        path.write_bytes(good)
    assert found > 550
    assert checkpoint.read_newest(tmp_path, warn=print) is not None


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_a_fresh_optimizer_is_given_all_that_the_saved_one_held(kind: str, tmp_path: Path) -> None:
    weight, optimizer = made(kind)
    sharding.save(tmp_path, {"w": weight}, optimizer, state(3), World())
    other, fresh = made(kind, steps=0)
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


def test_what_several_parameters_share_is_written_for_each(tmp_path: Path) -> None:
    parameters = {name: torch.nn.Parameter(torch.randn(96, 64)) for name in "ab"}
    optimizer = optimizers.build_optimizer(parameters.values(), Optimizer(kind="adamw_8bit"))
    sum(p.square().mean() for p in parameters.values()).backward()  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()
    sharding.save(tmp_path, parameters, optimizer, state(1), World())
    saved = checkpoint.read_newest(tmp_path, warn=print)
    assert saved is not None
    assert all(
        torch.equal(saved.optimizer_state[name]["qmap1"], optimizer.state[parameters["a"]]["qmap1"]) for name in "ab"
    )  # pyright: ignore


@pytest.mark.parametrize("other", [torch.randn(96, 32), torch.randn(96, 64, dtype=torch.float64)])
def test_a_checkpoint_of_another_model_is_refused_before_anything_changes(other: Any, tmp_path: Path) -> None:
    weight, optimizer = made("adamw")
    sharding.save(tmp_path, {"w": weight}, optimizer, state(1), World())
    different = torch.nn.Parameter(other.clone())
    fresh = optimizers.build_optimizer([different], Optimizer())
    with pytest.raises(CheckpointError, match=r"in the checkpoint w is \[96, 64\] torch.float32, in the model"):
        sharding.restore(tmp_path, {"w": different}, fresh, World(), warn=print)
    with pytest.raises(CheckpointError, match=r"other parameters, e.g. v"):
        sharding.restore(tmp_path, {"v": weight}, optimizer, World(), warn=print)
    assert torch.equal(different, other)


def test_only_the_adapter_is_in_a_checkpoint(training: Callable[..., Any], tmp_path: Path) -> None:
    from safetensors import safe_open

    stop_at(training(tmp_path), 3)
    with safe_open(newest(tmp_path) / "adapter.safetensors", "pt") as file:
        assert all("lora_" in name for name in file.keys())  # noqa: SIM118  (safetensors' handle is no mapping)


def test_while_the_loss_is_in_doubt_checkpoints_from_before_stay(tmp_path: Path) -> None:
    weight, optimizer = made("adamw")
    watch = DivergenceMonitor()
    for loss in [1.0] * 220:
        watch = watch.updated(loss, 1.0)
    for number in range(121, 130):
        watch = watch.updated(9.0 if number > 124 else 1.0, 1.0)
        sharding.save(tmp_path, {"w": weight}, optimizer, TrainingState(number, 0, 0.0, 0, None, 0, watch), World())
    assert sorted(int(p.name[5:]) for p in tmp_path.iterdir()) == [123, 124, 125, 126, 127, 128, 129]
    sharding.save(
        tmp_path, {"w": weight}, optimizer, TrainingState(130, 0, 0.0, 0, None, 0, watch.updated(1.0, 1.0)), World()
    )
    assert sorted(int(p.name[5:]) for p in tmp_path.iterdir()) == [129, 130]


def test_a_limit_on_files_stops_with_what_to_do_and_older_checkpoints_stand(tmp_path: Path) -> None:
    weight, optimizer = made("adamw")
    sharding.save(tmp_path, {"w": weight}, optimizer, state(4), World())
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, hard))
    try:
        with pytest.raises(StorageError, match="larger than this disk or user may write") as full:
            sharding.save(tmp_path, {"w": weight}, optimizer, state(6), World())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
    assert str(full.value.hint).endswith("then run the same command again: it resumes from step 4")
    assert [p.name for p in tmp_path.iterdir()] == ["step-000004"]


def test_a_disk_without_room_for_a_checkpoint_is_refused_with_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, optimizer = made("adamw")
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=100_000))
    with pytest.raises(StorageError, match=r"the disk is full: .* free, .* needed") as full:
        sharding.save(tmp_path, {"w": weight}, optimizer, state(6), World())
    assert str(full.value.hint).endswith("then run the same command again: it resumes from the start of this stage")
    assert list(tmp_path.iterdir()) == []
