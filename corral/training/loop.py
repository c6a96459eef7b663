"""One short loop for every objective.

A step is `batch_size` examples, every unit (trained token, pair …) weighing the same. Its examples are packed into as few
forward passes as `pack_length` allows; how they are packed changes memory and speed, never the gradient (to rounding).
The order of examples and all random numbers follow from (seed, step), so a resumed run repeats an uninterrupted one.

The loop knows nothing about text, templates, recipes as files, or where its outputs are shown.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from corral.data.packing import packs
from corral.data.prepared import Example
from corral.errors import TrainingError
from corral.model.packed import target_logprobs
from corral.storage import storage_errors, write_atomic
from corral.training import checkpoint, optimizers
from corral.training.checkpoint import State
from corral.training.objectives import Objective

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

    from corral.recipe import Train


@dataclass(frozen=True, slots=True)
class Metrics:
    """One line of metrics.jsonl."""

    step: int
    loss: float | None
    """Mean over the step's units; null at step 0, which only evaluates."""
    eval_loss: float | None
    """Held-out loss after this step, where it was evaluated."""
    lr: float
    grad_norm: float | None
    """Before clipping."""
    tokens: int
    """Tokens computed so far, context included."""
    tokens_per_second: float
    """In this step, evaluation and checkpoints left out."""
    peak_memory_bytes: int
    seconds: float
    """Spent in steps so far."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a training stage ended."""

    steps: int
    best_step: int
    best_loss: float | None
    """Held-out loss of the adapter that was kept as best; None when nothing was held out."""
    tokens: int
    seconds: float


class Training:
    """One training stage over one model.

    Args:
        model: a PEFT model; its trainable parameters are trained.
        examples: what to train on.
        held_out: what to evaluate on while training; may be empty.
        objective: what to minimise.
        config: the stage's settings.
        pack_length: most tokens in one forward pass.
        folder: where `metrics.jsonl` and `checkpoints/` go; an interrupted stage's folder is taken up where it stopped.
        save_best: called with the step when the held-out loss is the lowest so far.
    """

    def __init__(
        self,
        model: PeftModel,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        objective: Objective,
        config: Train,
        *,
        pack_length: int,
        seed: int,
        folder: Path,
        save_best: Callable[[int], None],
    ) -> None:
        self.model, self.examples, self.held_out = model, examples, held_out
        self.objective, self.config = objective, config
        self.pack_length, self.seed, self.folder, self.save_best = pack_length, seed, folder, save_best
        self.total_steps = total_steps(config, len(examples))
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = optimizers.build(self.parameters.values(), config.optimizer)

    def run(
        self,
        *,
        on_step: Callable[[Metrics], None] = lambda _: None,
        should_stop: Callable[[], bool] = lambda: False,
        warn: Callable[[str], None] = lambda _: None,
    ) -> Outcome:
        """Train to the end, from the newest good checkpoint if there is one.

        Args:
            on_step: told of each step, and of the evaluation before the first.
            should_stop: asked after each step; if true, a checkpoint is written and KeyboardInterrupt raised.
            warn: told of damaged checkpoints.

        Raises:
            TrainingError: the loss or gradient is not a finite number; the rows of the batch are named.
            KeyboardInterrupt: stopped on request; the next run goes on from there.
            CheckpointError, StorageError: see `checkpoint`.
        """
        checkpoints = self.folder / "checkpoints"
        resumed = checkpoint.restore(checkpoints, self.parameters, self.optimizer, warn=warn)
        state = resumed or State(step=0, tokens=0, seconds=0.0, best_step=0, best_loss=None)
        self._truncate_metrics(state)
        if resumed is None:
            state = self._begin(state, on_step)
        while state.step < self.total_steps:
            state, metrics = self._step(state)
            last = state.step == self.total_steps
            if self.held_out and (last or state.step % self.config.evaluate_every == 0):
                metrics = replace(metrics, eval_loss=self.evaluate())
                state = self._keep_best(state, metrics.eval_loss)
            self._log(metrics)
            on_step(metrics)
            stop = not last and should_stop()
            if last or stop or state.step % self.config.checkpoint_every == 0:
                checkpoint.save(checkpoints, self.parameters, self.optimizer, state)
            if stop:
                raise KeyboardInterrupt
        return Outcome(state.step, state.best_step, state.best_loss, state.tokens, state.seconds)

    def evaluate(self) -> float:
        """Loss per unit on the held-out examples. Raises: TrainingError (it is not a finite number)."""
        self.model.eval()
        with torch.no_grad():
            total = sum(loss.item() for loss, _ in self._losses(list(self.held_out)))
        if not math.isfinite(total):
            raise TrainingError(
                f"the held-out loss is {total:g}",
                where=str(self.folder),
                hint="lower train.optimizer.lr; checkpoints before it are kept",
            )
        return total / sum(self.objective.units(e) for e in self.held_out)

    def _begin(self, state: State, on_step: Callable[[Metrics], None]) -> State:
        if not self.held_out:
            return state
        loss = self.evaluate()
        metrics = Metrics(0, None, loss, 0.0, None, 0, 0.0, _peak_memory(self.model), 0.0)
        self._log(metrics)
        on_step(metrics)
        return self._keep_best(state, loss)

    def _step(self, state: State) -> tuple[State, Metrics]:
        step = state.step + 1
        began = time.perf_counter()
        torch.manual_seed((self.seed << 32) + step)
        batch = [self.examples[i] for i in batch_indices(step, self.config.batch_size, len(self.examples), self.seed)]
        if step == self.total_steps and self.config.steps is None:
            batch = batch[: self._rows_in_last_step()]
        units = sum(self.objective.units(e) for e in batch)
        lr = optimizers.learning_rate(self.config.optimizer, step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        loss, tokens = 0.0, 0
        for part, part_tokens in self._losses(batch):
            (part / units).backward()
            loss += part.item() / units
            tokens += part_tokens
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.optimizer.clip).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._not_finite(step, loss, norm, batch)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - began
        state = replace(state, step=step, tokens=state.tokens + tokens, seconds=state.seconds + seconds)
        rate = tokens / seconds
        memory = _peak_memory(self.model)
        return state, Metrics(step, loss, None, lr, norm, state.tokens, rate, memory, state.seconds)

    def _losses(self, batch: list[Example]) -> Iterator[tuple[Tensor, int]]:
        """(loss summed over units, tokens computed) of each forward pass that the batch is packed into."""
        lengths = [sum(len(s.ids) for s in e.sequences) for e in batch]
        for pack in packs(lengths, self.pack_length):
            examples = [batch[i] for i in pack]
            sequences = [s for e in examples for s in e.sequences]
            positions = [[i for i, trained in enumerate(s.trained) if trained and i] for s in sequences]
            flat = iter(target_logprobs(self.model, [s.ids for s in sequences], positions))
            grouped = [[next(flat) for _ in e.sequences] for e in examples]
            yield self.objective.loss(examples, grouped), sum(lengths[i] for i in pack)

    def _rows_in_last_step(self) -> int:
        wanted = math.ceil(len(self.examples) * (self.config.epochs or 1))
        return wanted - (self.total_steps - 1) * self.config.batch_size

    def _keep_best(self, state: State, loss: float | None) -> State:
        if loss is None or (state.best_loss is not None and loss >= state.best_loss):
            return state
        self.save_best(state.step)
        return replace(state, best_step=state.step, best_loss=loss)

    def _log(self, metrics: Metrics) -> None:
        path = self.folder / "metrics.jsonl"
        with storage_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(metrics)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _truncate_metrics(self, state: State) -> None:
        """Drop lines of steps that will be done again, and a half-written last one."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return
        kept: list[str] = []
        for line in path.read_text("utf-8", errors="replace").splitlines():
            try:
                value: Any = json.loads(line)
            except ValueError:
                break
            if state.step and value["step"] <= state.step:
                kept.append(line + "\n")
        write_atomic(path, "".join(kept))

    def _not_finite(self, step: int, loss: float, norm: float, batch: list[Example]) -> TrainingError:
        rows = ", ".join(f"{e.source} row {e.index}" for e in batch)
        return TrainingError(
            f"step {step}: loss is {loss:g} and gradient norm {norm:g}",
            where=f"rows of the batch: {rows}",
            hint="lower train.optimizer.lr, or look at these rows with `corral inspect`; checkpoints before it are kept",
        )


def total_steps(config: Train, examples: int) -> int:
    """Optimizer steps of a stage."""
    return config.steps or math.ceil(math.ceil(examples * (config.epochs or 1)) / config.batch_size)


def batch_indices(step: int, batch_size: int, examples: int, seed: int) -> list[int]:
    """Which examples step `step` (from 1) takes: batch_size in a row from the endless series of seeded permutations."""
    places = range((step - 1) * batch_size, step * batch_size)
    return [int(_permutation(place // examples, examples, seed)[place % examples]) for place in places]


@lru_cache(maxsize=4)
def _permutation(epoch: int, examples: int, seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng([seed, epoch]).permutation(examples)


def _peak_memory(model: PeftModel) -> int:
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
