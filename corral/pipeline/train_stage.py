"""A training stage: fine-tunes an adapter and merges it, or fine-tunes all weights."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corral.errors import GateError, RunError, out_of_memory_errors, require
from corral.evaluation.alignment_gate import check_aligned_model
from corral.export import contract
from corral.formatting import format_bytes
from corral.model.device import memory_limit
from corral.model.folder import read_json
from corral.pipeline.context import RunContext
from corral.pipeline.fine_tuning import FineTuning
from corral.pipeline.start_comparison import StartComparison
from corral.recipe.alignment import Guards
from corral.run.promotion import MERGED_FOLDER, read_promotion
from corral.run.stage_record import Settings, StageFolder
from corral.storage import write_json
from corral.training.alignment_warnings import WARNINGS_FILE, row_warnings, settings_warnings
from corral.training.basic_prompts import encode_basic_prompts, read_basic_prompts
from corral.training.memory_estimate import ModelShape
from corral.training.objective_table import TAKES
from corral.training.passes import Passes, choose_passes, savings
from corral.training.stage_needs import stage_bytes

if TYPE_CHECKING:
    from corral.model.adapter_files import AdapterFiles
    from corral.recipe import Train
    from corral.training.stage_rows import StageRows
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
        """Its packages, and basic prompts that it can answer. Raises: MissingExtraError, ModelError, DataError."""
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
            where = f"train.{self.number - 1}.guards.prompts"
            prompts = read_basic_prompts(config.guards.prompts, where)
            room = read_json(context.base.folder / "config.json").get("max_position_embeddings")
            encode_basic_prompts(prompts, context.template, room, config.guards.max_tokens, where)
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
        before = context.recipe.stage_names[self.start - 1] if self.start else None
        comparison = self._start_comparison(folder.path, setup)
        if comparison is not None and setup.config.guards is not None:
            comparison.check_quantisation(setup.config.guards.quantisation_gap, f"train.{self.number - 1}")
        with out_of_memory_errors(f"while training on {setup.device}", where=self.name, hint=hint):
            FineTuning(
                context, self.number, folder.path, setup, passes, self.rows, self._validation_set(setup), before
            ).run()
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
        hint = f"look at its rows, or lower its rate: --set {place}.optimizer.lr={self.config.optimizer.lr / 4:.2g}"
        settings = [fault.setting for fault in result.faults]
        if None not in settings:
            accept = " ".join(f"--set {place}.guards.{setting}" for setting in settings)
            hint += f"; or accept it, without training again: {accept}"
        faults = "; ".join(fault.what for fault in result.faults)
        outcome = f"the model of {self.name} is kept and not promoted"
        with contextlib.suppress(RunError):
            promotion = read_promotion(self.context.run.path)
            if promotion is not None and promotion.fingerprint == folder.fingerprint:
                since = promotion.promoted[:10]
                outcome = f"the run stands for the model of {self.name} since {since}, which would not be promoted now"
        return GateError(
            f"{outcome}: {faults} ({'; '.join(result.figures)})",
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
