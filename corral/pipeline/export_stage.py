"""The export stage: writes the run's model in the other forms that the recipe names, each with a contract."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from corral.errors import require
from corral.pipeline.context import RunContext
from corral.run.promotion import earlier_model_note
from corral.run.stage_record import StageFolder, superseded_folders
from corral.training.memory_estimate import ModelShape
from corral.training.stage_needs import export_bytes


@dataclass(frozen=True)
class ExportStage:
    """Exports the promoted model of a run."""

    context: RunContext
    name = "export"
    disposable = ()

    def needs(self) -> int:
        """The forms must be able to say what the model is. Raises: ModelError, MissingExtraError."""
        from corral.export.gguf_writer import check_config

        forms, base = self.context.recipe.export_forms, self.context.config_folder
        if any(form.target == "openvino" for form in forms):
            require("openvino_genai", "openvino")
            require("openvino_tokenizers", "openvino")
            from corral.model.openvino_graph import check_config as check_openvino

            check_openvino(base)
        if any(form.target == "gguf" for form in forms):
            check_config(base)
        return sum(export_bytes(ModelShape.from_folder(base), form) for form in forms)

    def inputs(self, fingerprints: Mapping[str, str]) -> dict[str, Any]:
        """The training stage whose model is promoted, and the forms."""
        forms = [str(form) for form in self.context.recipe.export_forms]
        return {"stages": self.context.promoted_stage(fingerprints), "forms": forms}

    def run(self, folder: StageFolder) -> None:
        """Write each requested form of the promoted model; forms that older settings made are reused."""
        from corral.export.export import export_form

        run = self.context.run
        if (note := earlier_model_note(run.path)) is not None:
            self.context.progress.say(note)
        for form in self.context.recipe.export_forms:
            for old in superseded_folders(run.path, folder):
                form.copy_missing_from(old, folder.path)
            export_form(run.model, folder.path, form, self.context.progress)
