"""The report stage: writes one page about the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from corral.pipeline.context import RunContext
from corral.run.stage_record import StageFolder


@dataclass(frozen=True)
class ReportStage:
    """Writes the report of a run."""

    context: RunContext
    name = "report"
    disposable = ()

    def needs(self) -> int:
        """Nothing."""
        return 10**6

    def inputs(self, fingerprints: Mapping[str, str]) -> dict[str, Any]:
        """All stages before it."""
        return {"stages": dict(fingerprints), "recipe": self.context.recipe.name}

    def run(self, folder: StageFolder) -> None:
        """Write the page."""
        from corral.report.write import write_report

        self.context.progress.start("Writing the report", None)
        write_report(self.context.run.path)
