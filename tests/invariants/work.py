"""Trainings and runs in processes that are stopped or killed at a given call, and a comparison of what they leave.

A process kills itself (`kill -9`) just before a named call, so that no test depends on timing; until then nothing is
changed.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import signal
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors.torch import load_file

from corral.evaluation.row_file import RowFile
from corral.recipe import Train
from corral.storage import new_directory
from corral.training import checkpoint, step_metrics
from corral.training.loop import Trainer, TrainingResult
from tests import forked
from tests.training.tiny import load_trainable, make_trainer, newest_checkpoint, read_metrics, tiny_config


@dataclass(frozen=True)
class Case:
    """Settings of a training stage, of its optimizer and its adapter, as in a recipe."""

    train: Mapping[str, Any] = field(default_factory=dict[str, Any])
    optimizer: Mapping[str, Any] = field(default_factory=dict[str, Any])
    lora: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def config(self) -> Train:
        return tiny_config(self.train, self.optimizer, self.lora)


@dataclass(frozen=True)
class Job:
    """A case, and the file with its rows and the model's folder."""

    rows: Path
    case: Case = field(default_factory=Case)

    def trainer(self, folder: Path) -> Trainer:
        """The trainer as a stage sets it up, with its best weights in `folder/best`."""
        encoded, base = pickle.loads(self.rows.read_bytes())
        model = load_trainable(base, self.case.config)

        def save_best() -> None:
            with new_directory(folder / "best") as new:
                weights = {name: p.detach().contiguous() for name, p in trainer.parameters.items()}
                safetensors.torch.save_file(weights, new / "weights.safetensors")

        trainer = make_trainer(model, encoded, self.case.config, folder, save_best=save_best)
        return trainer

    def run(self, folder: Path, **run: Any) -> TrainingResult:
        return self.trainer(folder).run(**run)


def read_result(folder: Path) -> dict[str, Any]:
    """All that a training leaves, except times and memory: weights, moments, position, best weights, metrics."""
    last = newest_checkpoint(folder)
    state = json.loads((last / "state.json").read_text())
    del state["seconds"]
    with safetensors.safe_open(last / "optimizer.safetensors", "pt") as file:
        numbers = file.metadata()
    circumstances = ("tokens_per_second", "peak_memory_bytes", "seconds")
    return {
        "step": last.name,
        "state": state,
        "numbers": numbers,
        "weights": load_file(last / "adapter.safetensors"),
        "moments": load_file(last / "optimizer.safetensors"),
        "best": load_file(folder / "best" / "weights.safetensors"),
        "metrics": [{k: v for k, v in line.items() if k not in circumstances} for line in read_metrics(folder)],
    }


def assert_same(folder: Path, expected: Path) -> None:
    """Assert that two trainings left the same, bit for bit, and nothing half written."""
    ours, theirs = read_result(folder), read_result(expected)
    for part, value in theirs.items():
        if part in ("weights", "moments", "best"):
            assert ours[part].keys() == value.keys()
            different = [
                n for n in value if ours[part][n].dtype != value[n].dtype or not torch.equal(ours[part][n], value[n])
            ]
            assert not different, f"{part}: {different}"
        else:
            assert ours[part] == value, part
    assert not [p for p in folder.rglob("*") if p.name.startswith((".corral", "damaged-")) and p.is_dir()]


@dataclass(frozen=True)
class Instant:
    """Just before the `nth` call (from 1) of a function with `within` in one of its paths; the signal sent then."""

    call: str
    within: str = ""
    nth: int = 1
    signal: signal.Signals = signal.SIGKILL


def die_at(instant: Instant) -> None:
    """Send this process the signal at the instant. `kill -9` leaves half of what was about to be written."""
    owner, name = {
        "backward": (torch.Tensor, "backward"),
        "rename": (os, "rename"),
        "replace": (os, "replace"),
        "fsync": (os, "fsync"),
        "append": (step_metrics, "append"),
        "add": (RowFile, "add"),
        "save_file": (checkpoint, "save_file"),
    }[instant.call]
    original = getattr(owner, name)
    count = 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += instant.within in " ".join(map(str, args if instant.call in ("rename", "replace") else args[1:]))
        if count == instant.nth:
            count += 1
            if instant.signal != signal.SIGKILL:
                os.kill(os.getpid(), instant.signal)
                return original(*args, **kwargs)
            if instant.call in ("append", "add"):
                with (args[0] / step_metrics.FILE if instant.call == "append" else args[0].path).open("a") as file:
                    file.write('{"step": 1, "lo')
            if instant.call == "save_file":
                original(*args, **kwargs)
                os.truncate(args[1], os.path.getsize(args[1]) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, wrapper)


def _train(job: Job, folder: Path, instant: Instant | None) -> None:
    torch.set_num_threads(1)
    if instant is not None:
        die_at(instant)
    job.run(folder)


def _corral(arguments: list[str], instant: Instant | None, largest: int | None) -> None:
    from corral import cli

    torch.set_num_threads(1)
    if largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    if instant is not None:
        die_at(instant)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as errors:
        code = cli.main(arguments)
    if code:
        print(errors.getvalue())
    os._exit(code)


def train(job: Job, folder: Path, instant: Instant | None = None) -> Any:
    """Start a process that trains and is killed at the instant."""
    return forked.start(_train, job, folder, instant)


def corral(*arguments: object, instant: Instant | None = None, largest: int | None = None) -> Any:
    """Start a process that runs the command line and gets a signal at the instant.

    Args:
        largest: bytes it may write to one file.
    """
    return forked.start(_corral, [str(a) for a in arguments], instant, largest)


def killed(process: Any) -> bool:
    """Whether a process ended by `kill -9`; any other failure is an error."""
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode != 0
