"""One short loop for every objective.

A step is `batch_size` examples, every unit (trained token, pair …) weighing the same. Its examples are packed into as few
forward passes as `pack_length` allows; how they are packed changes memory and speed, never the gradient (to rounding).
The order of examples and all random numbers follow from (seed, step), so a resumed run repeats an uninterrupted one.
Several processes take a share of each step's examples, and do what one process does, to rounding.

The loss of a float16 model is multiplied by a scale, so that its gradients do not vanish (Micikevicius et al. 2018, arXiv
1710.03740): halved, and the step left out, when gradients overflow; doubled after 2,000 steps without.

Nothing in a step waits for a GPU but one transfer of its loss and gradient norm.

The loop knows nothing about text, templates, recipes as files, or where its outputs are shown.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from corral import system
from corral.data.example_store import Example, ExampleStore
from corral.data.packing import pack_sequences
from corral.model.loading import quiet
from corral.model.packed_forward import target_logprobs
from corral.training import divergence, optimizers, sharding, step_metrics
from corral.training.checkpoint import State
from corral.training.distributed import World
from corral.training.objectives import Objective
from corral.training.sampler import Order
from corral.training.step_metrics import Metrics

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

    from corral.recipe import Train


_FIRST_SCALE = 2.0**16
_STEPS_AT_SCALE = 2000


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
        model: its trainable parameters are trained: those of the adapter of a PEFT model, or all of a model's own. With
            `sharding = "full"` and several processes it is sharded in place, over the devices of `world`.
        examples: what to train on.
        held_out: what to evaluate on while training; may be empty.
        objective: what to minimise.
        config: the stage's settings.
        pack_length: most tokens in one forward pass.
        folder: where `metrics.jsonl` and `checkpoints/` go; an interrupted stage's folder is taken up where it stopped.
        save_best: called with the step when the held-out loss is the lowest so far, by every process: it may ask for
            `weights`, and only the first should write.
        world: the processes that train together.
        device: where a sharded model computes, part by part brought there from where it lies; by default there.
    """

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        objective: Objective,
        config: Train,
        *,
        pack_length: int,
        seed: int,
        folder: Path,
        save_best: Callable[[int], None],
        world: World | None = None,
        device: str | None = None,
    ) -> None:
        self.model, self.examples, self.held_out = model, examples, held_out
        self.world = world or World()
        self.objective, self.config = objective, config
        self.pack_length, self.seed, self.folder, self.save_best = pack_length, seed, folder, save_best
        lengths = examples.lengths.tolist() if isinstance(examples, ExampleStore) else [_length(e) for e in examples]
        self.order = Order(config, lengths, seed)
        self.total_steps = self.order.steps
        self._half = any(p.dtype == torch.float16 for p in model.parameters())
        if config.gradient_checkpointing:
            with quiet():
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._sharded: sharding.Sharded | None = None
        if config.sharding == "full" and self.world.size > 1:
            self._sharded = sharding.Sharded(model, device or model.device.type, self.world.size)
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
            TrainingError: the loss or gradient is not a finite number, or the loss has exploded; the rows are named.
            KeyboardInterrupt: stopped on request; the next run goes on from there.
            CheckpointError, StorageError: see `checkpoint`.
        """
        checkpoints = self.folder / "checkpoints"
        resumed = sharding.restore(checkpoints, self.parameters, self.optimizer, self.world, warn=warn)
        scale = _FIRST_SCALE if self._half else 1.0
        state = resumed or State(step=0, tokens=0, seconds=0.0, best_step=0, best_loss=None, worse=0, scale=scale)
        if self.world.is_main:
            step_metrics.forget_after(self.folder, state.step)
        if resumed is None and self.held_out:
            loss = self.evaluate()
            self._tell(Metrics(0, None, loss, 0.0, None, 0, 0.0, _peak_memory(self.model), 0.0), on_step)
            state = self._keep_best(state, loss)
        while not self._is_last(state):
            state, line = self._step(state)
            if self.held_out and (state.step == self.total_steps or state.step % self.config.evaluate_every == 0):
                line = replace(line, eval_loss=self.evaluate())
                state = self._keep_best(state, line.eval_loss)
            self._tell(line, on_step)
            last = self._is_last(state)
            stop = not last and self.world.any(should_stop())
            if last or stop or state.step % self.config.checkpoint_every == 0:
                sharding.save(checkpoints, self.parameters, self.optimizer, state, self.world)
            if stop:
                raise KeyboardInterrupt
        return Outcome(state.step, state.best_step, state.best_loss, state.tokens, state.seconds)

    def weights(self) -> dict[str, Tensor]:
        """What is trained, by the names of parameters, as whole tensors on the first process; all must ask, and the others
        get nothing."""
        return sharding.weights(self.parameters, self.world)

    def score(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[list[float]]:
        """Log-probabilities of sequence[start:] for each sequence, as the model stands now; all processes must ask."""
        self.model.eval()
        positions = [range(start, len(s)) for s, start in zip(sequences, starts, strict=True)]
        with torch.no_grad():
            found = self._logprobs(sequences, positions)
        if self._sharded is not None:
            self._sharded.release()
        return [values.tolist() for values in found]

    def _tell(self, line: Metrics, on_step: Callable[[Metrics], None]) -> None:
        if self.world.is_main:
            step_metrics.append(self.folder, line)
            on_step(line)

    def _is_last(self, state: State) -> bool:
        patience = self.config.early_stopping
        return state.step == self.total_steps or (patience is not None and state.worse >= patience)

    def evaluate(self) -> float:
        """Loss per unit on the held-out examples. Raises: TrainingError (it is not a finite number)."""
        self.model.eval()
        with torch.no_grad():
            losses = list(self._losses(list(self.held_out)))
        if self._sharded is not None:
            self._sharded.release()
        total = self.world.sum(sum(torch.stack(losses).tolist()) if losses else 0.0)
        divergence.check_held_out(total, self.held_out, self._alone)
        return total / sum(self.objective.units(e) for e in self.held_out)

    def _step(self, state: State) -> tuple[State, Metrics]:
        step = state.step + 1
        began = time.perf_counter()
        torch.manual_seed(self._random(step))
        batch = [self.examples[i] for i in self.order.batch(step)]
        lr = optimizers.learning_rate(self.config.optimizer, step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss, norm = self._gradients(batch, state.scale)
        overflow = state.scale > 1 and math.isfinite(loss) and not math.isfinite(norm)
        watch = state.watch.after(loss, norm)
        if not overflow:
            divergence.check(step, loss, norm, watch, batch, self._alone)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        tokens, seconds = sum(_length(e) for e in batch), time.perf_counter() - began
        state = replace(state, step=step, tokens=state.tokens + tokens, seconds=state.seconds + seconds, watch=watch)
        state, rate = self._rescaled(state, overflow), tokens / seconds
        memory = _peak_memory(self.model)
        return state, Metrics(
            step, loss, None, lr, None if overflow else norm, state.tokens, rate, memory, state.seconds
        )

    def _gradients(self, batch: list[Example], scale: float) -> tuple[float, float]:
        """Leaves the batch's clipped gradients in the parameters. Returns: loss per unit, gradient norm before clipping."""
        units = sum(self.objective.units(e) for e in batch)
        self.model.train()
        losses: list[Tensor] = []
        for loss in self._losses(batch):
            (loss / (units / scale)).backward()
            losses.append(loss.detach())
        sharding.sum_gradients(self.parameters.values(), self.world)
        norm = sharding.clip_gradients(self.parameters.values(), self.config.optimizer.clip, scale=scale)
        *sums, found = torch.stack([*losses, norm.float()]).tolist()
        return self.world.sum(sum(sums)) / units, found

    def _random(self, step: int) -> int:
        """What seeds a step; the first process's is that of a run with one process."""
        if self.world.is_main:
            return (self.seed << 32) + step
        return int(np.random.SeedSequence([self.seed, step, self.world.rank]).generate_state(1, np.uint64)[0])

    def _rescaled(self, state: State, overflow: bool) -> State:
        if not self._half:
            return state
        if overflow:
            return replace(state, scale=state.scale / 2, steps_at_scale=0)
        if state.steps_at_scale + 1 == _STEPS_AT_SCALE:
            return replace(state, scale=state.scale * 2, steps_at_scale=0)
        return replace(state, steps_at_scale=state.steps_at_scale + 1)

    def _losses(self, batch: list[Example]) -> Iterator[Tensor]:
        """The loss, summed over units, of each forward pass that this process's share of the batch is packed into."""
        lengths = [_length(e) for e in batch]
        world = self.world
        passes = [
            [[batch[share[i]] for i in pack] for pack in pack_sequences([lengths[i] for i in share], self.pack_length)]
            for share in sharding.shares(lengths, world.size)
        ]
        for examples in passes[world.rank]:
            yield self._loss(examples)
        if self._sharded is not None:
            for _ in range(max(map(len, passes)) - len(passes[world.rank])):
                yield self._loss([min(batch, key=_length)]) * 0.0

    def _loss(self, examples: list[Example]) -> Tensor:
        sequences = [s for e in examples for s in e.sequences]
        positions = [[i for i, trained in enumerate(s.trained) if trained and i] for s in sequences]
        each = iter(self._logprobs([s.ids for s in sequences], positions))
        grouped = [[next(each) for _ in e.sequences] for e in examples]
        return self.objective.loss(examples, grouped)

    def _logprobs(self, sequences: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> Sequence[Tensor]:
        if self._sharded is None:
            return target_logprobs(self.model, sequences, positions)
        flat: Tensor = self._sharded(lambda: torch.cat(target_logprobs(self.model, sequences, positions)))
        return flat.split([len(p) for p in positions])

    def _keep_best(self, state: State, loss: float | None) -> State:
        if loss is None:
            return state
        if state.best_loss is not None and loss >= state.best_loss:
            return replace(state, worse=state.worse + 1)
        self.save_best(state.step)
        return replace(state, best_step=state.step, best_loss=loss, worse=0)

    def _alone(self, example: Example) -> tuple[float, float]:
        """(loss per unit, gradient norm) of one example by itself, to find the row at fault."""
        self.optimizer.zero_grad(set_to_none=True)
        return self._gradients([example], 1.0)


def _length(example: Example) -> int:
    return sum(len(sequence.ids) for sequence in example.sequences)


def _peak_memory(model: torch.nn.Module) -> int:
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return system.peak_memory() or 0
