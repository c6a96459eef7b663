"""The evaluate stage: measures all variants of a run on the same rows, each model loaded once, and compares them."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corral.answering.answerer import Answerer
from corral.answering.examples import training_examples
from corral.answering.identity import AnswerIdentity, examples_digest, identify_model
from corral.answering.sync import SyncAnswerer
from corral.engines.registry import default_engine, load_engine
from corral.errors import InputError
from corral.evaluation import scorecard, tasks
from corral.evaluation.inference import Item
from corral.evaluation.measurements import EvaluationData, Measurements, VariantSpec
from corral.evaluation.scorecard import Scorecard
from corral.messages import Conversation
from corral.model.device import choose_device
from corral.model.loading import load_template
from corral.model.naming import find_model_folder
from corral.pipeline.context import RunContext
from corral.recipe import Recipe
from corral.recipe.evaluate import BUILT_IN_VARIANTS
from corral.run.directory import Run
from corral.run.stage_record import Stage, read_fingerprint, read_record
from corral.storage import write_atomic

if TYPE_CHECKING:
    from corral.engines.registry import LocalEngine
    from corral.evaluation.scoring import VariantRows
    from corral.export_forms import ExportForm

SCORECARD = "scorecard.json"
BASELINE = "base"


@dataclass(frozen=True, slots=True)
class _Model:
    """A model in an engine; variants that differ only in how it is asked share it."""

    name: str
    """`base`, `tuned`, or a form of the tuned model."""
    form: ExportForm | None
    engine: LocalEngine


def evaluate(context: RunContext, stage: Stage) -> None:
    """Measure all variants on test rows and public questions, and write the scorecard.

    Raises:
        CorralError: a variant cannot be loaded or asked; what was measured before is kept.
    """
    config, data = context.recipe.evaluate, _evaluation_data(context)
    variants_by_model = _variants_by_model(context)
    all_variants = [variant for variants in variants_by_model.values() for variant in variants]
    measurements = Measurements(stage.path)
    for old in sorted((context.run.path / "superseded").glob("evaluate-*")):
        if old.name != "evaluate-damaged":
            measurements.reuse_rows(old, all_variants, data)
    for model, same_model in variants_by_model.items():
        missing = [variant for variant in same_model if not measurements.is_complete(variant, data)]
        if missing:
            _measure(context, model, missing, measurements, data)
    measurements.finish(all_variants, data)
    variants = {variant.name: variant for variant in all_variants}
    card = scorecard.build_scorecard(
        {
            name: replace(measurements.variant_rows(name), conditions=variants[name].conditions(data.tasks))
            for name in (*BUILT_IN_VARIANTS, *(v.name for v in config.variants))
        },
        baseline=BASELINE,
        compared_with={variant.name: variant.compared_with for variant in config.variants},
        seed=context.recipe.seed,
        primary=config.primary,
    )
    write_atomic(stage.path / SCORECARD, card.to_json())


def _variants_by_model(context: RunContext) -> dict[_Model, list[VariantSpec]]:
    """The variants by their model, so that each model is loaded once."""
    recipe, default = context.recipe, evaluation_engine(context)
    specs = [(name, _Model(name, None, default), recipe.answer) for name in BUILT_IN_VARIANTS]
    for variant in recipe.evaluate.variants:
        own = "openvino" if variant.form is not None and variant.form.target == "openvino" else default
        model = _Model(variant.model, variant.form, variant.engine or own)
        specs.append((variant.name, model, variant.answer_settings(recipe.answer)))
    by_model: dict[_Model, list[VariantSpec]] = {}
    for name, model, settings in specs:
        variants = by_model.setdefault(model, [])
        seed = recipe.seed if settings.seed is None else settings.seed
        examples = examples_digest(settings.shots, lambda: _fingerprint(context, "prepare"))
        identity = _model_identity(context, model).asked(settings, seed, examples)
        variants.append(VariantSpec(name, identity, with_loss=not variants))
    return by_model


def _model_identity(context: RunContext, model: _Model) -> AnswerIdentity:
    weights = context.base.identity if model.name == "base" else f"{_fingerprint(context, 'merge')} {model.form or ''}"
    placement = context.placement
    return identify_model(weights, context.template, model.engine, dtype=placement.dtype, device=placement.device)


def _fingerprint(context: RunContext, stage: str) -> str:
    fingerprint = read_fingerprint(context.run.path, stage)
    assert fingerprint is not None, "the stages before this one are finished"
    return fingerprint


def _evaluation_data(context: RunContext) -> EvaluationData:
    """The rows and questions that all variants are measured on."""
    config, test = context.recipe.evaluate, context.prepared.test
    examples = [test[i] for i in range(min(len(test), max(config.loss_rows, config.answer_rows)))]
    items = [Item(e.key, e.record) for e in examples if isinstance(e.record, Conversation)]
    if config.tasks:
        context.progress.start("Reading questions", None)
    return EvaluationData(
        items[: config.loss_rows],
        items[: config.answer_rows],
        [tasks.load_task(t.name, t.rows, seed=context.recipe.seed, max_tokens=t.max_tokens) for t in config.tasks],
        lambda: training_examples(context.run, context.recipe.answers_seed),
    )


def _measure(
    context: RunContext,
    model: _Model,
    variants: Sequence[VariantSpec],
    measurements: Measurements,
    data: EvaluationData,
) -> None:
    """Load a model and measure what is missing of its variants."""
    context.progress.start(f"Evaluating {model.name}: loading", None)
    if model.form is not None:
        folder = find_model_folder(str(model.form.path(context.run.path / "export")))
    else:
        folder = context.base.folder if model.name == "base" else context.run.merged_model
    # The tuned model is asked with the template in its own folder, as its users will ask it.
    template = context.template if model.name == "base" else load_template(folder)
    placement = context.placement
    if model.engine == "openvino" and context.recipe.model.device == "auto":
        placement = choose_device("cpu", context.recipe.model.dtype)
    engine = load_engine(model.engine, folder, dtype=placement.dtype, device=placement.device)
    with SyncAnswerer(Answerer(engine, template)) as sync:
        for variant in variants:
            sync.run(measurements.measure(variant, engine, template, data, context.progress))
    del engine, sync
    gc.collect()  # two models may not fit into memory together


def read_variant_rows(folder: Path, name: str) -> VariantRows:
    """The rows of a variant, from the folder of a finished evaluate stage.

    Raises:
        InputError: the run has not been evaluated, or has no such variant.
    """
    path = folder / SCORECARD
    if not path.exists():
        run = folder.parent
        raise InputError("this run has not been evaluated", where=str(run), hint=f"corral evaluate {run}")
    known = Scorecard.from_json(path.read_text("utf-8"), where=str(path)).variants
    if name not in known:
        raise InputError(
            f"this run has no variant {name!r}", where=str(folder.parent), hint=f"it has {', '.join(known)}"
        )
    return replace(Measurements(folder).variant_rows(name), conditions=known[name].conditions)


def read_primary(folders: Sequence[Path]) -> str:
    """The primary metric of the recipe of these evaluate stages, or the default where they differ."""
    named = {Scorecard.from_json((folder / SCORECARD).read_text("utf-8")).primary for folder in folders}
    return named.pop() if len(named) == 1 else scorecard.PRIMARY


def parse_variant(spec: str) -> tuple[Path, str]:
    """(the run's evaluate folder, the variant, by default `tuned`) of `RUN` or `RUN:VARIANT`. Raises: RunError."""
    path, _, name = spec.rpartition(":")
    if not path or Path(spec).is_dir():
        path, name = spec, "tuned"
    return Run(Path(path)).path / "evaluate", name


def inputs(context: RunContext, done: Mapping[str, str]) -> dict[str, Any]:
    """What the stage depends on, from the fingerprints of the stages before it."""
    recipe = context.recipe
    answer_settings = [recipe.answer, *(variant.answer_settings(recipe.answer) for variant in recipe.evaluate.variants)]
    examples = [examples_digest(settings.shots, lambda: "") for settings in answer_settings]
    return {
        "merge": done["merge"],
        "evaluate": recipe.evaluate.model_dump(mode="json") | {"engine": evaluation_engine(context)},
        "answer": recipe.answer.model_dump(mode="json"),
        "seed": recipe.seed,
        **({"examples": examples} if any(examples) else {}),
        **({"sampled": "a seed for each row"} if any(settings.is_sampled for settings in answer_settings) else {}),
    }


def evaluates_exports(recipe: Recipe) -> bool:
    """True if a variant is an exported form, so that the export stage must come first."""
    return any(variant.form is not None for variant in recipe.evaluate.variants)


def evaluation_engine(context: RunContext) -> LocalEngine:
    """The engine that evaluates; `auto` is resolved for this machine."""
    requested = context.recipe.evaluate.engine
    device = context.placement.device
    if requested != "auto":
        return requested
    # The engine that evaluated the run before is kept, so that a machine with other packages does not evaluate it again.
    record = read_record(context.run.path / "evaluate")
    if record is not None and record["status"] == "done":
        before: LocalEngine = record["inputs"]["evaluate"]["engine"]
        if before != "openvino" or device == "cpu":
            return before
    return default_engine(device)
