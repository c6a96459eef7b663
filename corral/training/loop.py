"""The training loop, the same for every objective.

A step takes `batch_size` examples, in which every unit (trained token, pair …) has the same weight: each term of the loss is
summed over the step and divided by its units there (see `objectives`). The examples are packed into as few forward passes as
`pack_length` allows; packing changes memory and speed, never the gradient (to rounding). The order of examples and all random
numbers follow from (seed, step), so a resumed run repeats an uninterrupted one. Several processes divide each step's examples
between them and compute what one process does, to rounding.

The loss of a float16 model is multiplied by a scale (see `loss_scale`), and a step whose gradients overflow is skipped.

A step waits for the GPU once, to transfer its loss and gradient norm; an objective with a statistic makes it wait once more.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from corral import system
from corral.data.example_store import Example, SizedExamples
from corral.model.loading import quiet
from corral.training import divergence, loss_scale, optimizers, sharding, step_metrics
from corral.training.checkpoint import TrainingState
from corral.training.distributed import World
from corral.training.objectives import Objective, Scored, Sums
from corral.training.reference_logprobs import ReferencedRows, rows_digest, stored_logprobs
from corral.training.sampler import BatchSampler
from corral.training.scorer import Scorer, token_count
from corral.training.step_metrics import StepMetrics

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

    from corral.errors import GateError
    from corral.recipe import Train
    from corral.training.guards import StageGuards


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """How a training stage ended."""

    steps: int
    best_step: int
    best_loss: float | None
    """Held-out loss of the best weights; None if nothing was held out."""
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The objective over some examples.

    Args:
        loss: Σ over its terms of weight × sum / units.
        metrics: means of its metrics, of those that any example has.
    """

    loss: float
    metrics: dict[str, float] = field(default_factory=dict[str, float])


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
        folder: gets `metrics.jsonl`, `checkpoints/` and, if the objective needs it, `reference/`; an interrupted stage resumes
            from what is there.
        save_best: called when the held-out loss is the lowest so far, on every process: it may call
            `weights`, and only rank 0 should write.
        start: identifies the model as it is now; its log-probabilities are kept under it as those of the reference.
        world: the processes that train together.
        device: where a sharded model computes; its parts are moved there one by one. Default: where the model is.
        guards: what stops the stage before it breaks the model.
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
        start: str = "",
        world: World | None = None,
        device: str | None = None,
        guards: StageGuards | None = None,
    ) -> None:
        self.model, self.world, self.guards = model, world or World(), guards
        self.examples, self.held_out = examples, held_out
        self.objective, self.config = objective, config
        self.start, self.seed, self.folder, self.save_best = start, seed, folder, save_best
        lengths = (
            examples.lengths.tolist() if isinstance(examples, SizedExamples) else [token_count(e) for e in examples]
        )
        self.sampler = BatchSampler(config, lengths, seed)
        self.total_steps = self.sampler.steps
        self._uses_float16 = any(p.dtype == torch.float16 for p in model.parameters())
        if config.gradient_checkpointing is True:
            with quiet():
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        sharded: sharding.ShardedModel | None = None
        if config.sharding == "full" and self.world.size > 1:
            sharded = sharding.ShardedModel(model, device or model.device.type, self.world.size)
        self.scorer = Scorer(model, sharded, pack_length, self.world)
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
            GateError: the guards stop the stage; if the same limits hold when it is called again, they do so at once.
            KeyboardInterrupt: stopped on request; the next run resumes from there.
            CheckpointError, StorageError: see `checkpoint` and `reference`.
        """
        self.prepare_reference()
        checkpoints = self.folder / "checkpoints"
        resumed = sharding.restore(checkpoints, self.parameters, self.optimizer, self.world, warn=warn)
        scale = loss_scale.INITIAL if self._uses_float16 else 1.0
        initial = TrainingState(step=0, tokens=0, seconds=0.0, best_step=0, best_loss=None, worse=0, scale=scale)
        state = resumed or initial
        if self.world.is_main:
            step_metrics.truncate_from(self.folder / step_metrics.FILE, 0 if resumed is None else state.step + 1)
        metrics, stopped = StepMetrics(0, None, None, 0.0, None, 0, 0.0, _peak_memory(self.model), 0.0), None
        if resumed is not None and self.guards is not None:
            self.guards.resume()
        if resumed is None and self._evaluation_rows:
            if self.guards is not None:
                sides = {"validation": self.held_out, "train": self.examples}
                self.guards.begin(self.objective, sides, self.scorer)
            state, metrics, stopped = self._evaluate_step(state, metrics)
            self._record(metrics, on_step)
        elif not state.evaluated:
            state, _, stopped = self._evaluate_step(state, metrics)
        while stopped is None and not self._is_finished(state):
            state, metrics = self._step(state)
            if self._evaluation_is_due(state.step):
                state, metrics, stopped = self._evaluate_step(state, metrics)
            self._record(metrics, on_step)
            finished = stopped is not None or self._is_finished(state)
            stop = not finished and self.world.any_process(should_stop())
            if finished or stop or state.step % self.config.checkpoint_every == 0:
                sharding.save(checkpoints, self.parameters, self.optimizer, state, self.world)
            if stop:
                raise KeyboardInterrupt
        if stopped is not None:
            raise stopped
        return TrainingResult(state.step, state.best_step, state.best_loss, state.tokens, state.seconds)

    def weights(self) -> dict[str, Tensor]:
        """Trained parameters by name, as whole tensors on rank 0 and empty on the others; all processes must call it."""
        return sharding.gather_weights(self.parameters, self.world)

    def score(self, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[list[float]]:
        """Log-probabilities of sequence[start:] for each sequence with the current weights; all processes must call it."""
        positions = [range(start, len(s)) for s, start in zip(sequences, starts, strict=True)]
        with self.scorer.evaluating():
            return [values.tolist() for values in self.scorer.logprobs(sequences, positions)]

    def evaluate(self) -> Evaluation:
        """The objective on the held-out examples; without any, on those that the guards watch.

        Raises: TrainingError (its loss is not finite).
        """
        rows = self._evaluation_rows
        statistic = self._statistic(rows)
        with self.scorer.evaluating():
            passes = [
                self._pass_sums(scored, statistic, own) for scored, own in self.scorer.passes(rows, self._loss_part)
            ]
        values = torch.stack([self._values(sums) for sums in passes]).tolist() if passes else []
        result = self._evaluation(self._counts(rows), values, passes)
        divergence.check_held_out(result.loss, rows, self._measure_one)
        return result

    @property
    def reference_rows(self) -> int:
        """Rows of which the objective needs log-probabilities of the reference."""
        return len(self.examples) + len(self.held_out) if self.objective.needs_reference else 0

    def prepare_reference(
        self,
        *,
        on_rows: Callable[[int], None] = lambda _: None,
        should_stop: Callable[[], bool] = lambda: False,
        earlier: Sequence[Path] = (),
    ) -> None:
        """Give the rows their log-probabilities under the reference, if the objective needs them: the model as it is now, or
        what is stored of it. `run` calls it first, before any checkpoint is read.

        Args:
            on_rows: called with the number of rows that have them.
            should_stop: called between rows; if it returns true on any process, KeyboardInterrupt is raised.
            earlier: folders of this stage with other settings; what they hold of the same model and rows is used.

        Raises: as `stored_logprobs`.
        """
        if not self.reference_rows or isinstance(self.examples, ReferencedRows):
            return

        def compare(name: str, rows: Sequence[Example], done: int) -> Sequence[Example]:
            logprobs = stored_logprobs(
                self.folder / "reference" / f"{name}.jsonl",
                f"{self.start} {self.config.objective} {rows_digest(rows)}",
                rows,
                self.scorer.sums,
                world=self.world,
                on_rows=lambda count: on_rows(done + count),
                should_stop=should_stop,
                earlier=[folder / "reference" / f"{name}.jsonl" for folder in earlier],
            )
            return ReferencedRows(rows, logprobs)

        self.held_out = compare("validation", self.held_out, 0)
        self.examples = compare("train", self.examples, len(self.held_out))

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
        result, norm = self._compute_gradients(batch, state.scale)
        loss = result.loss
        overflow = state.scale > 1 and math.isfinite(loss) and not math.isfinite(norm)
        monitor = state.watch.updated(loss, norm)
        if not overflow:
            divergence.check_step(step, loss, norm, monitor, batch, self._measure_one)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        tokens, seconds = sum(token_count(e) for e in batch), time.perf_counter() - began
        state = replace(state, step=step, tokens=state.tokens + tokens, seconds=state.seconds + seconds, watch=monitor)
        if self._uses_float16:
            state = loss_scale.updated(state, overflow)
        return state, StepMetrics(
            step,
            loss,
            None,
            lr,
            None if overflow else norm,
            state.tokens,
            tokens / seconds,
            _peak_memory(self.model),
            state.seconds,
            result.metrics,
        )

    @property
    def _evaluation_rows(self) -> list[Example]:
        """The held-out examples; without any, those to train on that the guards watch, if there are guards."""
        rows = self.held_out or (() if self.guards is None else self.examples[: self.config.evaluate_rows])
        return list(rows)

    def _evaluation_is_due(self, step: int) -> bool:
        watched = bool(self.held_out) or self.guards is not None
        return watched and (step == self.total_steps or step % self.config.evaluate_every == 0)

    def _evaluate_step(
        self, state: TrainingState, metrics: StepMetrics
    ) -> tuple[TrainingState, StepMetrics, GateError | None]:
        """Evaluate after a step, and keep its weights if they are the best so far, or if none are held out; not if the guards
        stop the stage, whose error is returned."""
        result, stopped = self.evaluate(), None
        if self.held_out:
            held_out = {f"eval_{name}": value for name, value in result.metrics.items()}
            metrics = replace(metrics, eval_loss=result.loss, objective={**metrics.objective, **held_out})
        if self.guards is not None:
            rows = self._evaluation_rows
            figures, stopped = self.guards.check(state.step, self.objective, rows, result.metrics, self.scorer)
            metrics = replace(metrics, objective={**metrics.objective, **figures})
        state = replace(state, evaluated=stopped is None)
        if stopped is None and self.held_out:
            state = self._keep_best(state, result.loss)
        elif stopped is None:
            self.save_best()
        return state, metrics, stopped

    def _compute_gradients(self, batch: list[Example], scale: float) -> tuple[Evaluation, float]:
        """Leave the batch's clipped gradients in the parameters.

        Returns: the objective on the batch, gradient norm before clipping.
        """
        counts, weights = self._counts(batch), self.objective.weights
        statistic = self._statistic(batch)
        self.model.train()
        passes: list[Sums] = []
        for scored, own in self.scorer.passes(batch, self._loss_part):
            sums = self._pass_sums(scored, statistic, own)
            passes.append(sums.detach())
            parts = zip(sums.terms, counts, weights, strict=True)
            loss: Any = sum(term / (count / (scale * weight)) for term, count, weight in parts if count and weight)
            loss.backward()
        sharding.sum_gradients(self.parameters.values(), self.world)
        norm = sharding.clip_gradients(self.parameters.values(), self.config.optimizer.clip, scale=scale)
        *values, norm_value = torch.cat([*(self._values(sums) for sums in passes), norm.float().reshape(1)]).tolist()
        width = len(values) // len(passes) if passes else 0
        by_pass = [values[i * width : (i + 1) * width] for i in range(len(passes))]
        return self._evaluation(counts, by_pass, passes), norm_value

    def _evaluation(self, counts: Sequence[int], values: list[list[float]], passes: list[Sums]) -> Evaluation:
        """The objective on a batch.

        Args:
            counts: units of each term.
            values: of each of this process's passes the sums of terms, then of metrics.
            passes: the same passes.
        """
        terms, names = len(self.objective.weights), self.objective.metrics
        sums = [sum(column) for column in zip(*values, strict=True)] or [0.0] * (terms + len(names))
        sizes = [float(sum(each.metrics[name][1] for each in passes)) for name in names]
        sums = self.world.all_reduce_sums([*sums, *sizes])
        parts = zip(sums[:terms], counts, self.objective.weights, strict=True)
        # Not 0 × … of a term without units.
        loss = sum(total / count * weight for total, count, weight in parts if count)
        columns = zip(names, sums[terms : terms + len(names)], sums[terms + len(names) :], strict=True)
        means = {name: total / size for name, total, size in columns if size}
        return Evaluation(loss, self.objective.summarise(means))

    def _values(self, sums: Sums) -> Tensor:
        """[terms + metrics]."""
        return torch.stack([*sums.terms, *(sums.metrics[name][0] for name in self.objective.metrics)])

    def _counts(self, batch: Sequence[Example]) -> list[int]:
        """Units of each term over the batch."""
        return [sum(column) for column in zip(*(self.objective.counts(e) for e in batch), strict=True)]

    @property
    def _loss_part(self) -> slice:
        """The sequences of an example that the loss reads."""
        return slice(-self.objective.statistic_sequences or None)

    def _statistic(self, batch: list[Example]) -> float:
        """The objective's statistic, its mean over the batch."""
        if not self.objective.statistic_sequences:
            return 0.0
        part = slice(-self.objective.statistic_sequences, None)
        with self.scorer.evaluating():
            sums = [self.objective.statistic(scored) * float(own) for scored, own in self.scorer.passes(batch, part)]
        own_sum = sum(torch.stack(sums).tolist()) if sums else 0.0
        return self.world.all_reduce_sums([own_sum])[0] / len(batch)

    def _step_seed(self, step: int) -> int:
        """Random seed of a step; rank 0's is that of a run with one process."""
        if self.world.is_main:
            return (self.seed << 32) + step
        return int(np.random.SeedSequence([self.seed, step, self.world.rank]).generate_state(1, np.uint64)[0])

    def _pass_sums(self, scored: list[Scored], statistic: float, own: bool) -> Sums:
        """The objective's sums over one pass; zeros for a pass that only keeps other processes company."""
        sums = self.objective.sums(scored, statistic)
        if own:
            return sums
        return Sums(
            tuple(term * 0.0 for term in sums.terms), {name: (v * 0.0, 0) for name, (v, _) in sums.metrics.items()}
        )

    def _keep_best(self, state: TrainingState, loss: float) -> TrainingState:
        if state.best_loss is not None and loss >= state.best_loss:
            return replace(state, worse=state.worse + 1)
        self.save_best()
        return replace(state, best_step=state.step, best_loss=loss, worse=0)

    def _measure_one(self, example: Example) -> tuple[float, float]:
        """(loss, gradient norm) of one example alone, to find the row at fault."""
        self.optimizer.zero_grad(set_to_none=True)
        result, norm = self._compute_gradients([example], 1.0)
        return result.loss, norm


def _peak_memory(model: torch.nn.Module) -> int:
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return system.peak_memory() or 0
