"""Fine-tunes the model of a training stage: loads it, trains it with its guards and listeners, and keeps the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corral.export import contract
from corral.formatting import signed
from corral.model.folder import model_identity
from corral.pipeline.context import RunContext
from corral.progress import Progress
from corral.run.stage_record import earlier_folders
from corral.storage import new_directory, write_json
from corral.training.objective_table import build_objective
from corral.training.passes import Passes

if TYPE_CHECKING:
    from corral.training.guards import StageGuards
    from corral.training.loop import Trainer, TrainingResult
    from corral.training.stage_rows import StageRows
    from corral.training.step_metrics import StepMetrics
    from corral.training.trained_model import TrainingSetup, ValidationSet


@dataclass(frozen=True)
class FineTuning:
    """What a training stage trains.

    Args:
        number: of the stage, from 1.
        folder: the stage's.
        start: name of the stage of this run whose model it starts from; None for the base model.
        validation: the rows that it is evaluated on.
    """

    context: RunContext
    number: int
    folder: Path
    setup: TrainingSetup
    passes: Passes
    rows: StageRows
    validation: ValidationSet
    start: str | None

    def run(self) -> None:
        """Train to the end, from the newest checkpoint if there is one; all processes must call it.

        Raises: CorralError, KeyboardInterrupt, as `Trainer.run`.
        """
        from corral.training import optimizers
        from corral.training.trained_model import ADAPTER_FOLDER

        context, config = self.context, self.setup.config
        trained, training = self._load()
        if self.setup.adapter is not None:
            context.progress.say(f"the adapter {self.setup.adapter} is trained further; its base stays frozen")
        if warning := optimizers.unsupported(config.optimizer, self.setup.device):
            context.progress.say(warning)
        if training.reference_rows:
            context.progress.start("Computing log-probabilities of the reference", training.reference_rows)
            with context.interrupts.deferred() as should_stop:
                training.prepare_reference(
                    on_rows=lambda n: context.progress.update(n, ""),
                    should_stop=should_stop,
                    earlier=earlier_folders(self.folder),
                )
        context.progress.start(f"Training ({self._description})", training.total_steps)
        with context.interrupts.deferred() as should_stop, self._step_listeners() as on_step:
            outcome = training.run(on_step=on_step, should_stop=should_stop, warn=context.progress.say)
            if context.world.any_process(should_stop()):  # stopped in the last step
                raise KeyboardInterrupt
        self._save(trained, training, "last")
        if outcome.best_loss is None:
            self._save(trained, training, ADAPTER_FOLDER)
        if context.world.is_main:
            self._record(outcome, training.guards)

    @property
    def _description(self) -> str:
        config = self.setup.config
        what = f"LoRA r {config.lora.rank}" if config.method == "lora" else "all weights"
        cut = f"packs of {self.passes.pack_length:,} tokens" + (
            ", checkpointed" if self.passes.gradient_checkpointing else ""
        )
        return f"{config.objective}, {what}, {cut}"

    def _load(self) -> tuple[Any, Trainer]:
        """The model, and what trains it. Raises: ModelError, TemplateError, MissingExtraError, DataError."""
        from corral.model import packed_forward
        from corral.training.loop import Trainer
        from corral.training.trained_model import ADAPTER_FOLDER, load_trainable

        context, setup, config = self.context, self.setup, self.setup.config
        # A sharded model may not fit on one device as a whole: it is loaded on the CPU and moved shard by shard.
        sharded = config.sharding == "full" and context.world.size > 1
        seed = context.recipe.training_seed(self.number)
        trained: Any = load_trainable(replace(setup, device="cpu") if sharded else setup, context.template, seed=seed)
        if context.world.is_main:
            replace(self.passes, fallbacks=tuple(packed_forward.fallbacks(trained))).write(self.folder)
        training = Trainer(
            trained,
            self.rows.train,
            self.validation.rows,
            build_objective(config),
            config,
            pack_length=self.validation.pack_length,
            seed=seed,
            folder=self.folder,
            save_best=lambda: self._save(trained, training, ADAPTER_FOLDER),
            start=self._start_identity() if context.world.is_main else "",
            world=context.world,
            device=setup.device,
            guards=self._build_guards(trained.config.max_position_embeddings),
        )
        return trained, training

    def _save(self, trained: Any, training: Trainer, name: str) -> None:
        """Write the present weights to a folder of the stage."""
        from corral.model import adapters
        from corral.training.trained_model import ADAPTER_FOLDER, save_full_model

        context, setup, lora = self.context, self.setup, self.setup.config.method == "lora"
        values = training.weights()  # gathers the shards of all processes; the first one writes
        if lora and context.world.is_main:
            with new_directory(self.folder / name) as adapter_folder:
                base = context.recipe.model.base if setup.folder == context.base.folder else str(setup.folder)
                adapters.save(trained, adapter_folder, base=base, weights=values)
                context.template.save(adapter_folder)
        elif not lora and name == ADAPTER_FOLDER:  # a checkpoint holds the last weights
            probe_set = contract.make_probes(context.template)
            scores = training.score([p.ids for p in probe_set], [p.start for p in probe_set])
            if context.world.is_main:
                licences = context.base.licence_files
                save_full_model(trained, values, scores, setup, self.folder, context.template, licences)

    def _record(self, outcome: TrainingResult, guards: StageGuards | None) -> None:
        """Write `outcome.json`, and say how it ended."""
        result: dict[str, Any] = {field: getattr(outcome, field) for field in outcome.__slots__}
        if guards is not None:
            result["guards"] = guards.figures(outcome.steps if outcome.best_loss is None else outcome.best_step)
        write_json(self.folder / "outcome.json", result)
        held_out = "" if outcome.best_loss is None else f"; best held-out loss {outcome.best_loss:.4f}"
        self.context.progress.say(
            f"{outcome.steps} steps, {outcome.tokens:,} tokens at {outcome.tokens / outcome.seconds:.0f} tokens/s{held_out}"
            + (f" at step {outcome.best_step}" if held_out else "")
        )

    def _build_guards(self, context_length: int) -> StageGuards | None:
        """What stops it before it breaks the model, if it aligns one.

        Raises: TemplateError (the model that it starts from knows other prompts), DataError.
        """
        from corral.training.guards import StageGuards
        from corral.training.start_checks import check_prompts, reference_tolerance

        context, setup = self.context, self.setup
        if setup.config.guards is None:
            return None
        if warning := check_prompts(context.template, self.rows.train, setup.folder, stage=self.start):
            context.progress.say(warning)
        return StageGuards(
            setup.config,
            self.number,
            context.template,
            context=context_length,
            tolerance=reference_tolerance(setup.dtype, setup.config.quantization),
            folder=self.folder,
            world=context.world,
            say=context.progress.say,
        )

    def _start_identity(self) -> str:
        """Identifies the model that it starts from, as it is loaded: under it the reference's log-probabilities are kept.
        Empty for an objective without a reference: no files are hashed for it."""
        setup = self.setup
        if not build_objective(setup.config).needs_reference:
            return ""
        folders = [setup.folder, *([setup.adapter] if setup.adapter else [])]
        return " ".join([*map(model_identity, folders), setup.dtype, str(setup.quantization)])

    @contextlib.contextmanager
    def _step_listeners(self) -> Generator[Callable[[StepMetrics], None]]:
        """Passes the metrics of each step to the progress display, the recipe's trackers and the profiler, if any."""
        from corral.training.profiler import StepProfiler
        from corral.training.trackers import Trackers

        context, setup = self.context, self.setup
        trackers = Trackers(
            context.recipe.trackers if context.world.is_main else (),
            self.folder,
            context.recipe.name,
            setup.config.model_dump(mode="json"),
            context.progress.say,
        )
        with contextlib.ExitStack() as stack:
            stack.callback(trackers.finish)
            profile = None
            if context.profile and context.world.is_main:
                profile = stack.enter_context(
                    StepProfiler(self.folder / "profile", context.progress.say, cuda=setup.device.startswith("cuda"))
                )

            def on_step(metrics: StepMetrics) -> None:
                _show_metrics(context.progress, metrics)
                trackers.log(metrics)
                if profile is not None and metrics.step:
                    profile.step()

            yield on_step


def _show_metrics(progress: Progress, metrics: StepMetrics) -> None:
    parts = [] if metrics.loss is None else [f"loss {metrics.loss:.3f}", f"{metrics.tokens_per_second:.0f} tokens/s"]
    parts += _preference_figures(metrics, "")
    if metrics.eval_loss is not None:
        held_out = [f"held-out loss {metrics.eval_loss:.4f}", *_preference_figures(metrics, "eval_")]
        parts.append(held_out[0])
        progress.say(f"step {metrics.step}: {', '.join([*held_out, *_guard_figures(metrics)])}")
    progress.update(metrics.step, ", ".join(parts))


def _preference_figures(metrics: StepMetrics, prefix: str) -> list[str]:
    """How the rewards of chosen and rejected answers differ, if the stage's objective has rewards."""
    names = {"reward_accuracy": "accuracy {:.0%}", "reward_margin": "margin {:.3f}"}
    values = {text: metrics.objective.get(prefix + name) for name, text in names.items()}
    return [text.format(value) for text, value in values.items() if value is not None]


def _guard_figures(metrics: StepMetrics) -> list[str]:
    """What the guards measured after a step, if the stage has any."""
    fall, passed = (metrics.objective.get(name) for name in ("chosen_fall", "basic_prompts_passed"))
    figures = [] if fall is None else [f"log-probability of chosen answers {signed(-100 * fall, 1)} %"]
    return figures if passed is None else [*figures, f"{passed:.0f} basic prompts answered well"]
