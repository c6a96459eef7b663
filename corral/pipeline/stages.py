"""What each stage does: reads a Run, writes its own directory in it. No stage calls another.

Knows nothing about order, fingerprints or what is done already (pipeline), nor about terminals.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corral.errors import DataError
from corral.interrupts import Interrupts
from corral.model.device import pack_length
from corral.progress import Progress
from corral.recipe import Recipe
from corral.run.directory import Run, Stage
from corral.storage import link_or_copy_tree, new_directory, remove_tree, write_json
from corral.training.distributed import World

if TYPE_CHECKING:
    from corral.data.prepare import Prepared
    from corral.export_forms import ExportForm
    from corral.model.loading import DType, ModelSource
    from corral.template import Template
    from corral.training.step_metrics import StepMetrics
    from corral.training.trained_model import TrainingSetup, ValidationSet


@dataclass
class Work:
    """What stages share: the run, its recipe, where to tell of progress, and the base model, loaded when first needed."""

    run: Run
    recipe: Recipe
    progress: Progress
    interrupts: Interrupts
    """How a stage learns that it should stop at the next good moment."""
    world: World = field(default_factory=World)
    """The processes that train together; everything else is done by the first of them."""
    profile: bool = False
    """Whether to record where the time of some training steps goes."""

    @cached_property
    def base(self) -> ModelSource:
        """The base model's folder, fetched or converted if need be."""
        from corral.model.loading import resolve_model

        self.progress.start(f"Fetching {self.recipe.model.base}", None)
        try:
            return resolve_model(self.recipe.model.base, progress=self.progress.say)
        finally:
            self.progress.stop()

    @cached_property
    def template(self) -> Template:
        """The recipe's chat template on the base's tokenizer."""
        from corral.model.loading import load_tokenizer
        from corral.template import Template

        return Template.load(load_tokenizer(self.base.folder), self.recipe.model.template)

    @cached_property
    def placement(self) -> tuple[str, DType]:
        """(device, dtype) to compute on and in."""
        from corral.model.device import choose_device

        return choose_device(self.recipe.model.device, self.recipe.model.dtype)

    @cached_property
    def prepared(self) -> Prepared:
        """The prepared rows."""
        from corral.data.prepare import Prepared

        return Prepared.open(self.run.path / "prepare")

    def base_of(self, number: int) -> Path:
        """The model that training stage `number` (from 1) starts from."""
        return self.base.folder if number == 1 else self.run.path / stage_name(self.recipe, number - 1) / "merged"


def stage_name(recipe: Recipe, number: int) -> str:
    """The directory of training stage `number`, from 1."""
    return f"train-{number}-{recipe.train[number - 1].objective}"


def prepare(work: Work, stage: Stage) -> None:
    """Rows → examples, split and counted. Raises: GateError (more is lost than the recipe allows)."""
    from corral.data.prepare import prepare as prepare_rows

    work.progress.start("Preparing rows", None)
    rows = prepare_rows(work.recipe.data, work.template, stage.path, work.recipe.seed, work.progress)
    for label, source in rows.ledger["sources"].items():
        work.progress.say(f"{label}: {source['why']}")
        if source["lost"]:
            lost, asked = source["lost"], source["asked"]
            work.progress.say(
                f"{label}: {lost:,.0f} of {asked:,.0f} rows are lost ({lost / asked:.2%}); the ledger says why"
            )
        if source["contaminated"] and work.recipe.data.contamination == "report":
            work.progress.say(f"{label}: {source['contaminated']:,} training rows share passages with held-out rows")
    _refuse_comparisons(work.recipe, rows)
    repeated = (
        f" ({rows.train.distinct_count} of them different)" if rows.train.distinct_count < len(rows.train) else ""
    )
    work.progress.say(
        f"{len(rows.train)} rows to train on{repeated}, {len(rows.validation)} for validation, {len(rows.test)} for testing; "
        f"{int(rows.train.lengths.sum()):,} training tokens, {int(rows.train.trained_tokens.sum()):,} of them trained"
    )


def _refuse_comparisons(recipe: Recipe, rows: Prepared) -> None:
    """Raises DataError where `sft` would learn the worse answers too."""
    from corral.messages import Feedback, Preference

    if all(stage.objective != "sft" for stage in recipe.train):
        return
    found = next((row for row in rows.train if isinstance(row.record, Preference | Feedback)), None)
    if found is not None:
        kind = "a better and a worse answer" if isinstance(found.record, Preference) else "an answer with a score"
        raise DataError(
            f"row {found.index} holds {kind}, and the objective `sft` would learn either",
            where=found.source,
            hint='give the source a format that makes conversations of its rows (for HH data, format = "hh-rlhf")',
        )


def train(work: Work, stage: Stage, number: int) -> None:
    """Fine-tune an adapter and merge it into the model it was trained on, or fine-tune the whole model."""
    start = _start(work, number)
    _fit(work, stage, start)
    gc.collect()
    if start.config.method == "lora" and work.world.is_main:
        from corral.training import trained_model

        work.progress.start("Merging the adapter", None)
        licences = work.base.licence_files
        trained_model.save_merged_model(
            start, stage.path, work.template, _measure(work, start), licences=licences, report=work.progress.say
        )


def _start(work: Work, number: int) -> TrainingSetup:
    from corral.training.trained_model import TrainingSetup

    return TrainingSetup(work.base_of(number), work.recipe.train[number - 1], *work.placement)


def _measure(work: Work, start: TrainingSetup) -> ValidationSet:
    """The rows that a training stage is evaluated on, and packs of the length it uses."""
    from corral.training.trained_model import ValidationSet

    validation, config = work.prepared.validation, start.config
    rows = [validation[i] for i in range(min(len(validation), config.evaluate_rows))]
    return ValidationSet(rows, pack_length(config.pack_length, work.recipe.data.max_length, start.device))


def _fit(work: Work, stage: Stage, start: TrainingSetup) -> None:
    from corral.export import contract
    from corral.model import adapters
    from corral.training import optimizers, trained_model
    from corral.training.loop import Trainer
    from corral.training.objectives import OBJECTIVES

    config, measure = start.config, _measure(work, start)
    lora = config.method == "lora"
    # What is to be sharded may fit on no device as a whole: it goes there part by part.
    sharded = config.sharding == "full" and work.world.size > 1
    model = trained_model.load_base(replace(start, device="cpu") if sharded else start)
    if lora:
        trained_model.check_special_tokens(model, work.template)
    trained: Any = trained_model.make_trainable(model, start, seed=work.recipe.seed)
    probe_set = contract.make_probes(work.template)

    def save(name: str) -> None:
        values = training.weights()  # all processes give their parts, one writes
        if lora and work.world.is_main:
            with new_directory(stage.path / name) as folder:
                base = work.recipe.model.base if start.folder == work.base.folder else str(start.folder)
                adapters.save(trained, folder, base=base, weights=values)
        elif not lora and name == trained_model.ADAPTER_FOLDER:  # a checkpoint holds the last weights
            scores = training.score([p.ids for p in probe_set], [p.start for p in probe_set])
            if work.world.is_main:
                trained_model.save_full_model(
                    trained, values, scores, start, stage.path, work.template, work.base.licence_files
                )

    training = Trainer(
        trained,
        work.prepared.train,
        measure.rows,
        OBJECTIVES[config.objective],
        config,
        pack_length=measure.pack_length,
        seed=work.recipe.seed,
        folder=stage.path,
        save_best=lambda _: save(trained_model.ADAPTER_FOLDER),
        world=work.world,
        device=start.device,
    )
    what = f"LoRA r {config.lora.rank}" if lora else "all weights"
    work.progress.start(f"Training ({config.objective}, {what})", training.total_steps)
    if said := optimizers.unsupported(config.optimizer, start.device):
        work.progress.say(said)
    with work.interrupts.deferred() as should_stop, _listeners(work, stage, start) as on_step:
        outcome = training.run(on_step=on_step, should_stop=should_stop, warn=work.progress.say)
        if work.world.any_process(should_stop()):  # asked for in the last step
            raise KeyboardInterrupt
    save("last")
    if outcome.best_loss is None:
        save(trained_model.ADAPTER_FOLDER)
    if not work.world.is_main:
        return
    write_json(stage.path / "outcome.json", {field: getattr(outcome, field) for field in outcome.__slots__})
    held_out = "" if outcome.best_loss is None else f"; best held-out loss {outcome.best_loss:.4f}"
    work.progress.say(
        f"{outcome.steps} steps, {outcome.tokens:,} tokens at {outcome.tokens / outcome.seconds:.0f} tokens/s{held_out}"
        + (f" at step {outcome.best_step}" if held_out else "")
    )


@contextlib.contextmanager
def _listeners(work: Work, stage: Stage, start: TrainingSetup) -> Generator[Callable[[StepMetrics], None]]:
    """Who is told of each step: the screen, the recipe's trackers, the profiler if one is asked for."""
    from corral.training.profiler import StepProfiler
    from corral.training.trackers import Trackers

    trackers = Trackers(
        work.recipe.trackers if work.world.is_main else (),
        stage.path,
        work.recipe.name,
        start.config.model_dump(mode="json"),
        work.progress.say,
    )
    with contextlib.ExitStack() as stack:
        stack.callback(trackers.finish)
        profile = None
        if work.profile and work.world.is_main:
            profile = stack.enter_context(
                StepProfiler(stage.path / "profile", work.progress.say, cuda=start.device.startswith("cuda"))
            )

        def on_step(metrics: StepMetrics) -> None:
            _tell(work.progress, metrics)
            trackers.log(metrics)
            if profile is not None and metrics.step:
                profile.step()

        yield on_step


def _tell(progress: Progress, metrics: StepMetrics) -> None:
    parts = [] if metrics.loss is None else [f"loss {metrics.loss:.3f}", f"{metrics.tokens_per_second:.0f} tokens/s"]
    if metrics.eval_loss is not None:
        parts.append(f"held-out loss {metrics.eval_loss:.4f}")
        progress.say(f"step {metrics.step}: held-out loss {metrics.eval_loss:.4f}")
    progress.update(metrics.step, ", ".join(parts))


def merge(work: Work, stage: Stage) -> None:
    """Promote the last trained model, if the contract between it and what was trained holds.

    Raises:
        ContractError: it does not; the model stays in `candidate`.
    """
    from corral.export import contract
    from corral.training import trained_model

    number = len(work.recipe.train)
    start, trained = _start(work, number), work.run.path / stage_name(work.recipe, number)
    candidate = stage.path / "candidate"
    with new_directory(candidate) as folder:
        link_or_copy_tree(trained / trained_model.MERGED_FOLDER, folder)
    probe_set = contract.make_probes(work.template)
    work.progress.start("Measuring the contract", None)
    measured, found = trained_model.check_merged_model(start, trained, candidate, probe_set, _measure(work, start))
    checks = [
        contract.check_token_ids(work.template, candidate),
        contract.check_stop_ids(work.template, candidate),
        *found,
    ]
    files = contract.model_files(candidate)
    contract.write(
        candidate / contract.CONTRACT_FILE, work.template, probe_set, measured, checks, form=start.dtype, files=files
    )
    contract.raise_if_failed(checks, where=candidate)
    remove_tree(stage.path / "model")  # what a stop between promoting and recording left
    candidate.rename(stage.path / "model")
    for check in checks:
        work.progress.say(f"contract, {check.name}: {check.detail}")


def export(work: Work, stage: Stage) -> None:
    """The recipe's other forms of the merged model, each with its contract."""
    from corral.export.export import export_form

    for form in forms(work.recipe):
        for old in sorted((work.run.path / "superseded").glob("export-*")):
            form.copy_missing_from(old, stage.path)
        export_form(work.run.merged_model, stage.path, form, work.progress)


def forms(recipe: Recipe) -> list[ExportForm]:
    """The forms that a recipe asks for, also to evaluate them."""
    from corral.export_forms import ExportForm

    wanted = recipe.export
    named = [
        *(ExportForm("gguf", kind) for kind in wanted.gguf),
        *(ExportForm("openvino", kind) for kind in wanted.openvino),
    ]
    return list(dict.fromkeys([*named, *(v.form for v in recipe.evaluate.variants if v.form is not None)]))


def report(work: Work, stage: Stage) -> None:
    """One page about the run."""
    from corral.report.write import build

    work.progress.start("Writing the report", None)
    build(work.run.path)
