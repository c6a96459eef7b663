"""The prepare stage: turns the rows of all sources into encoded examples, split and counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from corral.data.ledger import source_notes
from corral.data.prepare import prepare as prepare_rows
from corral.data.sources import hash_source
from corral.errors import DataError
from corral.formatting import count_of
from corral.messages import Feedback, Preference
from corral.pipeline.context import RunContext
from corral.recipe import Recipe
from corral.run.stage_record import Stage

if TYPE_CHECKING:
    from corral.data.prepare import Prepared


def inputs(context: RunContext, done: Mapping[str, str]) -> dict[str, Any]:
    """What the stage depends on. The content of a source counts, not its path: a run may be moved with its data."""
    recipe = context.recipe
    return {
        "data": recipe.data.model_dump(mode="json", exclude={"sources": {"__all__": {"path"}}}),
        "sources": {source.label: hash_source(source, context.progress) for source in recipe.data.sources},
        "template": context.template.fingerprint,
        "seed": recipe.seed,
    }


def prepare(context: RunContext, stage: Stage) -> None:
    """Prepare the rows. Raises: GateError (more rows are lost than the recipe allows), DataError."""
    context.progress.start("Preparing rows", None)
    rows = prepare_rows(context.recipe.data, context.template, stage.path, context.recipe.seed, context.progress)
    for label, source in rows.ledger["sources"].items():
        for note in source_notes(source):
            context.progress.say(f"{label}: {note}")
    _refuse_preference_rows(context.recipe, rows)
    repeated = (
        f" ({rows.train.distinct_count} of them different)" if rows.train.distinct_count < len(rows.train) else ""
    )
    held_out = f"{len(rows.validation)} for validation, {len(rows.test)} for testing"
    context.progress.say(
        f"{count_of(len(rows.train), 'row')} to train on{repeated}, {held_out}; "
        f"{int(rows.train.lengths.sum()):,} training tokens, {int(rows.train.trained_tokens.sum()):,} of them trained"
    )


def _refuse_preference_rows(recipe: Recipe, rows: Prepared) -> None:
    """Raises DataError if `sft` would train on rejected or badly scored answers."""
    if all(stage.objective != "sft" for stage in recipe.train):
        return
    row = next((row for row in rows.train if isinstance(row.record, Preference | Feedback)), None)
    if row is not None:
        kind = "a better and a worse answer" if isinstance(row.record, Preference) else "an answer with a score"
        raise DataError(
            f"row {row.index} holds {kind}, and the objective `sft` would train on any answer",
            where=row.source,
            hint='give the source a format that makes conversations of its rows (for HH data, format = "hh-rlhf")',
        )
