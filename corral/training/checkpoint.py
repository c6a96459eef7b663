"""Checkpoint files: trained weights, optimizer state and position in the training, written atomically.

A checkpoint is a directory `step-N` with two safetensors files, `state.json` and a manifest of sha256 sums. It is written
under a temporary name, synced and renamed. Reading takes the newest checkpoint whose sums are right; a damaged one is
reported and skipped. Nothing is unpickled.

Whatever tensors, numbers and flags an optimizer holds for a parameter are written, and copied back into the buffers that
the optimizer allocates itself: the module does not know any optimizer's state.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from corral.errors import CheckpointError, StorageError
from corral.storage import new_directory, remove_tree, sha256_file, write_json
from corral.training.divergence import DivergenceMonitor

_NAME = re.compile(r"step-(\d+)")
_DAMAGED_PREFIX = "damaged-"
_WEIGHTS, _OPTIMIZER, _STATE = _FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json")
_KEPT_CHECKPOINTS = 2
_OVERHEAD_BYTES = 2**16  # small files and headers


@dataclass(frozen=True, slots=True)
class TrainingState:
    """Where training stands after a step. The order of rows and all random numbers follow from seed and step alone.

    The fields' names are the keys of `state.json`.
    """

    step: int
    tokens: int
    """Tokens computed so far."""
    seconds: float
    """Time spent in steps so far."""
    best_step: int
    best_loss: float | None
    worse: int
    """Evaluations in a row without a lower held-out loss."""
    watch: DivergenceMonitor = field(default_factory=DivergenceMonitor)
    scale: float = 1.0
    """Loss scale of a float16 model."""
    steps_at_scale: int = 0
    evaluated: bool = True
    """False if the evaluation after this step stopped the stage; it is repeated when the stage goes on."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Content of a checkpoint. Tensors that were read from files are on the CPU."""

    weights: Mapping[str, Tensor]
    """By the parameter's name."""
    optimizer_state: Mapping[str, Mapping[str, Tensor | int | float | bool | None]]
    """By the parameter's name, then by the optimizer's own key."""
    state: TrainingState


class _DamagedError(Exception):
    """Why a checkpoint cannot be used."""


def write(folder: Path, checkpoint: Checkpoint) -> None:
    """Write `folder/step-N` and remove older ones.

    The newest two stay, and as many more as there are steps for which the loss has been above its bound, so that two from
    before a divergence remain when training stops for it.

    Raises:
        StorageError: the disk is full or the folder cannot be written; older checkpoints are untouched.
    """
    step = checkpoint.state.step
    weights = {name: weight.contiguous() for name, weight in checkpoint.weights.items()}
    tensors, scalars = _flatten(checkpoint.optimizer_state)
    needed = sum(t.nbytes for t in (*weights.values(), *tensors.values())) + _OVERHEAD_BYTES
    try:
        with new_directory(folder / f"step-{step:06d}", needed=needed) as new:
            save_file(weights, new / _WEIGHTS)
            save_file(tensors, new / _OPTIMIZER, metadata=scalars)
            write_json(new / _STATE, asdict(checkpoint.state))
            write_json(new / "manifest.json", {name: sha256_file(new / name) for name in _FILES})
    except StorageError as error:
        older = [path for path in _newest_first(folder) if _step(path) < step]
        resume_point = f"step {_step(older[0])}" if older else "the start of this stage"
        error.hint = f"{error.hint}; then run the same command again: it resumes from {resume_point}"
        raise
    keep = _KEPT_CHECKPOINTS + checkpoint.state.watch.steps_above_bound
    for path in [*_newest_first(folder)[keep:], *folder.glob(f"{_DAMAGED_PREFIX}*")]:
        with suppress(StorageError):
            remove_tree(path)


def read_newest(folder: Path, *, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest intact checkpoint, or None if the folder has no checkpoint.

    Directories that a killed process left unfinished are removed. Damaged checkpoints that are newer are renamed to
    `damaged-step-N` until the next one is written, so that they do not count among those that are kept.

    Args:
        warn: called with a message for each damaged checkpoint.

    Raises:
        CheckpointError: every checkpoint is damaged.
    """
    for unfinished in folder.glob(".corral-*-step-*"):
        with suppress(StorageError):
            remove_tree(unfinished)
    damaged: list[Path] = []
    for path in _newest_first(folder):
        try:
            checkpoint = _read(path)
        except _DamagedError as reason:
            warn(f"checkpoint {path.name} is damaged ({reason}); looking for an older one")
            damaged.append(path)
            continue
        for each in damaged:
            with suppress(OSError, StorageError):
                remove_tree(each.with_name(_DAMAGED_PREFIX + each.name))
                each.rename(each.with_name(_DAMAGED_PREFIX + each.name))
        return checkpoint
    if damaged:
        raise CheckpointError(
            f"all {len(damaged)} checkpoints are damaged",
            where=str(folder),
            hint="restore a copy of one, or remove that folder to train this stage from its start",
        )
    return None


def load_into(
    parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, checkpoint: Checkpoint, folder: Path
) -> None:
    """Copy a checkpoint of `folder` into parameters and optimizer.

    Raises:
        CheckpointError: it belongs to another model; nothing is changed then.
    """
    _check_parameters(checkpoint, parameters, folder / f"step-{checkpoint.state.step:06d}")
    names = {parameter: name for name, parameter in parameters.items()}
    # bitsandbytes allocates a parameter's buffers at its first step, paged ones in memory that GPU and host share, which
    # no `.to(device)` gives. So it is asked to allocate them now, and they are filled.
    init_state: Callable[..., None] | None = getattr(optimizer, "init_state", None)
    with torch.no_grad():
        for group_index, group in enumerate(optimizer.param_groups):
            for index, parameter in enumerate(group["params"]):
                name = names[parameter]
                parameter.copy_(checkpoint.weights[name])
                values = checkpoint.optimizer_state.get(name, {})
                state: dict[str, Any] = optimizer.state[parameter]
                if values and init_state is not None:
                    init_state(group, parameter, group_index, index)
                    if parameter.is_cuda:
                        torch.cuda.synchronize(parameter.device)  # paged buffers are zeroed asynchronously
                for key, value in values.items():
                    state[key] = _fill(state.get(key), value, _state_device(key, group, parameter))


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _newest_first(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("step-*") if _NAME.fullmatch(p.name)), key=_step, reverse=True)


def _read(path: Path) -> Checkpoint:
    try:
        for name, expected in _read_manifest(path).items():
            digest = sha256_file(path / name)
            if digest != expected:
                raise _DamagedError(f"{name} has sha256 {digest[:12]}…, not {expected[:12]}…")
        state = _read_state(path / _STATE)
        with safe_open(path / _OPTIMIZER, "pt") as file:
            scalars: dict[str, str] = file.metadata() or {}
        return Checkpoint(load_file(path / _WEIGHTS), _unflatten(load_file(path / _OPTIMIZER), scalars), state)
    except FileNotFoundError as error:
        raise _DamagedError(f"{Path(str(error.filename)).name} is missing") from error
    except OSError as error:
        name = Path(str(error.filename or path)).name
        raise _DamagedError(f"{name} cannot be read: {error.strerror or error}") from error


def _read_state(path: Path) -> TrainingState:
    values: dict[str, Any] = json.loads(path.read_text("utf-8"))
    try:
        monitor: dict[str, Any] = values.pop("watch")
        return TrainingState(**values, watch=DivergenceMonitor(tuple(monitor.pop("recent")), **monitor))
    except (TypeError, KeyError) as error:
        raise _DamagedError(f"{path.name} was written by another version of corral") from error


def _read_manifest(path: Path) -> dict[str, str]:
    try:
        manifest: Any = json.loads((path / "manifest.json").read_text("utf-8"))
    except ValueError as error:
        raise _DamagedError(f"manifest.json: {error}") from error
    # With a manifest that names fewer files, some would go unchecked.
    if not isinstance(manifest, dict) or sorted(map(str, manifest)) != sorted(_FILES):  # pyright: ignore[reportUnknownArgumentType]
        raise _DamagedError("manifest.json does not name the files of a checkpoint")
    return {name: str(manifest[name]) for name in _FILES}


def _flatten(optimizer_state: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, other values as JSON), both by `parameter|key`."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, str] = {}
    storages: set[int] = set()
    for name, values in optimizer_state.items():
        for key, value in values.items():
            if not isinstance(value, torch.Tensor):
                scalars[f"{name}|{key}"] = json.dumps(value)
                continue
            tensor = value.detach().contiguous()
            # bitsandbytes shares one quantisation map between all parameters, and safetensors refuses shared memory.
            storage = tensor.untyped_storage().data_ptr()
            tensors[f"{name}|{key}"] = tensor.clone() if storage in storages else tensor
            storages.add(storage)
    return tensors, scalars


def _unflatten(tensors: Mapping[str, Tensor], scalars: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    optimizer_state: dict[str, dict[str, Any]] = {}
    for full_key, value in {**tensors, **{key: json.loads(text) for key, text in scalars.items()}}.items():
        name, _, key = full_key.rpartition("|")
        optimizer_state.setdefault(name, {})[key] = value
    return optimizer_state


def _check_parameters(checkpoint: Checkpoint, parameters: Mapping[str, nn.Parameter], path: Path) -> None:
    """Raises CheckpointError if names, shapes or dtypes differ."""
    hint = "remove that folder to train this stage from its start"
    if different := sorted(checkpoint.weights.keys() ^ parameters.keys()):
        raise CheckpointError(f"the checkpoint has other parameters, e.g. {different[0]}", where=str(path), hint=hint)
    for name, parameter in parameters.items():
        weight = checkpoint.weights[name]
        if (weight.shape, weight.dtype) != (parameter.shape, parameter.dtype):
            message = f"in the checkpoint {name} is {list(weight.shape)} {weight.dtype}"
            message += f", in the model {list(parameter.shape)} {parameter.dtype}"
            raise CheckpointError(message, where=str(path), hint=hint)


def _fill(buffer: Any, value: Any, device: Any) -> Any:
    """The optimizer's buffer with the value copied in; without a fitting buffer the value, on the device."""
    if not isinstance(value, torch.Tensor):
        return value
    if isinstance(buffer, torch.Tensor) and (buffer.shape, buffer.dtype) == (value.shape, value.dtype):
        return buffer.copy_(value)
    return value.to(device)


def _state_device(key: str, group: Mapping[str, Any], parameter: Tensor) -> Any:
    """Where torch's optimizers keep a tensor: the step count on the host unless the kernel itself reads it."""
    on_host = key == "step" and not (group.get("fused") or group.get("capturable"))
    return "cpu" if on_host else parameter.device
