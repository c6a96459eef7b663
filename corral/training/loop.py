"""The training loop, the same for every objective.

A step takes `batch_size` examples, in which every unit (trained token, pair …) has the same weight. They are packed into as
few forward passes as `pack_length` allows; packing changes memory and speed, never the gradient (to rounding). The order of
examples and all random numbers follow from (seed, step), so a resumed run repeats an uninterrupted one. Several processes
divide each step's examples between them and compute what one process does, to rounding.

The loss of a float16 model is multiplied by a scale, so that its gradients do not vanish (Micikevicius et al. 2018, arXiv
1710.03740). The scale is halved and the step skipped when gradients overflow, and doubled after 2,000 steps without overflow.

A step waits for the GPU once, to transfer its loss and gradient norm.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
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
from corral.training.checkpoint import TrainingState
from corral.training.distributed import World
from corral.training.objectives import Objective, trained_positions
from corral.training.sampler import BatchSampler
from corral.training.step_metrics import StepMetrics

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

    from corral.recipe import Train


_INITIAL_SCALE = 2.0**16
_SCALE_GROWTH_STEPS = 2000


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """How a training stage ended."""

    steps: int
    best_step: int
    best_loss: float | None
    """Held-out loss of the best weights; None if nothing was held out."""
    tokens: int
    seconds: float


class Trainer:
    """Trains one stage.

    Args:
        model: its trainable parameters are trained: the adapter of a PEFT model, or all parameters of a plain one. With
            `sharding = "full"` and several processes it is sharded in place, over the devices of `world`.
        examples: to train on.
        held_out: to evaluate on while training; may be empty.
        objective: the loss to minimise.
        config: the stage's settings.
        pack_length: maximum tokens of one forward pass.
        folder: gets `metrics.jsonl` and `checkpoints/`; an interrupted stage resumes from what is there.
        save_best: called when the held-out loss is the lowest so far, on every process: it may call
            `weights`, and only rank 0 should write.
        world: the processes that train together.
        device: where a sharded model computes; its parts are moved there one by one. Default: where the model is.
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
        save_best: Callable[[], None],
        world: World | None = None,
        device: str | None = None,
    ) -> None:
        self.model, self.examples, self.held_out = model, examples, held_out
        self.world = world or World()
        self.objective, self.config = objective, config
        self.pack_length, self.seed, self.folder, self.save_best = pack_length, seed, folder, save_best
        lengths = (
            examples.lengths.tolist() if isinstance(examples, ExampleStore) else [_token_count(e) for e in examples]
        )
        self.sampler = BatchSampler(config, lengths, seed)
        self.total_steps = self.sampler.steps
        self._uses_float16 = any(p.dtype == torch.float16 for p in model.parameters())
        if config.gradient_checkpointing is True:
            with quiet():
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self._sharded_model: sharding.ShardedModel | None = None
        if config.sharding == "full" and self.world.size > 1:
            self._sharded_model = sharding.ShardedModel(model, device or model.device.type, self.world.size)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = optimizers.build_optimizer(self.parameters.values(), config.optimizer)

    def run(
        self,
        *,
        on_step: Callable[[StepMetrics], None] = lambda _: None,
        should_stop: Callable[[], bool] = lambda: False,
        warn: Callable[[str], None] = lambda _: None,
    ) -> TrainingResult:
        """Train to the end, from the newest intact checkpoint if there is one.

        Args:
            on_step: called on rank 0 with the metrics of each step, and of the evaluation before the first.
            should_stop: called after each step; if it returns true on any process, a checkpoint is written and
                KeyboardInterrupt raised.
            warn: called with a message for each damaged checkpoint.

        Raises:
            TrainingError: the loss or gradient is not finite, or the loss has exploded; the rows are named.
            KeyboardInterrupt: stopped on request; the next run resumes from there.
            CheckpointError, StorageError: see `checkpoint`.
        """
        checkpoints = self.folder / "checkpoints"
        resumed = sharding.restore(checkpoints, self.parameters, self.optimizer, self.world, warn=warn)
        scale = _INITIAL_SCALE if self._uses_float16 else 1.0
        initial = TrainingState(step=0, tokens=0, seconds=0.0, best_step=0, best_loss=None, worse=0, scale=scale)
        state = resumed or initial
        if self.world.is_main:
            step_metrics.truncate_after(self.folder, state.step)
        if resumed is None and self.held_out:
            loss = self.evaluate()
            self._record(StepMetrics(0, None, loss, 0.0, None, 0, 0.0, _peak_memory(self.model), 0.0), on_step)
            state = self._keep_best(state, loss)
        while not self._is_finished(state):
            state, metrics = self._step(state)
            if self.held_out and (state.step == self.total_steps or state.step % self.config.evaluate_every == 0):
                loss = self.evaluate()
                metrics = replace(metrics, eval_loss=loss)
                state = self._keep_best(state, loss)
            self._record(metrics, on_step)
            finished = self._is_finished(state)
            stop = not finished and self.world.any_process(should_stop())
            if finished or stop or state.step % self.config.checkpoint_every == 0:
                sharding.save(checkpoints, self.parameters, self.optimizer, state, self.world)
            if stop:
                raise KeyboardInterrupt
        return TrainingResult(state.step, state.best_step, state.best_loss, state.tokens, state.seconds)

    def weights(self) -> dict[str, Tensor]:
        """Trained parameters by name, as whole tensors on rank 0 and empty on the others; all processes must call it."""
        return sharding.gather_weights(self.parameters, self.world)

    def score(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[list[float]]:
        """Log-probabilities of sequence[start:] for each sequence with the current weights; all processes must call it."""
        positions = [range(start, len(s)) for s, start in zip(sequences, starts, strict=True)]
        with self._evaluating():
            return [values.tolist() for values in self._logprobs(sequences, positions)]

    def evaluate(self) -> float:
        """Loss per unit on the held-out examples. Raises: TrainingError (it is not finite)."""
        with self._evaluating():
            losses = list(self._pass_losses(list(self.held_out)))
        total = self.world.all_reduce_sum(sum(torch.stack(losses).tolist()) if losses else 0.0)
        divergence.check_held_out(total, self.held_out, self._measure_one)
        return total / sum(self.objective.units(e) for e in self.held_out)

    @contextmanager
    def _evaluating(self) -> Generator[None]:
        self.model.eval()
        with torch.no_grad():
            yield
        if self._sharded_model is not None:
            self._sharded_model.free_whole_weights()

    def _record(self, metrics: StepMetrics, on_step: Callable[[StepMetrics], None]) -> None:
        if self.world.is_main:
            step_metrics.append(self.folder, metrics)
            on_step(metrics)

    def _is_finished(self, state: TrainingState) -> bool:
        patience = self.config.early_stopping
        return state.step == self.total_steps or (patience is not None and state.worse >= patience)

    def _step(self, state: TrainingState) -> tuple[TrainingState, StepMetrics]:
        step = state.step + 1
        began = time.perf_counter()
        torch.manual_seed(self._step_seed(step))
        batch = [self.examples[i] for i in self.sampler.batch(step)]
        lr = optimizers.learning_rate(self.config.optimizer, step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss, norm = self._compute_gradients(batch, state.scale)
        overflow = state.scale > 1 and math.isfinite(loss) and not math.isfinite(norm)
        monitor = state.watch.updated(loss, norm)
        if not overflow:
            divergence.check_step(step, loss, norm, monitor, batch, self._measure_one)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        tokens, seconds = sum(_token_count(e) for e in batch), time.perf_counter() - began
        state = replace(state, step=step, tokens=state.tokens + tokens, seconds=state.seconds + seconds, watch=monitor)
        if self._uses_float16:
            state = _update_loss_scale(state, overflow)
        memory = _peak_memory(self.model)
        return state, StepMetrics(
            step, loss, None, lr, None if overflow else norm, state.tokens, tokens / seconds, memory, state.seconds
        )

    def _compute_gradients(self, batch: list[Example], scale: float) -> tuple[float, float]:
        """Leave the batch's clipped gradients in the parameters.

        Returns: loss per unit, gradient norm before clipping.
        """
        units = sum(self.objective.units(e) for e in batch)
        self.model.train()
        losses: list[Tensor] = []
        for loss in self._pass_losses(batch):
            (loss / (units / scale)).backward()
            losses.append(loss.detach())
        sharding.sum_gradients(self.parameters.values(), self.world)
        norm = sharding.clip_gradients(self.parameters.values(), self.config.optimizer.clip, scale=scale)
        *loss_sums, norm_value = torch.stack([*losses, norm.float()]).tolist()
        return self.world.all_reduce_sum(sum(loss_sums)) / units, norm_value

    def _step_seed(self, step: int) -> int:
        """Random seed of a step; rank 0's is that of a run with one process."""
        if self.world.is_main:
            return (self.seed << 32) + step
        return int(np.random.SeedSequence([self.seed, step, self.world.rank]).generate_state(1, np.uint64)[0])

    def _pass_losses(self, batch: list[Example]) -> Iterator[Tensor]:
        """For each forward pass of this process's share of the batch, the loss summed over units."""
        lengths = [_token_count(e) for e in batch]
        passes = [
            [[batch[share[i]] for i in pack] for pack in pack_sequences([lengths[i] for i in share], self.pack_length)]
            for share in sharding.balance_by_tokens(lengths, self.world.size)
        ]
        own = passes[self.world.rank]
        for examples in own:
            yield self._pass_loss(examples)
        if self._sharded_model is not None:  # all processes must make equally many passes
            for _ in range(max(map(len, passes)) - len(own)):
                yield self._pass_loss([min(batch, key=_token_count)]) * 0.0

    def _pass_loss(self, examples: list[Example]) -> Tensor:
        sequences = [s for e in examples for s in e.sequences]
        logprobs = iter(self._logprobs([s.ids for s in sequences], [trained_positions(s) for s in sequences]))
        return self.objective.loss(examples, [[next(logprobs) for _ in e.sequences] for e in examples])

    def _logprobs(self, sequences: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> Sequence[Tensor]:
        if self._sharded_model is None:
            return target_logprobs(self.model, sequences, positions)
        flat: Tensor = self._sharded_model(lambda: torch.cat(target_logprobs(self.model, sequences, positions)))
        return flat.split([len(p) for p in positions])

    def _keep_best(self, state: TrainingState, loss: float) -> TrainingState:
        if state.best_loss is not None and loss >= state.best_loss:
            return replace(state, worse=state.worse + 1)
        self.save_best()
        return replace(state, best_step=state.step, best_loss=loss, worse=0)

    def _measure_one(self, example: Example) -> tuple[float, float]:
        """(loss per unit, gradient norm) of one example alone, to find the row at fault."""
        self.optimizer.zero_grad(set_to_none=True)
        return self._compute_gradients([example], 1.0)


def _update_loss_scale(state: TrainingState, overflow: bool) -> TrainingState:
    if overflow:
        return replace(state, scale=state.scale / 2, steps_at_scale=0)
    if state.steps_at_scale + 1 == _SCALE_GROWTH_STEPS:
        return replace(state, scale=state.scale * 2, steps_at_scale=0)
    return replace(state, steps_at_scale=state.steps_at_scale + 1)


def _token_count(example: Example) -> int:
    return sum(len(sequence.ids) for sequence in example.sequences)


def _peak_memory(model: torch.nn.Module) -> int:
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return system.peak_memory() or 0
