"""Checkpoints: trained weights, optimizer state and position, written whole or not at all.

A checkpoint is a directory `step-N` with two safetensors files, `state.json` and a manifest of sha256 sums. It is written
beside its final name, synced and renamed. Reading takes the newest one whose sums are right; what is damaged is passed
over, and said. Nothing is unpickled.

This module does not know what the tensors mean, nor which optimizer keeps what: whatever tensors, numbers and flags an
optimizer holds for a parameter are written, and put back into the buffers that it makes for itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corral.errors import CheckpointError, StorageError
from corral.storage import new_directory, remove_tree, sha256_file, write_json
from corral.training.divergence import Watch

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

_NAME = re.compile(r"step-(\d+)")
_DAMAGED = "damaged-"
_FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json")
_KEPT = 2
_ROOM = 2**16  # bytes for the small files and the headers


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
    watch: Watch = field(default_factory=Watch)
    """What the losses so far say about the next ones."""
    scale: float = 1.0
    """What the loss is multiplied by, so that the gradients of a float16 model do not vanish."""
    steps_at_scale: int = 0


@dataclass(frozen=True, slots=True)
class Saved:
    """What a checkpoint holds. The tensors of one that was read are on the CPU."""

    weights: Mapping[str, Tensor]
    """By the parameter's name."""
    moments: Mapping[str, Mapping[str, Tensor | int | float | bool | None]]
    """What the optimizer keeps, by the parameter's name and its own name for it."""
    state: State


class _Damaged(Exception):
    """Why a checkpoint cannot be used."""


def save(folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, state: State) -> None:
    """Write `folder/step-N` and drop all but the newest two, and those that the loss gives reason to doubt.

    Raises:
        StorageError: the disk is full, or the place cannot be written; the older ones then still stand.
    """
    weights = {name: parameter.detach() for name, parameter in parameters.items()}
    moments = {name: dict(optimizer.state[parameter]) for name, parameter in parameters.items()}
    write(folder, Saved(weights, moments, state))


def restore(
    folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, *, warn: Callable[[str], None]
) -> State | None:
    """Load the newest good checkpoint into parameters and optimizer.

    Args:
        warn: told of each damaged one that is newer.

    Returns: its state, or None if there is no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints, and every one is damaged; or the newest good one is of another model.
    """
    saved = read(folder, warn=warn)
    if saved is None:
        return None
    put(saved, parameters, optimizer, folder)
    return saved.state


def put(saved: Saved, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, folder: Path) -> None:
    """What `restore` does with a checkpoint of `folder` that was read. Raises: CheckpointError (it is of another model)."""
    _refuse_others(saved, parameters, folder / f"step-{saved.state.step:06d}")
    _put(saved, parameters, optimizer)


def write(folder: Path, saved: Saved) -> None:
    """What `save` does, of tensors that the caller has gathered."""
    from safetensors.torch import save_file

    step = saved.state.step
    weights = {name: weight.contiguous() for name, weight in saved.weights.items()}
    tensors, rest = _flatten(saved.moments)
    needed = sum(t.nbytes for t in (*weights.values(), *tensors.values())) + _ROOM
    try:
        with new_directory(folder / f"step-{step:06d}", needed=needed) as new:
            save_file(weights, new / _FILES[0])
            save_file(tensors, new / _FILES[1], metadata=rest)
            write_json(new / _FILES[2], asdict(saved.state))
            write_json(new / "manifest.json", {name: sha256_file(new / name) for name in _FILES})
    except StorageError as error:
        before = next((f"step {_step(p)}" for p in _all(folder) if _step(p) < step), "the start of this stage")
        error.hint = f"{error.hint}; then give the same command again: it goes on from {before}"
        raise
    # Two from before the loss began to explode must stand when training stops for it.
    keep = _KEPT + saved.state.watch.above
    for old in [*_all(folder)[keep:], *folder.glob(f"{_DAMAGED}*")]:
        with suppress(StorageError):
            remove_tree(old)


def read(folder: Path, *, warn: Callable[[str], None]) -> Saved | None:
    """The newest good checkpoint, or None if there is none at all; for `warn` and errors see `restore`.

    What a killed writer left half done is removed. Newer checkpoints that are damaged are set aside as `damaged-step-N`
    until the next one is written, so that they never count among those that are kept.
    """
    for left in folder.glob(".corral-*-step-*"):
        with suppress(StorageError):
            remove_tree(left)
    damaged: list[Path] = []
    for path in _all(folder):
        try:
            saved = _load(path)
        except _Damaged as fault:
            warn(f"checkpoint {path.name} is damaged ({fault}); looking for an older one")
            damaged.append(path)
            continue
        for each in damaged:
            with suppress(OSError, StorageError):
                remove_tree(each.with_name(_DAMAGED + each.name))
                each.rename(each.with_name(_DAMAGED + each.name))
        return saved
    if damaged:
        raise CheckpointError(
            f"all {len(damaged)} checkpoints are damaged",
            where=str(folder),
            hint="put back a copy of one, or remove that folder to train this stage from its start",
        )
    return None


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _all(folder: Path) -> list[Path]:
    """Checkpoints, newest first."""
    return sorted((p for p in folder.glob("step-*") if _NAME.fullmatch(p.name)), key=_step, reverse=True)


def _load(path: Path) -> Saved:
    from safetensors import safe_open
    from safetensors.torch import load_file

    try:
        for name, expected in _manifest(path).items():
            found = sha256_file(path / name)
            if found != expected:
                raise _Damaged(f"{name} has sha256 {found[:12]}…, not {expected[:12]}…")
        state = _state(path / _FILES[2])
        with safe_open(path / _FILES[1], "pt") as file:
            rest: dict[str, str] = file.metadata() or {}
        return Saved(load_file(path / _FILES[0]), _unflatten(load_file(path / _FILES[1]), rest), state)
    except FileNotFoundError as error:
        raise _Damaged(f"{Path(str(error.filename)).name} is missing") from error
    except OSError as error:
        name = Path(str(error.filename or path)).name
        raise _Damaged(f"{name} cannot be read: {error.strerror or error}") from error


def _state(path: Path) -> State:
    values: dict[str, Any] = json.loads(path.read_text("utf-8"))
    try:
        watch: dict[str, Any] = values.pop("watch")
        return State(**values, watch=Watch(tuple(watch.pop("recent")), **watch))
    except (TypeError, KeyError) as error:
        raise _Damaged(f"{path.name} is of another version of corral") from error


def _manifest(path: Path) -> dict[str, str]:
    try:
        manifest: Any = json.loads((path / "manifest.json").read_text("utf-8"))
    except ValueError as error:
        raise _Damaged(f"manifest.json: {error}") from error
    # A manifest that names too little would vouch for files that nobody looked at.
    if not isinstance(manifest, dict) or sorted(map(str, manifest)) != sorted(_FILES):  # pyright: ignore[reportUnknownArgumentType]
        raise _Damaged("manifest.json does not name the files of a checkpoint")
    return {name: str(manifest[name]) for name in _FILES}


def _flatten(moments: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, everything else as JSON), both by `parameter|key`."""
    import torch

    tensors: dict[str, Tensor] = {}
    rest: dict[str, str] = {}
    seen: set[int] = set()
    for name, state in moments.items():
        for key, value in state.items():
            if not isinstance(value, torch.Tensor):
                rest[f"{name}|{key}"] = json.dumps(value)
                continue
            tensor = value.detach().contiguous()
            # bitsandbytes gives one quantisation map to all parameters, and safetensors refuses shared memory.
            place = tensor.untyped_storage().data_ptr()
            tensors[f"{name}|{key}"] = tensor.clone() if place in seen else tensor
            seen.add(place)
    return tensors, rest


def _unflatten(tensors: Mapping[str, Tensor], rest: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    moments: dict[str, dict[str, Any]] = {}
    for full, value in {**tensors, **{full: json.loads(text) for full, text in rest.items()}}.items():
        name, _, key = full.rpartition("|")
        moments.setdefault(name, {})[key] = value
    return moments


def _refuse_others(saved: Saved, parameters: Mapping[str, nn.Parameter], path: Path) -> None:
    """Raises CheckpointError before anything is changed."""
    hint = "remove that folder to train this stage from its start"
    if different := sorted(saved.weights.keys() ^ parameters.keys()):
        raise CheckpointError(f"the checkpoint has other parameters, e.g. {different[0]}", where=str(path), hint=hint)
    for name, parameter in parameters.items():
        weight = saved.weights[name]
        if (weight.shape, weight.dtype) != (parameter.shape, parameter.dtype):
            what = f"in the checkpoint {name} is {list(weight.shape)} {weight.dtype}"
            what += f", in the model {list(parameter.shape)} {parameter.dtype}"
            raise CheckpointError(what, where=str(path), hint=hint)


def _put(saved: Saved, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> None:
    import torch

    names = {parameter: name for name, parameter in parameters.items()}
    # bitsandbytes makes a parameter's buffers at its first step, where they belong: paged ones in memory that GPU and
    # host share, which no `.to(device)` gives. So it is asked for them now, and they are filled.
    make: Callable[..., None] | None = getattr(optimizer, "init_state", None)
    with torch.no_grad():
        for number, group in enumerate(optimizer.param_groups):
            for place, parameter in enumerate(group["params"]):
                name = names[parameter]
                parameter.copy_(saved.weights[name])
                moments = saved.moments.get(name, {})
                state: dict[str, Any] = optimizer.state[parameter]
                if moments and make is not None:
                    make(group, parameter, number, place)
                    if parameter.is_cuda:
                        torch.cuda.synchronize(parameter.device)  # paged buffers are filled with 0 behind our back
                for key, value in moments.items():
                    state[key] = _placed(value, state.get(key), _device(key, group, parameter))


def _placed(value: Any, buffer: Any, device: Any) -> Any:
    import torch

    if not isinstance(value, torch.Tensor):
        return value
    if isinstance(buffer, torch.Tensor) and (buffer.shape, buffer.dtype) == (value.shape, value.dtype):
        return buffer.copy_(value)
    return value.to(device)


def _device(key: str, group: Mapping[str, Any], parameter: Tensor) -> Any:
    """Where torch's optimizers keep a tensor: the count of steps on the host unless the kernel itself reads it."""
    on_host = key == "step" and not (group.get("fused") or group.get("capturable"))
    return "cpu" if on_host else parameter.device
