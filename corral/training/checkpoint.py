"""Checkpoints: adapter, optimizer state and position, written whole or not at all.

A checkpoint is a directory `step-N` with safetensors files, `state.json` and a manifest of sha256 sums. It is written
beside its final name, synced and renamed. Reading takes the newest one whose sums are right; what is damaged is passed
over, and said. Nothing is unpickled. This module does not know what the tensors mean.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corral.errors import CheckpointError
from corral.storage import new_directory, tree_hashes, write_json

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True, slots=True)
class State:
    """Where training stands after a step. Order of rows and random numbers follow from seed and step alone."""

    step: int
    tokens: int
    """Tokens computed so far."""
    seconds: float
    """Time spent in steps so far."""
    best_step: int
    best_loss: float | None
    worse: int
    """Evaluations in a row since then."""


def save(
    folder: Path, parameters: dict[str, nn.Parameter], optimizer: Optimizer, state: State, *, keep: int = 2
) -> None:
    """Write `folder/step-N` and drop all but the newest `keep`. Raises: StorageError (the old ones then still stand)."""
    from safetensors.torch import save_file

    with new_directory(folder / f"step-{state.step:06d}") as new:
        save_file({name: p.detach().contiguous() for name, p in parameters.items()}, new / "adapter.safetensors")
        save_file(_flatten(parameters, optimizer), new / "optimizer.safetensors")
        write_json(new / "state.json", {field: getattr(state, field) for field in State.__slots__})
        write_json(new / "manifest.json", tree_hashes(new))
    for old in _all(folder)[keep:]:
        shutil.rmtree(old)


def restore(
    folder: Path, parameters: dict[str, nn.Parameter], optimizer: Optimizer, *, warn: Callable[[str], None]
) -> State | None:
    """Load the newest good checkpoint into parameters and optimizer.

    Returns: its state, or None if there is no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints, and every one is damaged.
    """
    found = _all(folder)
    for path in found:
        fault = _fault(path)
        if fault is None:
            return _read(path, parameters, optimizer)
        warn(f"checkpoint {path.name} is damaged ({fault}); looking for an older one")
    if found:
        raise CheckpointError(
            f"all {len(found)} checkpoints are damaged",
            where=str(folder),
            hint="remove that folder to train this stage from its start",
        )
    return None


def _all(folder: Path) -> list[Path]:
    """Checkpoints, newest first."""
    return sorted(
        (p for p in folder.glob("step-*") if _NAME.fullmatch(p.name)), key=lambda p: int(p.name[5:]), reverse=True
    )


def _fault(path: Path) -> str | None:
    try:
        manifest: dict[str, str] = json.loads((path / "manifest.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        return f"manifest.json: {error}"
    hashes = tree_hashes(path)
    for name, expected in manifest.items():
        if name not in hashes:
            return f"{name} is missing"
        if hashes[name] != expected:
            return f"{name} has sha256 {hashes[name][:12]}…, not {expected[:12]}…"
    return None


def _flatten(parameters: dict[str, nn.Parameter], optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}|{key}": value.detach().contiguous()
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }


def _read(path: Path, parameters: dict[str, nn.Parameter], optimizer: Optimizer) -> State:
    import torch
    from safetensors.torch import load_file

    weights = load_file(path / "adapter.safetensors")
    if weights.keys() != parameters.keys():
        different = sorted(weights.keys() ^ parameters.keys())
        raise CheckpointError(f"the checkpoint has other parameters, e.g. {different[0]}", where=str(path))
    moments = load_file(path / "optimizer.safetensors")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
            state: dict[str, Any] = optimizer.state[parameter]
            for key, value in moments.items():
                owner, _, kind = key.rpartition("|")
                if owner == name:
                    state[kind] = value.to(parameter.device)
    return State(**json.loads((path / "state.json").read_text("utf-8")))
