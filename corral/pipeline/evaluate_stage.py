"""The evaluate stage: measures all variants of a run on the same rows, each model loaded once, and compares them."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corral.answering.answerer import Answerer
from corral.answering.examples import training_examples
from corral.answering.identity import AnswerIdentity, examples_digest, identify_model
from corral.answering.sync import SyncAnswerer
from corral.data.ledger import source_notes
from corral.data.prepare import Prepared, prepare_test_rows
from corral.data.sources import hash_source
from corral.engines.registry import default_engine, load_engine
from corral.errors import DataError, InputError, require
from corral.evaluation import scorecard
from corral.evaluation.bert_score import BertScorer
from corral.evaluation.evaluation_data import EvaluationData, describe_left_out, select_evaluation_data
from corral.evaluation.measurements import Measurements, VariantSpec
from corral.evaluation.scorecard import Scorecard
from corral.evaluation.tasks import load_tasks
from corral.evaluation.text_metrics import TextMetrics
from corral.model.device import Placement, choose_device
from corral.model.loading import load_template
from corral.model.naming import find_model_folder
from corral.pipeline.context import RunContext
from corral.recipe import Answer, Data, Source
from corral.recipe.evaluate import BUILT_IN_VARIANTS
from corral.run.directory import Run
from corral.run.stage_record import Settings, StageFolder, read_fingerprint, superseded_folders
from corral.storage import new_directory, write_atomic
from corral.training.stage_needs import OTHER_FILES, check_context

if TYPE_CHECKING:
    from corral.engines.registry import LocalEngine
    from corral.evaluation.scoring import VariantRows
    from corral.export_forms import ExportForm

SCORECARD = "scorecard.json"
TEST_ROWS = "test"
"""The folder, in that of the stage, of the rows of `evaluate.test`."""
BASELINE = "base"


@dataclass(frozen=True, slots=True)
class _Model:
    """A model in an engine; variants that differ only in how it is asked share it.

    Args:
        number: of the training stage that made it; 0: the base model.
        form: its exported form, if that is evaluated.
    """

    name: str
    number: int
    form: ExportForm | None
    engine: LocalEngine


@dataclass(frozen=True)
class EvaluateStage:
    """Measures the base model, the tuned one and their variants, and compares them."""

    context: RunContext
    name = "evaluate"
    disposable = ()

    @property
    def engine(self) -> LocalEngine:
        """The engine that evaluates; `auto` is resolved for this machine."""
        requested = self.context.recipe.evaluate.engine
        return default_engine(self.context.placement_here.device) if requested == "auto" else requested

    def needs(self) -> int:
        """The packages of its engines, and room for an answer. Raises: MissingExtraError, InputError."""
        recipe = self.context.recipe
        engines = {model.engine for model, _ in self._settings_by_model()}
        if "openvino" in engines:
            require("openvino_genai", "openvino")
            require("openvino_tokenizers", "openvino")
        if "vllm" in engines:
            require("vllm", "vllm")
        if "bertscore" in recipe.evaluate.metrics:
            BertScorer(recipe.evaluate.bertscore).check()
        self._examples_input()
        if recipe.evaluate.test is not None:
            self._rows_input()
        elif self.context.rows_are_known:
            select_evaluation_data(self.context.prepared.test, recipe.evaluate, self.context.template)
        self.context.check_readable(self)
        if recipe.evaluate.tasks:
            self.context.progress.start("Reading questions", None)
            load_tasks(recipe.evaluate.tasks, seed=recipe.rows_seed)
        longest = max(settings.max_tokens for _, settings in self._settings_by_model())
        context_length = check_context(self.context.config_folder, longest, "answer.max_tokens")
        if context_length and recipe.data.max_length + recipe.answer.max_tokens > context_length:
            self.context.progress.say(
                f"questions of more than {context_length - recipe.answer.max_tokens:,} tokens will not be answered: the model "
                f"reads {context_length:,}, and answer.max_tokens = {recipe.answer.max_tokens} of these are for the answer"
            )
        return OTHER_FILES

    def inputs(self, fingerprints: Mapping[str, str]) -> dict[str, Any]:
        """The models, the rows and questions, and how the models are asked. The engine of this machine is recorded with each
        row, and no reason to evaluate again."""
        context, recipe = self.context, self.context.recipe
        stages = sorted({model.number for model, _ in self._settings_by_model() if model.number} | {len(recipe.train)})
        return {
            "evaluate": Settings.of(recipe.evaluate, {"test": {"path", "name"}}),
            "answer": Settings.of(recipe.answer, {"seed"}),
            "stages": {recipe.stage_names[n - 1]: fingerprints[recipe.stage_names[n - 1]] for n in stages},
            "base": context.base_identity,
            "shown": context.prepared.digest("train")
            if any(s.shots.count for _, s in self._settings_by_model())
            else "",
            **self._rows_input(),
            "examples": self._examples_input(),
            "seeds": [recipe.answers_seed, recipe.rows_seed],
        }

    def _rows_input(self) -> dict[str, Any]:
        """The test rows; of a file of the user's own its content, and what decides how it is read."""
        context, test = self.context, self.context.recipe.evaluate.test
        if test is None:
            return {"rows": context.prepared.digest("test")}
        read = {"max_length", "overlong", "turns", "train_on", "system_override", "contamination"}
        return {
            "rows": context.hash_or_recorded(self, "rows", test.path, lambda: hash_source(test, context.progress)),
            "data": Settings.of(context.recipe.data, {name for name in Data.model_fields if name not in read}),
            "template": context.template_source(self),
        }

    def _examples_input(self) -> list[str]:
        """The rows that few-shot examples of each variant come from, where they are not the run's own."""
        hashes: list[str] = []
        for i, (_, settings) in enumerate(self._settings_by_model()):
            source = settings.shots.source if settings.shots.count else None
            if source is None:
                hashes.append("")
            else:
                read = partial(hash_source, source)
                hashes.append(self.context.hash_or_recorded(self, f"examples.{i}", source.path, read))
        return hashes

    def run(self, folder: StageFolder) -> None:
        """Measure all variants on test rows and public questions, and write the scorecard.

        Raises:
            CorralError: a variant cannot be loaded or asked; what was measured before is kept.
        """
        config, data = self.context.recipe.evaluate, self._data(folder)
        variants_by_model = self._variants_by_model()
        all_variants = [variant for variants in variants_by_model.values() for variant in variants]
        measurements = Measurements(folder.path)
        for old in superseded_folders(self.context.run.path, folder):
            measurements.reuse_rows(old, all_variants, data)
        for model, same_model in variants_by_model.items():
            missing = [variant for variant in same_model if not measurements.is_complete(variant, data)]
            if missing:
                self._measure(model, missing, measurements, data)
        measurements.finish(all_variants, data)
        variants = {variant.name: variant for variant in all_variants}
        card = scorecard.build_scorecard(
            {
                name: replace(measurements.variant_rows(name), conditions=variants[name].conditions(data.tasks))
                for name in (*BUILT_IN_VARIANTS, *(v.name for v in config.variants))
            },
            baseline=BASELINE,
            compared_with={variant.name: variant.compared_with for variant in config.variants},
            seed=self.context.recipe.seed,
            primary=config.primary,
            metrics=TextMetrics(config.metrics, config.bertscore),
            notes=self._trained_on_notes(folder.path),
        )
        write_atomic(folder.path / SCORECARD, card.to_json())

    def _settings_by_model(self) -> list[tuple[_Model, Answer]]:
        """The model of each variant, and how it is asked: first base and tuned, then those of the recipe."""
        recipe, default = self.context.recipe, self.engine
        last = len(recipe.train)
        models = [
            (_Model("base", 0, None, default), recipe.answer),
            (_Model("tuned", last, None, default), recipe.answer),
        ]
        for variant in recipe.evaluate.variants:
            own = "openvino" if variant.form is not None and variant.form.target == "openvino" else default
            number = {"base": 0, "tuned": last}.get(variant.model)
            if number is None:
                number = last if variant.form else recipe.stage_number(variant.model, "evaluate.variants")
            name = "tuned" if number == last and variant.form is None else variant.model
            model = _Model(name, number, variant.form, variant.engine or own)
            models.append((model, variant.answer_settings(recipe.answer)))
        return models

    def _variants_by_model(self) -> dict[_Model, list[VariantSpec]]:
        """The variants by their model, so that each model is loaded once."""
        names = (*BUILT_IN_VARIANTS, *(variant.name for variant in self.context.recipe.evaluate.variants))
        by_model: dict[_Model, list[VariantSpec]] = {}
        for name, (model, settings) in zip(names, self._settings_by_model(), strict=True):
            variants = by_model.setdefault(model, [])
            seed = self.context.recipe.answers_seed if settings.seed is None else settings.seed
            identity = self._identify(model).asked(settings, seed, self._examples_digest(settings))
            variants.append(VariantSpec(name, identity, with_loss=not variants))
        return by_model

    def _identify(self, model: _Model) -> AnswerIdentity:
        context, placement = self.context, self._placement(model)
        weights = context.base_identity
        if model.number:
            fingerprint = read_fingerprint(context.run.path, context.recipe.stage_names[model.number - 1])
            weights = f"{fingerprint} {model.form or ''}"
        return identify_model(weights, context.template, model.engine, dtype=placement.dtype, device=placement.device)

    def _placement(self, model: _Model) -> Placement:
        """Device and dtype of a model in its engine: those of training, unless the engine computes on the CPU."""
        settings = self.context.recipe.model
        if model.engine == "openvino" and settings.device == "auto":
            return choose_device("cpu", settings.dtype)
        return self.context.placement_here

    def _examples_digest(self, settings: Answer) -> str:
        return examples_digest(settings.shots, lambda: self.context.prepared.digest("train"))

    def _data(self, folder: StageFolder) -> EvaluationData:
        """The rows and questions that all variants are measured on."""
        context, recipe = self.context, self.context.recipe
        rows = context.prepared if recipe.evaluate.test is None else self._test_rows(folder.path, recipe.evaluate.test)
        if recipe.evaluate.tasks:
            context.progress.start("Reading questions", None)
        data = select_evaluation_data(
            rows.test,
            recipe.evaluate,
            context.template,
            load_tasks(recipe.evaluate.tasks, seed=recipe.rows_seed),
            lambda: training_examples(context.run, recipe.answers_seed),
        )
        if (left_out := describe_left_out(rows.test, data)) is not None:
            context.progress.say(left_out)
        return data

    def _test_rows(self, folder: Path, source: Source) -> Prepared:
        """The rows of `evaluate.test`, prepared in the stage's folder."""
        context, target = self.context, folder / TEST_ROWS
        try:
            return Prepared.open(target)
        except DataError:
            recipe, trained = context.recipe, context.prepared.train
            with new_directory(target) as new:
                prepare_test_rows(
                    source, recipe.data, context.template, new, recipe.rows_seed, trained, context.progress
                )
        for entry in Prepared.open(target).ledger["sources"].values():
            for note in source_notes(entry):
                context.progress.say(f"{source.label}: {note}")
        return Prepared.open(target)

    def _trained_on_notes(self, folder: Path) -> list[str]:
        """What is to be known of the rows of `evaluate.test` that are rows of the training."""
        if self.context.recipe.evaluate.test is None:
            return []
        sources = Prepared.open(folder / TEST_ROWS).ledger["sources"].items()
        known = ("trained_on", "trained_on_rows")
        notes = [(label, source_notes({key: entry[key] for key in known if key in entry})) for label, entry in sources]
        return [f"{label}: {sentence}" for label, sentences in notes for sentence in sentences]

    def _measure(
        self, model: _Model, variants: Sequence[VariantSpec], measurements: Measurements, data: EvaluationData
    ) -> None:
        """Load a model and measure what is missing of its variants."""
        context, placement = self.context, self._placement(model)
        context.progress.start(f"Evaluating {model.name}: loading", None)
        if model.form is not None:
            folder = find_model_folder(str(model.form.path(context.run.path / "export")))
        else:
            folder = context.model_of_stage(model.number)
        # A tuned model is asked with the template in its own folder, as its users will ask it.
        template = load_template(folder) if model.number else context.template
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


def read_primary(folder: Path) -> str:
    """The primary metric that the recipe of a finished evaluate stage names."""
    return Scorecard.from_json((folder / SCORECARD).read_text("utf-8")).primary


def read_metrics(folders: Iterable[Path]) -> TextMetrics:
    """The metrics of answers that all the recipes of some finished evaluate stages name; BERTScore is that of the first."""
    recipes = [Run(folder.parent).recipe.evaluate for folder in folders]
    shared = [name for name in recipes[0].metrics if all(name in recipe.metrics for recipe in recipes)]
    return TextMetrics(shared, recipes[0].bertscore)


def parse_variant(spec: str) -> tuple[Path, str]:
    """(the run's evaluate folder, the variant, by default `tuned`) of `RUN` or `RUN:VARIANT`. Raises: RunError."""
    path, _, name = spec.rpartition(":")
    if not path or Path(spec).is_dir():
        path, name = spec, "tuned"
    return Run(Path(path)).path / "evaluate", name
