"""Compares the models of a stage that aligns on validation rows: the one that it starts from, that one with the stage's
quantised weights, and the one that it leaves.

Rows are measured as in an evaluation, and kept in the stage's folder: a stage that goes on after an interruption measures
nothing twice.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from corral.answering.identity import identify_model
from corral.engines.base import run_engine
from corral.engines.registry import load_engine
from corral.errors import GateError
from corral.evaluation.alignment_gate import (
    AFTER,
    BEFORE,
    COMPARISON_FOLDER,
    PRIMARY,
    QUANTISED,
    SCORECARD,
    quantisation_gap,
)
from corral.evaluation.evaluation_data import EvaluationData, select_evaluation_data
from corral.evaluation.measurements import Measurements, VariantSpec
from corral.evaluation.ranked_answers import select_ranked_answers
from corral.evaluation.scorecard import Scorecard, build_scorecard
from corral.model.folder import model_identity
from corral.pipeline.context import RunContext
from corral.recipe.evaluate import Evaluate
from corral.run.promotion import MERGED_FOLDER
from corral.run.stage_record import earlier_folders
from corral.storage import write_atomic

if TYPE_CHECKING:
    from corral.data.example_store import ExampleStore
    from corral.engines.base import Engine
    from corral.training.trained_model import TrainingSetup

_ENGINE = "transformers"  # the one that also computes the quantised weights of training


@dataclass
class StartComparison:
    """The comparison of one stage.

    Args:
        stage: the stage's folder.
        pairs: its validation rows, which may rank answers.
    """

    context: RunContext
    stage: Path
    setup: TrainingSetup
    pairs: ExampleStore

    @cached_property
    def data(self) -> EvaluationData:
        """Validation rows: conversations and documents of the run (or good answers, if there are none) for the loss, and the
        stage's own ranked answers."""
        context, count = self.context, self.context.recipe.evaluate.loss_rows
        data = select_evaluation_data(context.prepared.validation, Evaluate(loss_rows=count), context.template)
        return EvaluationData(data.loss_items, select_ranked_answers(self.pairs, count))

    @property
    def is_quantised(self) -> bool:
        """Whether it quantises the model that it starts from. A trained adapter belongs to quantised weights already."""
        return self.setup.quantization is not None and self.setup.adapter is None

    def check_quantisation(self, limit: float, place: str) -> None:
        """Measure what quantising the start model costs, before anything is trained.

        Args:
            limit: largest rise of its loss, in nats per token.
            place: the key of the stage's settings in the recipe.

        Raises: GateError (the loss rises by more).
        """
        if not self.is_quantised:
            return
        kind = self.setup.config.quantization
        card = self._measure(BEFORE, QUANTISED)
        gap = quantisation_gap(card)
        if gap is None:
            self.context.progress.say(f"what {kind} costs cannot be told: there are no validation rows")
            return
        before, after = (card.variants[name].metrics["loss"].mean for name in (BEFORE, QUANTISED))
        figures = f"the model to start from has a held-out loss of {before:.4f}, and of {after:.4f} in {kind}"
        if gap > limit:
            others = '"none"' + (' or "int8"' if kind == "nf4" else "")
            accept = f"--set {place}.guards.quantisation_gap={gap + 0.01:.2f}"
            raise GateError(
                f"{figures}: {gap:.4f} more, and guards.quantisation_gap = {limit:g}",
                where=place,
                hint=f"set its `quantization` to {others}; or accept it: {accept}",
            )
        self.context.progress.say(f"{figures} (guards.quantisation_gap = {limit:g})")

    def measure(self) -> None:
        """Measure the models before and after the stage, and write the scorecard. Raises: CorralError."""
        self._measure(BEFORE, *([QUANTISED] if self.is_quantised else []), AFTER)

    def _measure(self, *names: str) -> Scorecard:
        """Measure what is missing of each model, and write the scorecard of them."""
        context, data, measurements = self.context, self.data, Measurements(self.stage / COMPARISON_FOLDER)
        variants = {name: self._variant(name) for name in names}
        for old in earlier_folders(self.stage):  # of other settings: the model to start from may be the same
            measurements.reuse_rows(old / COMPARISON_FOLDER, list(variants.values()), data)
        for name, variant in variants.items():
            if not measurements.is_complete(variant, data):
                context.progress.start(f"Comparing models: loading that of {name}", None)
                measure = partial(
                    measurements.measure, variant, template=context.template, data=data, progress=context.progress
                )
                run_engine(self._load(name), measure)
                gc.collect()  # two models may not fit into memory together
        measurements.finish(list(variants.values()), data)
        rows = {
            name: replace(measurements.variant_rows(name), conditions=variant.conditions(()))
            for name, variant in variants.items()
        }
        card = build_scorecard(rows, baseline=BEFORE, seed=context.recipe.seed, primary=PRIMARY)
        write_atomic(measurements.folder / SCORECARD, card.to_json())
        return card

    def _variant(self, name: str) -> VariantSpec:
        setup = self.setup
        folders = [setup.folder, setup.adapter] if name != AFTER else [self.stage / MERGED_FOLDER]
        weights = [model_identity(folder) for folder in folders if folder is not None]
        if name == QUANTISED:
            weights.append(str(setup.quantization))
        identity = identify_model(
            " ".join(weights), self.context.template, _ENGINE, dtype=setup.dtype, device=setup.device
        )
        return VariantSpec(name, identity.asked(self.context.recipe.answer, 0, ""))

    def _load(self, name: str) -> Engine:
        from corral.engines.transformers import TransformersEngine
        from corral.model import adapters
        from corral.training.trained_model import load_base

        setup = self.setup
        if name == QUANTISED:
            return TransformersEngine(load_base(setup))
        if name == BEFORE and setup.adapter is not None:
            return TransformersEngine(adapters.load(load_base(setup), setup.adapter))
        folder = setup.folder if name == BEFORE else self.stage / MERGED_FOLDER
        return load_engine(_ENGINE, folder, dtype=setup.dtype, device=setup.device)
