"""The report stage: writes one page about the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from corral.pipeline.context import RunContext
from corral.run.stage_record import Stage


def inputs(context: RunContext, done: Mapping[str, str]) -> dict[str, Any]:
    """What the stage depends on: all stages before it."""
    return {**done, "name": context.recipe.name}


def report(context: RunContext, stage: Stage) -> None:
    """Write the page."""
    from corral.report.write import write_report

    context.progress.start("Writing the report", None)
    write_report(context.run.path)
