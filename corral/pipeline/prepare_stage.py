"""The prepare stage: turns the rows of all sources into encoded examples, split and counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corral.data.ledger import source_notes
from corral.data.prepare import prepare as prepare_rows
from corral.data.sources import hash_source
from corral.errors import CorralError
from corral.evaluation.evaluation_data import select_evaluation_data
from corral.formatting import count_of
from corral.model.folder import model_identity
from corral.pipeline.context import RunContext
from corral.run.stage_record import Settings, StageFolder, is_finished, read_record
from corral.storage import sha256_file
from corral.training.stage_rows import check_rows_taken

_MEGABYTE = 10**6


@dataclass(frozen=True)
class PrepareStage:
    """Prepares the rows of a run."""

    context: RunContext
    name = "prepare"
    unreadable: list[Exception] = field(default_factory=list[Exception])
    """Why something that it reads is not here, as far as its inputs have been asked for."""

    def needs(self) -> int:
        """All that it reads, and a template that the base model has. Raises: DataError, TemplateError, ModelError …"""
        if self.unreadable:
            raise self.unreadable[0]
        assert self.context.template
        return 50 * _MEGABYTE

    def inputs(self, fingerprints: Mapping[str, str]) -> dict[str, Any]:
        """The content of each source, whatever it is called and wherever it lies, and what decides how it is read.

        What cannot be read here any more counts as it was recorded: a finished run needs no raw rows.
        """
        recipe, model = self.context.recipe, self.context.recipe.model
        elsewhere = {"sources": {"__all__": {"path", "name"}}, "seed": True, "split": {"seed"}}
        template, adapter = model.template, self.context.adapter
        sources, labels = recipe.data.sources, [source.label for source in recipe.data.sources]
        hashed = [
            self._read_or_recorded(
                f"rows.{i}", source.label, lambda source=source: hash_source(source, self.context.progress)
            )
            for i, source in enumerate(sources)
        ]
        if template.endswith(".jinja"):
            template = self._read_or_recorded("template", template, lambda: sha256_file(Path(model.template)))
        return {
            "data": Settings.of(recipe.data, elsewhere),
            "rows": hashed,
            "base": self.context.base_identity,
            "adapter": None if adapter is None else model_identity(adapter.folder),
            "template": template,
            "template_variables": model.template_variables,
            "seeds": [recipe.split_seed, recipe.rows_seed],
            "mixtures": [[labels.index(label) for label in mixture] for mixture in recipe.mixtures],
        }

    def _read_or_recorded(self, name: str, what: str, read: Callable[[], str]) -> str:
        """A hash of what the stage reads; if it cannot be read, the one that the finished stage has as its input `name`."""
        try:
            return read()
        except (CorralError, OSError) as error:
            folder = self.context.run.path / self.name
            recorded: Any = (read_record(folder) or {}).get("inputs") if is_finished(folder) else None
            try:
                for key in name.split("."):
                    recorded = recorded[int(key) if key.isdecimal() else key]
            except (KeyError, IndexError, TypeError):
                raise error from None
            self.unreadable.append(error)
            reason = error.what if isinstance(error, CorralError) else error
            self.context.progress.say(f"{what} cannot be read here ({reason}): the rows stay as they were prepared")
            return str(recorded)

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
        if recipe.evaluate.test is None:  # what cannot be evaluated is known before anything trains
            select_evaluation_data(rows.test, recipe.evaluate)
        distinct = rows.train.distinct_count
        repeated = f" ({distinct} of them different)" if distinct < len(rows.train) else ""
        held_out = f"{len(rows.validation)} for validation, {len(rows.test)} for testing"
        context.progress.say(
            f"{count_of(len(rows.train), 'row')} to train on{repeated}, {held_out}; "
            f"{int(rows.train.lengths.sum()):,} training tokens, {int(rows.train.trained_tokens.sum()):,} of them trained"
        )
