"""From what a user names (a run, a folder, an adapter, `asset:`, `hub:`, a `.gguf` file) to the files of that model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from corral.errors import ModelError
from corral.export_forms import CONTRACT_FILE, OPENVINO_MODEL
from corral.model.adapter_files import AdapterFiles, find_base_model
from corral.model.folder import ADAPTER_CONFIG, licence_texts
from corral.model.hub import download
from corral.model.loading import load_template, quiet, resolve_model
from corral.recipe import Model
from corral.run.directory import Run, is_run
from corral.template import Template, Variables


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model's files."""

    folder: Path
    """Of the model; of the base model, if an adapter is named."""
    adapter: Path | None
    template: str = "tokenizer"
    """The chat template, as `model.template` of a recipe."""
    template_variables: Variables | None = None
    """As `model.template_variables`."""
    licences: tuple[Path, ...] = ()
    """Of an adapter's base: texts that must travel with what is made from it."""

    def load_template(self) -> Template:
        """The chat template, on the tokenizer of the adapter or of the model. Raises: ModelError, TemplateError."""
        if self.adapter is None:
            return load_template(self.folder, self.template, self.template_variables)
        return AdapterFiles.read(self.adapter).load_template(self.folder, self.template, self.template_variables)


def find_model_files(spec: str, *, base: str | None = None) -> ModelFiles:
    """The files of the model that a user names, fetched or converted if need be.

    Args:
        spec: the model.
        base: the base model of an adapter, in place of the one that its config names.

    The template of an adapter is that of its run's recipe, its own, or its base model's.

    Raises:
        RunError, RecipeError, ModelError, AssetError: there is no such model, or it cannot be loaded.
    """
    adapter = _find_adapter_folder(spec)
    if adapter is None:
        return ModelFiles(find_model_folder(spec), None)
    files = AdapterFiles.read(adapter)
    source = find_base_model(files) if base is None else resolve_model(base)
    template, variables = "tokenizer", None
    if is_run(adapter.absolute().parent.parent):
        model = _model_of_run(adapter)
        template, variables = model.template, model.template_variables
    return ModelFiles(source.folder, adapter, template, variables, (*source.licence_files, *licence_texts(adapter)))


def find_model_folder(spec: str) -> Path:
    """The model folder of a run directory, or of any model spec. Raises: RunError, ModelError, AssetError."""
    path = Path(spec)
    if is_run(path):
        return Run(path).merged_model
    return path if (path / OPENVINO_MODEL).is_file() else resolve_model(spec).folder


def find_contract(spec: str) -> Path:
    """Where the contract of a run's model, a model folder or an exported form is, if it has one. Raises: as above."""
    folder = find_model_folder(spec)
    return Path(spec).with_suffix(".contract.json") if spec.endswith(".gguf") else folder / CONTRACT_FILE


def model_name(spec: str) -> str:
    """The name of the run, the folder, the asset, or OWNER/NAME on the hub. Raises: RunError, RecipeError."""
    if is_run(Path(spec)):
        return Run(Path(spec)).recipe.name
    kind, _, name = spec.partition(":")
    if kind in ("asset", "hub") and name:
        return name.partition("@")[0]
    path = Path(spec).expanduser().resolve()
    if (path / ADAPTER_CONFIG).is_file() and is_run(path.parent.parent):
        return f"{Run(path.parent.parent).recipe.name}-{path.parent.name}"
    return path.stem if path.suffix == ".gguf" else path.name or "model"


def _find_adapter_folder(spec: str) -> Path | None:
    """The folder of the adapter that `spec` names; None if it names no adapter.

    Raises: ModelError (it names the folder around several adapters).
    """
    if spec.startswith("hub:"):
        with quiet():
            folder = download(spec, say=lambda _: None)
    else:
        folder = Path(spec).expanduser()
    if (folder / ADAPTER_CONFIG).is_file():
        return folder
    inner = sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_CONFIG}"))
    if inner and not (folder / "config.json").is_file():
        raise ModelError(
            f"the folder holds no model, but folders with adapters: {', '.join(inner[:5])}",
            where=str(folder),
            hint=f"name one of them, such as {folder / inner[0]}",
        )
    return None


def _model_of_run(adapter: Path) -> Model:
    """`[model]` of the recipe of an adapter's run. Raises: ModelError (its base was quantised), RecipeError."""
    stage = adapter.absolute().parent
    recipe = Run(stage.parent).recipe
    number = stage.name.split("-")[1:2]
    train = recipe.train[int(number[0]) - 1] if number and number[0].isdecimal() else None
    if train is not None and train.quantization != "none":
        raise ModelError(
            f"the adapter was trained on weights quantised to {train.quantization}, and on full weights it is another model",
            where=str(adapter),
            hint=f"name the model it was merged into: {stage / 'merged'}",
        )
    return recipe.model
