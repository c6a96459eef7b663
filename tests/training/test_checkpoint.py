"""A checkpoint is whole or it is not there; a damaged one is passed over; nothing is lost when the disk fills."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from corral.errors import CheckpointError


def newest(folder: Path) -> Path:
    return sorted((folder / "checkpoints").glob("step-*"))[-1]


def stop_at(training: Any, step: int) -> None:
    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        training.run(on_step=lambda m: seen.append(m.step), should_stop=lambda: seen[-1] >= step)


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: (p / "adapter.safetensors").write_bytes((p / "adapter.safetensors").read_bytes()[:-10]),
        lambda p: (p / "optimizer.safetensors").unlink(),
        lambda p: flip(p / "adapter.safetensors"),
        lambda p: (p / "manifest.json").write_text("{"),
        lambda p: flip(p / "state.json"),
    ],
    ids=["cut short", "file missing", "bit flipped", "manifest broken", "state changed"],
)
def test_a_damaged_checkpoint_is_said_and_an_older_one_taken(
    damage: Callable[[Path], Any], training: Callable[..., Any], tmp_path: Path
) -> None:
    stop_at(training(tmp_path), 7)
    damage(newest(tmp_path))
    told: list[str] = []
    seen: list[int] = []
    training(tmp_path).run(on_step=lambda m: seen.append(m.step), warn=told.append)
    assert "step-000007 is damaged" in told[0]
    assert seen == list(range(7, 13))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_when_all_are_damaged_it_says_so_and_touches_nothing(training: Callable[..., Any], tmp_path: Path) -> None:
    stop_at(training(tmp_path), 7)
    for path in (tmp_path / "checkpoints").glob("step-*"):
        (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="all 2 checkpoints are damaged"):
        training(tmp_path).run()
    assert len(list((tmp_path / "checkpoints").glob("step-*"))) == 2


def test_only_the_adapter_is_in_a_checkpoint(training: Callable[..., Any], tmp_path: Path) -> None:
    from safetensors import safe_open

    stop_at(training(tmp_path), 3)
    with safe_open(newest(tmp_path) / "adapter.safetensors", "pt") as file:
        assert all("lora_" in name for name in file.keys())  # noqa: SIM118  (safetensors' handle is no mapping)
