"""The prepare stage: turns the rows of all sources into encoded examples, split and counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from corral.data.ledger import source_notes
from corral.data.prepare import prepare as prepare_rows
from corral.data.sources import hash_source
from corral.formatting import count_of
from corral.pipeline.context import RunContext
from corral.run.stage_record import Stage
from corral.training.stage_rows import check_rows_taken


def inputs(context: RunContext, done: Mapping[str, str]) -> dict[str, Any]:
    """What the stage depends on. The content of a source counts, not its path: a run may be moved with its data."""
    recipe = context.recipe
    return {
        "data": recipe.data.model_dump(mode="json", exclude={"sources": {"__all__": {"path"}}}),
        "sources": {source.label: hash_source(source, context.progress) for source in recipe.data.sources},
        "template": context.template.fingerprint,
        "seed": recipe.rows_seed,
        **({"split_seed": recipe.split_seed} if recipe.split_seed != recipe.rows_seed else {}),
        **({"mixtures": recipe.mixtures} if len(recipe.mixtures) > 1 else {}),
    }


def prepare(context: RunContext, stage: Stage) -> None:
    """Prepare the rows. Raises: GateError (more rows are lost than the recipe allows), DataError."""
    context.progress.start("Preparing rows", None)
    recipe = context.recipe
    rows = prepare_rows(
        recipe.data,
        context.template,
        stage.path,
        recipe.rows_seed,
        context.progress,
        split_seed=recipe.split_seed,
        mixtures=recipe.mixtures,
    )
    for label, source in rows.ledger["sources"].items():
        for note in source_notes(source):
            context.progress.say(f"{label}: {note}")
    check_rows_taken(rows, recipe.train)
    repeated = (
        f" ({rows.train.distinct_count} of them different)" if rows.train.distinct_count < len(rows.train) else ""
    )
    held_out = f"{len(rows.validation)} for validation, {len(rows.test)} for testing"
    context.progress.say(
        f"{count_of(len(rows.train), 'row')} to train on{repeated}, {held_out}; "
        f"{int(rows.train.lengths.sum()):,} training tokens, {int(rows.train.trained_tokens.sum()):,} of them trained"
    )
