"""A training stage: fine-tunes an adapter and merges it, or fine-tunes all weights."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corral.errors import GateError, out_of_memory_errors, require
from corral.evaluation.alignment_gate import check_aligned_model
from corral.export import contract
from corral.formatting import format_bytes
from corral.model.device import memory_limit
from corral.model.folder import model_identity
from corral.pipeline.context import RunContext
from corral.pipeline.start_comparison import StartComparison
from corral.progress import Progress
from corral.recipe.alignment import Guards
from corral.run.promotion import MERGED_FOLDER
from corral.run.stage_record import Settings, StageFolder, earlier_folders
from corral.storage import new_directory, write_json
from corral.training.alignment_warnings import WARNINGS_FILE, row_warnings, settings_warnings
from corral.training.basic_prompts import read_basic_prompts
from corral.training.memory_estimate import ModelShape
from corral.training.objective_table import TAKES, build_objective
from corral.training.passes import Passes, choose_passes, savings
from corral.training.stage_needs import stage_bytes

if TYPE_CHECKING:
    from corral.model.adapter_files import AdapterFiles
    from corral.recipe import Train
    from corral.training.guards import StageGuards
    from corral.training.stage_rows import StageRows
    from corral.training.step_metrics import StepMetrics
    from corral.training.trained_model import TrainingSetup, ValidationSet


@dataclass(frozen=True)
class TrainStage:
    """Training stage `number`, from 1."""

    context: RunContext
    number: int
    disposable = (
        "checkpoints/",
        "last/",
        "profile/",
        "reference/",
        "guards.json",
        "basic_prompts.jsonl",
        "metrics.jsonl",
        "events.out",
    )

    @property
    def name(self) -> str:
        """`train-N-NAME`."""
        return self.context.recipe.stage_names[self.number - 1]

    @property
    def start(self) -> int:
        """The number of the stage whose model it starts from; 0: the base model."""
        return self.context.recipe.start_of(self.number)

    @property
    def adapter(self) -> AdapterFiles | None:
        """The adapter that it trains further, if any."""
        return self.context.adapter if self.number == 1 else None

    @property
    def config(self) -> Train:
        """Its settings; with those of the adapter, if it goes on training one."""
        config = self.context.recipe.train[self.number - 1]
        return config if self.adapter is None else config.model_copy(update={"lora": self.adapter.lora})

    def needs(self) -> int:
        """Its packages. Raises: MissingExtraError, ModelError."""
        context, config = self.context, self.context.recipe.train[self.number - 1]
        context.check_readable(self)
        for tracker in context.recipe.trackers:
            require(tracker, "trackers")
        if config.optimizer.kind != "adamw":
            require("bitsandbytes", "quant")
        if config.quantization != "none":
            from corral.model.quantisation import import_bitsandbytes

            import_bitsandbytes()
        for warning in self._settings_warnings:
            context.progress.say(f"{self.name}: {warning}")
        if config.guards is not None:
            read_basic_prompts(config.guards.prompts, f"train.{self.number - 1}.guards.prompts")
        shape = ModelShape.from_folder(context.base.folder)
        return sum(stage_bytes(shape, self.config, context.placement.dtype).values())

    def inputs(self, fingerprints: Mapping[str, str]) -> dict[str, Any]:
        """Its settings, its rows, and the model that it starts from."""
        context, recipe = self.context, self.context.recipe
        # These change no result (a run may go on with another number of processes, or on a device with less memory), or are
        # given below by what they stand for.
        elsewhere = {"sharding", "pack_length", "gradient_checkpointing", "name", "start", "sources", "seed", "guards"}
        before = (
            {recipe.stage_names[self.start - 1]: fingerprints[recipe.stage_names[self.start - 1]]} if self.start else {}
        )
        return {
            "train": Settings.of(recipe.train[self.number - 1], elsewhere),
            "stages": before,
            "base": None if self.start else context.base_identity,
            "adapter": context.adapter_identity(self) if self.number == 1 else None,
            "template": context.template_source(self),
            "dtype": recipe.model.dtype,
            "seed": recipe.training_seed(self.number),
            "rows": self.rows.digest,
        }

    @cached_property
    def rows(self) -> StageRows:
        """The rows that it trains and is evaluated on. Raises: DataError (there are none to train on)."""
        from corral.training.stage_rows import StageRows

        return StageRows.select(self.context.prepared, self._config_with_labels, self.number)

    @property
    def _config_with_labels(self) -> Train:
        """Its settings in the recipe, with its sources as the prepared rows name them; they may have other names by now."""
        config = self.context.recipe.train[self.number - 1]
        if config.sources is None:
            return config
        names = [source.label for source in self.context.recipe.data.sources]
        labels = tuple(self.context.prepared.labels[names.index(name)] for name in config.sources)
        return config.model_copy(update={"sources": labels})

    def run(self, folder: StageFolder) -> None:
        """Train, merge, and certify the merged model.

        Raises:
            OutOfMemoryError: with the settings that would need less.
            ContractError: the merged model is not the one that was trained; it stays in the folder, with its contract.
        """
        context = self.context
        passes = context.world.broadcast(self._choose_passes(folder.path) if context.world.is_main else None)
        setup = self._setup(passes)
        if context.world.is_main:
            self._warn(folder.path)
        hints = [f"--set {setting}" for setting, _ in savings(setup.config, self.number, max(self.rows.lengths))]
        hint = (
            f"needs less memory, cheapest first: {', '.join(hints)}; " if hints else ""
        ) + "`corral plan` estimates each"
        comparison = self._start_comparison(folder.path, setup)
        if comparison is not None and setup.config.guards is not None:
            comparison.check_quantisation(setup.config.guards.quantisation_gap, f"train.{self.number - 1}")
        with out_of_memory_errors(f"while training on {setup.device}", where=self.name, hint=hint):
            self._fine_tune(folder.path, setup, passes)
        gc.collect()
        if context.world.is_main:
            self._merge(folder.path, setup)
        if comparison is not None:
            comparison.measure()
            result = check_aligned_model(folder.path, self.guards)
            context.progress.say(f"the model of {self.name} is {result}")

    @property
    def guards(self) -> Guards:
        """Its limits, as the recipe has them now."""
        return self.config.guards or Guards()

    def gate_error(self, folder: StageFolder) -> GateError | None:
        """Why the model in its finished folder must not be promoted, nor trained further; None if it may be."""
        if self.config.objective == "sft":
            return None
        result, place = check_aligned_model(folder.path, self.guards), f"train.{self.number - 1}"
        if not result.faults:
            return None
        hint = f"look at its rows, or lower its rate: --set {place}.optimizer.lr={self.config.optimizer.lr / 3:.1g}"
        settings = [fault.setting for fault in result.faults]
        if None not in settings:
            accept = " ".join(f"--set {place}.guards.{setting}" for setting in settings)
            hint += f"; or accept it, without training again: {accept}"
        faults = "; ".join(fault.what for fault in result.faults)
        return GateError(
            f"the model of {self.name} is kept and not promoted: {faults} ({'; '.join(result.figures)})",
            where=str(folder.path),
            hint=hint,
        )

    def _start_comparison(self, folder: Path, setup: TrainingSetup) -> StartComparison | None:
        """For a stage that aligns, in the first process; else None."""
        config = self._config_with_labels
        if config.objective == "sft" or not self.context.world.is_main:
            return None
        validation = self.context.prepared.validation
        return StartComparison(self.context, folder, setup, validation.select(config.sources, TAKES[config.objective]))

    @cached_property
    def _settings_warnings(self) -> list[str]:
        starts_from_base = self.start == 0 and self.adapter is None
        return settings_warnings(self.config, self.context.base.folder if starts_from_base else None)

    def _warn(self, folder: Path) -> None:
        """Say what may spoil a stage that aligns a model, once, and keep it for the report."""
        if self.config.objective == "sft" or (folder / WARNINGS_FILE).exists():
            return
        warnings = row_warnings(self.context.prepared, self._config_with_labels, self.rows)
        for warning in warnings:
            self.context.progress.say(f"{self.name}: {warning}")
        write_json(folder / WARNINGS_FILE, [*self._settings_warnings, *warnings])

    def _setup(self, passes: Passes) -> TrainingSetup:
        """The model, settings, device and dtype that it starts from."""
        from corral.training.trained_model import TrainingSetup

        folder = self.context.model_of_stage(self.start)
        adapter = self.adapter and self.adapter.folder
        return TrainingSetup(folder, passes.apply(self.config), self.context.placement.device, passes.dtype, adapter)

    def _choose_passes(self, folder: Path) -> Passes:
        """The passes that it began with, or such as this device has memory for; settings that are given win."""
        context, config, placement = self.context, self.config, self.context.placement
        limit = memory_limit(placement.device)
        kind = "cuda" if placement.device.startswith("cuda") else "cpu"
        before = Passes.read(folder)
        if before is not None:
            if before.dtype != placement.dtype:
                context.progress.say(f"this stage began in {before.dtype}, and goes on in it")
            automatic = {"pack_length": before.pack_length, "gradient_checkpointing": before.gradient_checkpointing}
            given = config.model_dump(include=set(automatic))
            config = config.model_copy(update={k: v for k, v in automatic.items() if given[k] == "auto"})
        passes = choose_passes(
            ModelShape.from_folder(context.model_of_stage(self.start)),
            config,
            self.rows.lengths,
            kind,
            before.dtype if before else placement.dtype,
            # The estimate is for a model that each process holds whole.
            limit.free if limit and config.sharding == "none" else None,
        )
        if not passes.fits and limit is not None:
            context.progress.say(
                f"training may run out of memory: it needs about {format_bytes(passes.estimate)}, and {limit.reason} has "
                f"{format_bytes(limit.free)} free; `corral plan` measures it"
            )
        return passes

    def _validation_set(self, setup: TrainingSetup) -> ValidationSet:
        """The held-out rows that it is evaluated on, and the length of their packs."""
        from corral.training.trained_model import ValidationSet

        validation, config = self.rows.validation, setup.config
        rows = [validation[i] for i in range(min(len(validation), config.evaluate_rows))]
        return ValidationSet(rows, max(self.rows.lengths) if config.pack_length == "auto" else config.pack_length)

    def _merge(self, folder: Path, setup: TrainingSetup) -> None:
        """Merge its adapter, if it trained one, and compare the merged model with the one that was trained."""
        from corral.training import trained_model
        from corral.training.merge_check import check_merged_model

        context, merged = self.context, folder / MERGED_FOLDER
        validation = self._validation_set(setup)
        if setup.config.method == "lora":
            context.progress.start("Merging the adapter", None)
            trained_model.save_merged_model(
                setup,
                folder,
                context.template,
                validation,
                licences=context.base.licence_files,
                report=context.progress.say,
            )
        probe_set = contract.make_probes(context.template)
        context.progress.start("Measuring the contract", None)
        measured, checks = check_merged_model(setup, folder, merged, probe_set, validation)
        for check in contract.certify_merged(merged, context.template, probe_set, measured, checks, form=setup.dtype):
            context.progress.say(f"contract, {check.name}: {check.detail}")

    def _fine_tune(self, folder: Path, setup: TrainingSetup, passes: Passes) -> None:
        from corral.model import adapters, packed_forward
        from corral.training import optimizers, trained_model
        from corral.training.loop import Trainer

        context, config, validation = self.context, setup.config, self._validation_set(setup)
        lora = config.method == "lora"
        # A sharded model may not fit on one device as a whole: it is loaded on the CPU and moved shard by shard.
        sharded = config.sharding == "full" and context.world.size > 1
        seed = context.recipe.training_seed(self.number)
        trained: Any = trained_model.load_trainable(
            replace(setup, device="cpu") if sharded else setup,
            context.template,
            seed=context.recipe.training_seed(self.number),
        )
        if context.world.is_main:
            replace(passes, fallbacks=tuple(packed_forward.fallbacks(trained))).write(folder)
        probe_set = contract.make_probes(context.template)

        def save(name: str) -> None:
            values = training.weights()  # gathers the shards of all processes; the first one writes
            if lora and context.world.is_main:
                with new_directory(folder / name) as adapter_folder:
                    base = context.recipe.model.base if setup.folder == context.base.folder else str(setup.folder)
                    adapters.save(trained, adapter_folder, base=base, weights=values)
                    context.template.save(adapter_folder)
            elif not lora and name == trained_model.ADAPTER_FOLDER:  # a checkpoint holds the last weights
                scores = training.score([p.ids for p in probe_set], [p.start for p in probe_set])
                if context.world.is_main:
                    trained_model.save_full_model(
                        trained, values, scores, setup, folder, context.template, context.base.licence_files
                    )

        training = Trainer(
            trained,
            self.rows.train,
            validation.rows,
            build_objective(config),
            config,
            pack_length=validation.pack_length,
            seed=seed,
            folder=folder,
            save_best=lambda: save(trained_model.ADAPTER_FOLDER),
            start=self._start_identity(setup) if context.world.is_main else "",
            world=context.world,
            device=setup.device,
            guards=self._build_guards(folder, setup, trained.config.max_position_embeddings),
        )
        what = f"LoRA r {config.lora.rank}" if lora else "all weights"
        if setup.adapter is not None:
            context.progress.say(f"the adapter {setup.adapter} is trained further; its base stays frozen")
        cut = f"packs of {passes.pack_length:,} tokens" + (", checkpointed" if passes.gradient_checkpointing else "")
        if warning := optimizers.unsupported(config.optimizer, setup.device):
            context.progress.say(warning)
        if training.reference_rows:
            context.progress.start("Computing log-probabilities of the reference", training.reference_rows)
            with context.interrupts.deferred() as should_stop:
                training.prepare_reference(
                    on_rows=lambda n: context.progress.update(n, ""),
                    should_stop=should_stop,
                    earlier=earlier_folders(folder),
                )
        context.progress.start(f"Training ({config.objective}, {what}, {cut})", training.total_steps)
        with context.interrupts.deferred() as should_stop, _step_listeners(context, folder, setup) as on_step:
            outcome = training.run(on_step=on_step, should_stop=should_stop, warn=context.progress.say)
            if context.world.any_process(should_stop()):  # stopped in the last step
                raise KeyboardInterrupt
        save("last")
        if outcome.best_loss is None:
            save(trained_model.ADAPTER_FOLDER)
        if not context.world.is_main:
            return
        result: dict[str, Any] = {field: getattr(outcome, field) for field in outcome.__slots__}
        if training.guards is not None:
            kept = outcome.steps if outcome.best_loss is None else outcome.best_step
            result["guards"] = training.guards.figures(kept)
        write_json(folder / "outcome.json", result)
        held_out = "" if outcome.best_loss is None else f"; best held-out loss {outcome.best_loss:.4f}"
        context.progress.say(
            f"{outcome.steps} steps, {outcome.tokens:,} tokens at {outcome.tokens / outcome.seconds:.0f} tokens/s{held_out}"
            + (f" at step {outcome.best_step}" if held_out else "")
        )

    def _build_guards(self, folder: Path, setup: TrainingSetup, longest: int) -> StageGuards | None:
        """What stops it before it breaks the model, if it aligns one.

        Raises: TemplateError (the model that it starts from knows other prompts), DataError.
        """
        from corral.training.guards import StageGuards
        from corral.training.start_checks import check_prompts, reference_tolerance

        context, config = self.context, setup.config
        if config.guards is None:
            return None
        before = context.recipe.stage_names[self.start - 1] if self.start else None
        if warning := check_prompts(context.template, self.rows.train, setup.folder, stage=before):
            context.progress.say(warning)
        return StageGuards(
            config,
            self.number,
            context.template,
            longest=longest,
            tolerance=reference_tolerance(setup.dtype, config.quantization),
            folder=folder,
            world=context.world,
            say=context.progress.say,
        )

    @staticmethod
    def _start_identity(setup: TrainingSetup) -> str:
        """Identifies the model that it starts from, as it is loaded: under it the reference's log-probabilities are kept.
        Empty for an objective without a reference: no files are hashed for it."""
        if not build_objective(setup.config).needs_reference:
            return ""
        folders = [setup.folder, *([setup.adapter] if setup.adapter else [])]
        return " ".join([*map(model_identity, folders), setup.dtype, str(setup.quantization)])


@contextlib.contextmanager
def _step_listeners(
    context: RunContext, folder: Path, setup: TrainingSetup
) -> Generator[Callable[[StepMetrics], None]]:
    """Passes the metrics of each step to the progress display, the recipe's trackers and the profiler, if any."""
    from corral.training.profiler import StepProfiler
    from corral.training.trackers import Trackers

    trackers = Trackers(
        context.recipe.trackers if context.world.is_main else (),
        folder,
        context.recipe.name,
        setup.config.model_dump(mode="json"),
        context.progress.say,
    )
    with contextlib.ExitStack() as stack:
        stack.callback(trackers.finish)
        profile = None
        if context.profile and context.world.is_main:
            profile = stack.enter_context(
                StepProfiler(folder / "profile", context.progress.say, cuda=setup.device.startswith("cuda"))
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
    figures = [] if fall is None else [f"log-probability of chosen answers {-fall:+.1%}"]
    return figures if passed is None else [*figures, f"{passed:.0f} basic prompts answered well"]
