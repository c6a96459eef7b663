"""The evaluate stage: a run's variants, each opened once, measured on the same rows, and set side by side.

It knows where a run keeps its models. It does not know how anything is measured (evaluation) or which stages there are.
"""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from corral.errors import InputError
from corral.pipeline.stages import Work
from corral.recipe.evaluate import BUILT_IN_VARIANTS
from corral.run.directory import Run, Stage
from corral.storage import write_atomic

if TYPE_CHECKING:
    from corral.engines.registry import LocalEngine
    from corral.evaluation.measurements import Material, Measurements, Subject
    from corral.evaluation.scoring import VariantRows
    from corral.export_forms import ExportForm

SCORECARD = "scorecard.json"
BASELINE = "base"


@dataclass(frozen=True, slots=True)
class _Model:
    """A model behind an engine: what variants that are only asked in other ways share."""

    name: str
    """`base`, `tuned`, or a form of the tuned model."""
    form: ExportForm | None
    engine: LocalEngine


def evaluate(work: Work, stage: Stage) -> None:
    """All variants on test rows and public questions: losses, answers, scorecard.

    Raises:
        CorralError: a variant cannot be opened or asked; what is measured already is kept.
    """
    from corral.evaluation import scorecard
    from corral.evaluation.measurements import Measurements

    config, material = work.recipe.evaluate, _material(work)
    subjects = _subjects(work)
    every = [subject for of_model in subjects.values() for subject in of_model]
    measurements = Measurements(stage.path)
    for old in sorted((work.run.path / "superseded").glob("evaluate-*")):
        if old.name != "evaluate-damaged":
            measurements.take_over(old, every, material)
    for model, of_model in subjects.items():
        missing = [subject for subject in of_model if not measurements.complete(subject, material)]
        if missing:
            _measure(work, model, missing, measurements, material)
    card = scorecard.build(
        {
            name: measurements.rows_of(name)
            for name in (*BUILT_IN_VARIANTS, *(variant.name for variant in config.variants))
        },
        baseline=BASELINE,
        against={variant.name: variant.compared_with for variant in config.variants},
        seed=work.recipe.seed,
    )
    write_atomic(stage.path / SCORECARD, card.to_json())


def _subjects(work: Work) -> dict[_Model, list[Subject]]:
    """The variants, model by model, so that each is loaded once."""
    from corral.answering.identity import source_examples_digest
    from corral.evaluation.measurements import Subject

    recipe, default = work.recipe, engine_name(work)
    ways = [(name, _Model(name, None, default), recipe.answer) for name in BUILT_IN_VARIANTS]
    for variant in recipe.evaluate.variants:
        own = "openvino" if variant.form is not None and variant.form.target == "openvino" else default
        model = _Model(variant.model, variant.form, variant.engine or own)
        ways.append((variant.name, model, variant.answer_settings(recipe.answer)))
    subjects: dict[_Model, list[Subject]] = {}
    for name, model, settings in ways:
        of_model = subjects.setdefault(model, [])
        examples = source_examples_digest(settings.shots)
        of_model.append(
            Subject(name, _identity(work, model), settings, recipe.seed, loss=not of_model, examples=examples)
        )
    return subjects


def _identity(work: Work, model: _Model) -> str:
    """Hash of the weights, the template, the engine and its precision."""
    from corral.answering.identity import variant_digest

    weights = work.base.identity if model.name == "base" else f"{_fingerprint(work, 'merge')} {model.form or ''}"
    return variant_digest(weights, work.template, model.engine, *work.placement)


def _fingerprint(work: Work, stage: str) -> str:
    """Of a stage that is done."""
    return json.loads((work.run.path / stage / "stage.json").read_text("utf-8"))["fingerprint"]


def _material(work: Work) -> Material:
    """The rows that all variants are measured on."""
    from corral.answering.examples import training_examples
    from corral.evaluation import tasks
    from corral.evaluation.inference import Item
    from corral.evaluation.measurements import Material
    from corral.messages import Conversation

    config, test = work.recipe.evaluate, work.prepared.test
    examples = [test[i] for i in range(min(len(test), max(config.loss_rows, config.answer_rows)))]
    items = [Item(e.key, e.record) for e in examples if isinstance(e.record, Conversation)]
    if config.tasks:
        work.progress.start("Reading questions", None)
    return Material(
        items[: config.loss_rows],
        items[: config.answer_rows],
        [tasks.load(t.name, t.rows, seed=work.recipe.seed, max_tokens=t.max_tokens) for t in config.tasks],
        lambda: training_examples(work.run, work.recipe.seed),
        _fingerprint(work, "prepare"),
    )


def _measure(
    work: Work, model: _Model, subjects: Sequence[Subject], measurements: Measurements, material: Material
) -> None:
    """Fill in what is missing of variants of one model."""
    from corral.answering.answerer import Answerer
    from corral.answering.sync import SyncAnswerer
    from corral.engines.registry import load_engine
    from corral.model.device import choose_device
    from corral.model.loading import load_tokenizer
    from corral.model.naming import find_model_folder
    from corral.template import Template

    work.progress.start(f"Evaluating {model.name}: loading", None)
    if model.form is not None:
        folder = find_model_folder(str(model.form.path(work.run.path / "export")))
    else:
        folder = work.base.folder if model.name == "base" else work.run.merged_model
    # The tuned model is asked through the template in its own folder, as its users will ask it.
    template = work.template if model.name == "base" else Template.load(load_tokenizer(folder))
    device, dtype = work.placement
    if model.engine == "openvino" and work.recipe.model.device == "auto":
        device, dtype = choose_device("cpu", work.recipe.model.dtype)
    engine = load_engine(model.engine, folder, dtype=dtype, device=device)
    with SyncAnswerer(Answerer(engine, template)) as sync:
        for subject in subjects:
            sync.run(measurements.measure(subject, engine, template, material, work.progress))
    del engine, sync
    gc.collect()  # two models at once may be one too many


def read_variant_rows(folder: Path, name: str) -> VariantRows:
    """A variant's rows from the folder of a finished evaluate stage.

    Raises:
        InputError: the run has not been evaluated, or has no such variant.
    """
    from corral.evaluation.measurements import Measurements
    from corral.evaluation.scorecard import Scorecard

    path = folder / SCORECARD
    if not path.exists():
        run = folder.parent
        raise InputError("this run has not been evaluated", where=str(run), hint=f"corral evaluate {run}")
    known = Scorecard.from_json(path.read_text("utf-8"), where=str(path)).variants
    if name not in known:
        raise InputError(
            f"this run has no variant {name!r}", where=str(folder.parent), hint=f"it has {', '.join(known)}"
        )
    return Measurements(folder).rows_of(name)


def parse_variant(spec: str) -> tuple[Path, str]:
    """`RUN` or `RUN:VARIANT` as a run's evaluate folder and a variant, by default `tuned`. Raises: RunError."""
    path, _, name = spec.rpartition(":")
    if not path or Path(spec).is_dir():
        path, name = spec, "tuned"
    return Run(Path(path)).path / "evaluate", name


def inputs(work: Work, done: Mapping[str, str]) -> dict[str, object]:
    """What the stage depends on, from the fingerprints of the stages before it."""
    from corral.answering.identity import source_examples_digest

    recipe = work.recipe
    every = [recipe.answer, *(variant.answer_settings(recipe.answer) for variant in recipe.evaluate.variants)]
    examples = [source_examples_digest(settings.shots) for settings in every]
    found: dict[str, object] = {
        "merge": done["merge"],
        "evaluate": recipe.evaluate.model_dump(mode="json") | {"engine": engine_name(work)},
        "answer": recipe.answer.model_dump(mode="json"),
        "seed": recipe.seed,
    }
    return found | {"examples": examples} if any(examples) else found


def wants_forms(work: Work) -> bool:
    """Whether a variant is an exported form, so that those must be there first."""
    return any(variant.form is not None for variant in work.recipe.evaluate.variants)


def engine_name(work: Work) -> LocalEngine:
    """What evaluates: the recipe's engine, with `auto` resolved on this machine."""
    from corral.engines.registry import default_engine

    asked = work.recipe.evaluate.engine
    device = work.placement[0]
    if asked != "auto":
        return asked
    # What a run was evaluated with stays, so that a machine with other packages does not call its figures stale.
    with contextlib.suppress(OSError, ValueError, KeyError):
        record = json.loads((work.run.path / "evaluate" / "stage.json").read_text("utf-8"))
        before: LocalEngine = record["inputs"]["evaluate"]["engine"]
        if record["status"] == "done" and (before != "openvino" or device == "cpu"):
            return before
    return default_engine(device)
