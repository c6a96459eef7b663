"""One short loop for every objective.

A step is `batch_size` examples, every unit (trained token, pair …) weighing the same. Its examples are packed into as few
forward passes as `pack_length` allows; how they are packed changes memory and speed, never the gradient (to rounding).
The order of examples and all random numbers follow from (seed, step), so a resumed run repeats an uninterrupted one.

The loop knows nothing about text, templates, recipes as files, or where its outputs are shown.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from corral.data.packing import packs
from corral.data.rows import Example, Rows
from corral.errors import TrainingError
from corral.model.packed import target_logprobs
from corral.training import checkpoint, metrics, optimizers
from corral.training.checkpoint import State
from corral.training.metrics import Metrics
from corral.training.objectives import Objective
from corral.training.order import Order

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

    from corral.recipe import Train


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
        lengths = examples.lengths.tolist() if isinstance(examples, Rows) else [_length(e) for e in examples]
        self.order = Order(config, lengths, seed)
        self.total_steps = self.order.steps
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
        state = resumed or State(step=0, tokens=0, seconds=0.0, best_step=0, best_loss=None, worse=0)
        metrics.forget_after(self.folder, state.step)
        if resumed is None:
            state = self._begin(state, on_step)
        while not self._is_last(state):
            state, line = self._step(state)
            if self.held_out and (state.step == self.total_steps or state.step % self.config.evaluate_every == 0):
                line = replace(line, eval_loss=self.evaluate())
                state = self._keep_best(state, line.eval_loss)
            metrics.append(self.folder, line)
            on_step(line)
            last = self._is_last(state)
            stop = not last and should_stop()
            if last or stop or state.step % self.config.checkpoint_every == 0:
                checkpoint.save(checkpoints, self.parameters, self.optimizer, state)
            if stop:
                raise KeyboardInterrupt
        return Outcome(state.step, state.best_step, state.best_loss, state.tokens, state.seconds)

    def _is_last(self, state: State) -> bool:
        patience = self.config.early_stopping
        return state.step == self.total_steps or (patience is not None and state.worse >= patience)

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
        line = Metrics(0, None, loss, 0.0, None, 0, 0.0, _peak_memory(self.model), 0.0)
        metrics.append(self.folder, line)
        on_step(line)
        return self._keep_best(state, loss)

    def _step(self, state: State) -> tuple[State, Metrics]:
        step = state.step + 1
        began = time.perf_counter()
        torch.manual_seed((self.seed << 32) + step)
        batch = [self.examples[i] for i in self.order.batch(step)]
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
        lengths = [_length(e) for e in batch]
        for pack in packs(lengths, self.pack_length):
            examples = [batch[i] for i in pack]
            sequences = [s for e in examples for s in e.sequences]
            positions = [[i for i, trained in enumerate(s.trained) if trained and i] for s in sequences]
            flat = iter(target_logprobs(self.model, [s.ids for s in sequences], positions))
            grouped = [[next(flat) for _ in e.sequences] for e in examples]
            yield self.objective.loss(examples, grouped), sum(lengths[i] for i in pack)

    def _keep_best(self, state: State, loss: float | None) -> State:
        if loss is None:
            return state
        if state.best_loss is not None and loss >= state.best_loss:
            return replace(state, worse=state.worse + 1)
        self.save_best(state.step)
        return replace(state, best_step=state.step, best_loss=loss, worse=0)

    def _not_finite(self, step: int, loss: float, norm: float, batch: list[Example]) -> TrainingError:
        rows = ", ".join(f"{e.source} row {e.index}" for e in batch)
        return TrainingError(
            f"step {step}: loss is {loss:g} and gradient norm {norm:g}",
            where=f"rows of the batch: {rows}",
            hint="lower train.optimizer.lr, or look at these rows with `corral inspect`; checkpoints before it are kept",
        )


def _length(example: Example) -> int:
    return sum(len(sequence.ids) for sequence in example.sequences)


def _peak_memory(model: PeftModel) -> int:
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
