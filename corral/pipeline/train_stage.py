"""A training stage: fine-tunes an adapter and merges it, or fine-tunes all weights."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from corral.errors import out_of_memory_errors
from corral.export import contract
from corral.formatting import format_bytes
from corral.model.device import memory_limit
from corral.model.folder import model_identity
from corral.pipeline.context import RunContext, training_stage_name
from corral.progress import Progress
from corral.run.stage_record import Stage
from corral.storage import new_directory, write_json
from corral.training.memory_estimate import ModelShape
from corral.training.passes import Passes, choose_passes, savings

if TYPE_CHECKING:
    from corral.recipe import Train
    from corral.training.step_metrics import StepMetrics
    from corral.training.trained_model import TrainingSetup, ValidationSet


def inputs(context: RunContext, number: int, done: Mapping[str, str]) -> dict[str, Any]:
    """What training stage `number` (from 1) depends on, from the fingerprints of the stages before it."""
    recipe = context.recipe
    before = "prepare" if number == 1 else training_stage_name(recipe, number - 1)
    # These change no result: a run may go on with another number of processes, or on a device with less memory.
    elsewhere = {"sharding", "pack_length", "gradient_checkpointing"}
    return {
        "train": recipe.train[number - 1].model_dump(mode="json", exclude=elsewhere),
        "base": context.base.identity,
        "dtype": recipe.model.dtype,
        "seed": recipe.seed,
        "prepare": done["prepare"],
        "before": done[before],
        **({"adapter": model_identity(context.adapter.folder)} if context.adapter and number == 1 else {}),
    }


def train(context: RunContext, stage: Stage, number: int) -> None:
    """Run training stage `number` (from 1). Raises: OutOfMemoryError (with the settings that would need less)."""
    passes = context.world.broadcast(_choose_passes(context, stage, number) if context.world.is_main else None)
    setup = training_setup(context, number, passes)
    longest = _longest(context)
    hints = [f"--set {setting}" for setting, _ in savings(setup.config, number, longest)]
    hint = (
        f"needs less memory, cheapest first: {', '.join(hints)}; " if hints else ""
    ) + "`corral plan` estimates each"
    with out_of_memory_errors(f"while training on {setup.device}", where=stage.name, hint=hint):
        _fine_tune(context, stage, setup, passes)
    gc.collect()
    if setup.config.method == "lora" and context.world.is_main:
        from corral.training import trained_model

        context.progress.start("Merging the adapter", None)
        licences = context.base.licence_files
        trained_model.save_merged_model(
            setup,
            stage.path,
            context.template,
            validation_set(context, setup),
            licences=licences,
            report=context.progress.say,
        )


def training_setup(context: RunContext, number: int, passes: Passes | None = None) -> TrainingSetup:
    """The model, settings, device and dtype that training stage `number` starts from; by default those that it began with."""
    from corral.training.trained_model import TrainingSetup

    passes = passes or Passes.read(context.run.path / training_stage_name(context.recipe, number))
    config = _config(context, number)
    adapter = context.adapter if number == 1 else None
    return TrainingSetup(
        context.stage_base(number),
        passes.apply(config) if passes else config,
        context.placement.device,
        passes.dtype if passes else context.placement.dtype,
        adapter and adapter.folder,
    )


def _config(context: RunContext, number: int) -> Train:
    """The stage's settings; those of the adapter, if it goes on training one."""
    config, adapter = context.recipe.train[number - 1], context.adapter if number == 1 else None
    return config if adapter is None else config.model_copy(update={"lora": adapter.lora})


def _choose_passes(context: RunContext, stage: Stage, number: int) -> Passes:
    """The passes of a stage: those that it began with, or such as this device has memory for; settings that are given win."""
    config, placement, prepared = _config(context, number), context.placement, context.prepared
    limit = memory_limit(placement.device)
    kind = "cuda" if placement.device.startswith("cuda") else "cpu"
    before = Passes.read(stage.path)
    if before is not None:
        if before.dtype != placement.dtype:
            context.progress.say(f"this stage began in {before.dtype}, and goes on in it")
        automatic = {"pack_length": before.pack_length, "gradient_checkpointing": before.gradient_checkpointing}
        given = config.model_dump(include=set(automatic))
        config = config.model_copy(update={k: v for k, v in automatic.items() if given[k] == "auto"})
    passes = choose_passes(
        ModelShape.from_folder(context.stage_base(number)),
        config,
        [*prepared.train.lengths.tolist(), *prepared.validation.lengths.tolist()],
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


def _longest(context: RunContext) -> int:
    """Tokens of the longest row."""
    prepared = context.prepared
    return max((int(rows.lengths.max()) for rows in (prepared.train, prepared.validation) if len(rows)), default=1)


def validation_set(context: RunContext, setup: TrainingSetup) -> ValidationSet:
    """The held-out rows that a training stage is evaluated on, and the length of its packs."""
    from corral.training.trained_model import ValidationSet

    validation, config = context.prepared.validation, setup.config
    rows = [validation[i] for i in range(min(len(validation), config.evaluate_rows))]
    length = _longest(context) if config.pack_length == "auto" else config.pack_length
    return ValidationSet(rows, length)


def _fine_tune(context: RunContext, stage: Stage, setup: TrainingSetup, passes: Passes) -> None:
    from corral.model import adapters, packed_forward
    from corral.training import optimizers, trained_model
    from corral.training.loop import Trainer
    from corral.training.objectives import OBJECTIVES

    config, validation = setup.config, validation_set(context, setup)
    lora = config.method == "lora"
    # A sharded model may not fit on one device as a whole: it is loaded on the CPU and moved shard by shard.
    sharded = config.sharding == "full" and context.world.size > 1
    trained: Any = trained_model.load_trainable(
        replace(setup, device="cpu") if sharded else setup, context.template, seed=context.recipe.seed
    )
    if context.world.is_main:
        replace(passes, fallbacks=tuple(packed_forward.fallbacks(trained))).write(stage.path)
    probe_set = contract.make_probes(context.template)

    def save(name: str) -> None:
        values = training.weights()  # gathers the shards of all processes; the first one writes
        if lora and context.world.is_main:
            with new_directory(stage.path / name) as folder:
                base = context.recipe.model.base if setup.folder == context.base.folder else str(setup.folder)
                adapters.save(trained, folder, base=base, weights=values)
                if context.adapter is not None:  # its tokenizer may be its own
                    context.template.save(folder)
        elif not lora and name == trained_model.ADAPTER_FOLDER:  # a checkpoint holds the last weights
            scores = training.score([p.ids for p in probe_set], [p.start for p in probe_set])
            if context.world.is_main:
                trained_model.save_full_model(
                    trained, values, scores, setup, stage.path, context.template, context.base.licence_files
                )

    training = Trainer(
        trained,
        context.prepared.train,
        validation.rows,
        OBJECTIVES[config.objective],
        config,
        pack_length=validation.pack_length,
        seed=context.recipe.seed,
        folder=stage.path,
        save_best=lambda: save(trained_model.ADAPTER_FOLDER),
        world=context.world,
        device=setup.device,
    )
    what = f"LoRA r {config.lora.rank}" if lora else "all weights"
    if setup.adapter is not None:
        context.progress.say(f"the adapter {setup.adapter} is trained further; its base stays frozen")
    cut = f"packs of {passes.pack_length:,} tokens" + (", checkpointed" if passes.gradient_checkpointing else "")
    context.progress.start(f"Training ({config.objective}, {what}, {cut})", training.total_steps)
    if warning := optimizers.unsupported(config.optimizer, setup.device):
        context.progress.say(warning)
    with context.interrupts.deferred() as should_stop, _step_listeners(context, stage, setup) as on_step:
        outcome = training.run(on_step=on_step, should_stop=should_stop, warn=context.progress.say)
        if context.world.any_process(should_stop()):  # stopped in the last step
            raise KeyboardInterrupt
    save("last")
    if outcome.best_loss is None:
        save(trained_model.ADAPTER_FOLDER)
    if not context.world.is_main:
        return
    write_json(stage.path / "outcome.json", {field: getattr(outcome, field) for field in outcome.__slots__})
    held_out = "" if outcome.best_loss is None else f"; best held-out loss {outcome.best_loss:.4f}"
    context.progress.say(
        f"{outcome.steps} steps, {outcome.tokens:,} tokens at {outcome.tokens / outcome.seconds:.0f} tokens/s{held_out}"
        + (f" at step {outcome.best_step}" if held_out else "")
    )


@contextlib.contextmanager
def _step_listeners(
    context: RunContext, stage: Stage, setup: TrainingSetup
) -> Generator[Callable[[StepMetrics], None]]:
    """Passes the metrics of each step to the progress display, the recipe's trackers and the profiler, if any."""
    from corral.training.profiler import StepProfiler
    from corral.training.trackers import Trackers

    trackers = Trackers(
        context.recipe.trackers if context.world.is_main else (),
        stage.path,
        context.recipe.name,
        setup.config.model_dump(mode="json"),
        context.progress.say,
    )
    with contextlib.ExitStack() as stack:
        stack.callback(trackers.finish)
        profile = None
        if context.profile and context.world.is_main:
            profile = stack.enter_context(
                StepProfiler(stage.path / "profile", context.progress.say, cuda=setup.device.startswith("cuda"))
            )

        def on_step(metrics: StepMetrics) -> None:
            _show_metrics(context.progress, metrics)
            trackers.log(metrics)
            if profile is not None and metrics.step:
                profile.step()

        yield on_step


def _show_metrics(progress: Progress, metrics: StepMetrics) -> None:
    parts = [] if metrics.loss is None else [f"loss {metrics.loss:.3f}", f"{metrics.tokens_per_second:.0f} tokens/s"]
    if metrics.eval_loss is not None:
        parts.append(f"held-out loss {metrics.eval_loss:.4f}")
        progress.say(f"step {metrics.step}: held-out loss {metrics.eval_loss:.4f}")
    progress.update(metrics.step, ", ".join(parts))
