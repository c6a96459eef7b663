"""The export stage: writes the merged model in the other forms that the recipe names, each with a contract."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from corral.export_forms import ExportForm
from corral.pipeline.context import RunContext
from corral.recipe import Recipe
from corral.run.stage_record import Stage


def inputs(context: RunContext, done: Mapping[str, str]) -> dict[str, Any]:
    """What the stage depends on, from the fingerprints of the stages before it."""
    return {"merge": done["merge"], "export": [str(form) for form in requested_forms(context.recipe)]}


def export(context: RunContext, stage: Stage) -> None:
    """Write each requested form of the merged model; forms that older settings made are reused."""
    from corral.export.export import export_form

    for form in requested_forms(context.recipe):
        for old in sorted((context.run.path / "superseded").glob("export-*")):
            form.copy_missing_from(old, stage.path)
        export_form(context.run.merged_model, stage.path, form, context.progress)


def requested_forms(recipe: Recipe) -> list[ExportForm]:
    """The forms that the recipe's `[export]` and its evaluated variants name."""
    exported = [ExportForm("gguf", type_) for type_ in recipe.export.gguf]
    exported += [ExportForm("openvino", type_) for type_ in recipe.export.openvino]
    evaluated = [variant.form for variant in recipe.evaluate.variants if variant.form is not None]
    return list(dict.fromkeys([*exported, *evaluated]))
