"""The prepare stage: turns the rows of all sources into encoded examples, split and counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from corral.data.ledger import source_notes
from corral.data.prepare import prepare as prepare_rows
from corral.data.sources import hash_source
from corral.evaluation.evaluation_data import check_test_sources, select_evaluation_data
from corral.formatting import count_of
from corral.pipeline.context import RunContext
from corral.run.stage_record import Settings, StageFolder
from corral.training.stage_needs import check_context
from corral.training.stage_rows import check_rows_taken

_MEGABYTE = 10**6


@dataclass(frozen=True)
class PrepareStage:
    """Prepares the rows of a run."""

    context: RunContext
    name = "prepare"
    disposable = ()

    def needs(self) -> int:
        """All that it reads, a template that the base model has, and a model that can read rows of this length.

        Raises: DataError, TemplateError, ModelError, InputError.
        """
        self.context.check_readable(self)
        assert self.context.template
        check_context(self.context.base.folder, self.context.recipe.data.max_length, "data.max_length")
        return 50 * _MEGABYTE

    def inputs(self, fingerprints: Mapping[str, str]) -> dict[str, Any]:
        """The content of each source, whatever it is called and wherever it lies, and what decides how it is read.

        What cannot be read here any more counts as it was recorded: a finished run needs no raw rows.
        """
        recipe = self.context.recipe
        elsewhere = {"sources": {"__all__": {"path", "name"}}, "seed": True, "split": {"seed"}}
        sources, labels = recipe.data.sources, [source.label for source in recipe.data.sources]
        hashed = [
            self.context.hash_or_recorded(
                self, f"rows.{i}", source.path, lambda source=source: hash_source(source, self.context.progress)
            )
            for i, source in enumerate(sources)
        ]
        return {
            "data": Settings.of(recipe.data, elsewhere),
            "rows": hashed,
            "base": self.context.base_identity,
            "adapter": self.context.adapter_identity(self),
            "template": self.context.template_source(self),
            "seeds": [recipe.split_seed, recipe.rows_seed],
            "mixtures": [[labels.index(label) for label in mixture] for mixture in recipe.mixtures],
        }

    def run(self, folder: StageFolder) -> None:
        """Prepare the rows. Raises: GateError (more rows are lost than the recipe allows), DataError."""
        context, recipe = self.context, self.context.recipe
        context.progress.start("Preparing rows", None)
        rows = prepare_rows(
            recipe.data,
            context.template,
            folder.path,
            recipe.rows_seed,
            context.progress,
            split_seed=recipe.split_seed,
            mixtures=recipe.mixtures,
        )
        for label, source in rows.ledger["sources"].items():
            for note in source_notes(source):
                context.progress.say(f"{label}: {note}")
        check_rows_taken(rows, recipe.train)
        check_test_sources(rows.test, [source.label for source in recipe.data.sources if source.side == "test"])
        if recipe.evaluate.test is None:  # what cannot be evaluated is known before anything trains
            select_evaluation_data(rows.test, recipe.evaluate, context.template)
        distinct = rows.train.distinct_count
        repeated = f" ({distinct} of them different)" if distinct < len(rows.train) else ""
        held_out = f"{len(rows.validation)} for validation, {len(rows.test)} for testing"
        context.progress.say(
            f"{count_of(len(rows.train), 'row')} to train on{repeated}, {held_out}; "
            f"{int(rows.train.lengths.sum()):,} training tokens, {int(rows.train.trained_tokens.sum()):,} of them trained"
        )
