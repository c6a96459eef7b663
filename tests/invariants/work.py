"""Trainings that are stopped and killed: what is trained, a process to do it in, and the instants at which it dies.

The instants are exact: the process kills itself (`kill -9`) at a named call, so that a test does not depend on luck. Nothing
of what it does before is changed. Processes are forked from one that has imported everything and done nothing yet.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import resource
import signal
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors.torch import load_file

from corral.evaluation.row_file import RowFile
from corral.model import adapters, loading
from corral.model.full_finetuning import train_all_weights
from corral.model.quantisation import Quantization
from corral.recipe import Lora, Optimizer, Train
from corral.storage import new_directory
from corral.training import step_metrics
from corral.training.loop import Outcome, Trainer
from corral.training.objectives import OBJECTIVES
from tests.training.tiny import make_examples

STEPS = 12


@dataclass(frozen=True)
class Case:
    """What is trained and how; `train` and `optimizer` as in a recipe."""

    train: Mapping[str, Any] = field(default_factory=dict[str, Any])
    optimizer: Mapping[str, Any] = field(default_factory=dict[str, Any])
    lora: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def config(self) -> Train:
        small = {"steps": STEPS, "batch_size": 4, "evaluate_every": 4, "checkpoint_every": 3}
        if "epochs" in self.train:
            del small["steps"]
        lora = {} if self.train.get("method") == "full" else {"lora": Lora(**{"rank": 4, "alpha": 8, **self.lora})}
        optimizer = Optimizer(**{"lr": 5e-3, "warmup_ratio": 0.1, **self.optimizer})
        return Train(**{**small, **lora, **self.train, "optimizer": optimizer})


@dataclass(frozen=True)
class Job:
    """A case, and the file with the rows and the model's folder."""

    rows: Path
    case: Case = field(default_factory=Case)

    def training(self, folder: Path) -> Trainer:
        """The training as a stage sets it up, with its best weights in `folder/best`."""
        encoded, base = pickle.loads(self.rows.read_bytes())
        config = self.case.config
        quantization = None
        if config.quantization != "none":
            quantization = Quantization(config.quantization, config.int8_threshold)
        model: Any = loading.load_model(base, dtype="float32", device="cpu", quantization=quantization)
        if config.method == "full":
            model = train_all_weights(model, torch.float32)
        else:
            model = adapters.attach(model, config.lora, seed=3)

        def save_best(_: int) -> None:
            with new_directory(folder / "best") as new:
                weights = {name: p.detach().contiguous() for name, p in training.parameters.items()}
                safetensors.torch.save_file(weights, new / "weights.safetensors")

        folder.mkdir(parents=True, exist_ok=True)
        examples = make_examples(encoded)
        training = Trainer(
            model,
            examples[4:],
            examples[:4],
            OBJECTIVES[config.objective],
            config,
            pack_length=512,
            seed=5,
            folder=folder,
            save_best=save_best,
        )
        return training

    def run(self, folder: Path, **run: Any) -> Outcome:
        return self.training(folder).run(**run)


def newest(folder: Path) -> Path:
    return sorted((folder / "checkpoints").glob("step-*"))[-1]


def left(folder: Path) -> dict[str, Any]:
    """All that a training leaves, but for times and memory: weights, moments, position, best weights, metrics."""
    last = newest(folder)
    state = json.loads((last / "state.json").read_text())
    del state["seconds"]
    with safetensors.safe_open(last / "optimizer.safetensors", "pt") as file:
        numbers = file.metadata()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "step": last.name,
        "state": state,
        "numbers": numbers,
        "weights": load_file(last / "adapter.safetensors"),
        "moments": load_file(last / "optimizer.safetensors"),
        "best": load_file(folder / "best" / "weights.safetensors"),
        "curve": [[line[key] for key in ("step", "loss", "eval_loss", "lr", "grad_norm", "tokens")] for line in lines],
    }


def assert_same(folder: Path, expected: Path) -> None:
    """That two trainings left the same, to the last bit, and nothing half done."""
    ours, theirs = left(folder), left(expected)
    for part, value in theirs.items():
        if part in ("weights", "moments", "best"):
            assert ours[part].keys() == value.keys()
            different = [
                n for n in value if ours[part][n].dtype != value[n].dtype or not torch.equal(ours[part][n], value[n])
            ]
            assert not different, f"{part}: {different}"
        else:
            assert ours[part] == value, part
    half_done = [path for path in folder.rglob("*") if path.name.startswith((".corral", "damaged-")) and path.is_dir()]
    assert not half_done


@dataclass(frozen=True)
class Instant:
    """Just before the `nth` call of something, counted from 1, that has `within` in a path it is given; and which signal the
    process then gets."""

    call: str
    within: str = ""
    nth: int = 1
    signal: signal.Signals = signal.SIGKILL


def die_at(instant: Instant) -> None:
    """Send this process its signal when the instant comes; by `kill -9` half of what was about to be written is left."""
    owner, name = {
        "backward": (torch.Tensor, "backward"),
        "rename": (os, "rename"),
        "replace": (os, "replace"),
        "fsync": (os, "fsync"),
        "append": (step_metrics, "append"),
        "add": (RowFile, "add"),
        "save_file": (safetensors.torch, "save_file"),
    }[instant.call]
    original = getattr(owner, name)
    count = 0

    def watched(*args: Any, **kwargs: Any) -> Any:
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

    setattr(owner, name, watched)


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


def _start(target: Callable[..., None], *arguments: Any) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.invariants.preload"])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def train(job: Job, folder: Path, instant: Instant | None = None) -> Any:
    """A process that trains, and dies at the instant."""
    return _start(_train, job, folder, instant)


def corral(*arguments: object, instant: Instant | None = None, largest: int | None = None) -> Any:
    """A process that is the command line, and gets a signal at the instant; `largest`: bytes it may write to one file."""
    return _start(_corral, [str(a) for a in arguments], instant, largest)


def killed(process: Any) -> bool:
    """Whether a process ended by `kill -9`; any other end but a good one is an error."""
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode != 0
