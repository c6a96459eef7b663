"""From what a user names (a run, a folder, an adapter, `asset:`, `hub:`, a `.gguf` file) to the files of that model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from corral.errors import ModelError
from corral.export_forms import CONTRACT_FILE, OPENVINO_MODEL
from corral.model.adapter_files import AdapterFiles, find_base_model
from corral.model.folder import ADAPTER_CONFIG, licence_texts, read_json
from corral.model.hub import download
from corral.model.loading import load_template, quiet, resolve_model
from corral.recipe import Recipe
from corral.run.directory import Run, is_run
from corral.template import Template


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model's files."""

    folder: Path
    """Of the model; of the base model, if an adapter is named."""
    adapter: Path | None
    recipe: Recipe | None = None
    """Its `[model]` and `[data]` say which chat template it is used with; without one, its own."""
    licences: tuple[Path, ...] = ()
    """Of an adapter's base: texts that must travel with what is made from it."""

    def load_template(self) -> Template:
        """The chat template, on the tokenizer of the adapter or of the model. Raises: ModelError, TemplateError."""
        load = load_template if self.adapter is None else AdapterFiles.read(self.adapter).load_template
        if self.recipe is None:
            return load(self.folder)
        model = self.recipe.model
        return load(self.folder, model.template, model.template_variables, system=self.recipe.data.system_prompt)


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
    recipe = _recipe_of_run(adapter) if is_run(adapter.absolute().parent.parent) else None
    if files.has_tokenizer:  # with its template, as it was trained; adapters of older runs have none
        recipe = None
    return ModelFiles(source.folder, adapter, recipe, (*source.licence_files, *licence_texts(adapter)))


def find_model_folder(spec: str) -> Path:
    """The model folder of a run directory, or of any model spec. Raises: RunError, ModelError, AssetError."""
    path = Path(spec)
    if is_run(path):
        return Run(path).model
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


def find_adapter_to_train(spec: str, base: Path, quantization: str) -> AdapterFiles:
    """The adapter that a recipe's first stage trains further.

    Args:
        spec: as `model.adapter` of the recipe.
        base: folder of the base model.
        quantization: of the base's weights under the adapter, as the stage has it.

    Raises:
        ModelError: it cannot be used, does not fit the model, has another vocabulary, or was trained on weights that were
            quantised otherwise.
    """
    folder = _find_adapter_folder(spec)
    if folder is None:
        hint = "name the folder with its adapter_config.json"
        raise ModelError(f"{spec!r} is no adapter", where="model.adapter", hint=hint)
    adapter = AdapterFiles.read(folder)
    adapter.check_fit(base)
    rows = read_json(base / "config.json").get("vocab_size")
    if adapter.vocabulary_size not in (None, rows):
        raise ModelError(
            f"the adapter was trained on a vocabulary of {adapter.vocabulary_size}, and its base has {rows}",
            where="model.adapter",
            hint=f"merge it (corral merge {folder} --out FOLDER) and name that folder as model.base",
        )
    trained_on = _trained_quantization(folder)
    if trained_on not in (None, quantization):
        raise ModelError(
            f"the adapter was trained on weights with quantization = {trained_on!r}, and on others it is another model",
            where="train.0.quantization",
            hint=f'set it to "{trained_on}"',
        )
    return adapter


def _recipe_of_run(adapter: Path) -> Recipe:
    """The recipe of an adapter's run. Raises: ModelError (its base was quantised), RecipeError."""
    stage = adapter.absolute().parent
    quantization = _trained_quantization(adapter)
    if quantization not in (None, "none"):
        raise ModelError(
            f"the adapter was trained on weights quantised to {quantization}, and on full weights it is another model",
            where=str(adapter),
            hint=f"name the model it was merged into: {stage / 'merged'}",
        )
    return Run(stage.parent).recipe


def _trained_quantization(adapter: Path) -> str | None:
    """`quantization` of the stage that trained an adapter; None if it is in no run."""
    stage = adapter.absolute().parent
    if not is_run(stage.parent):
        return None
    number, train = stage.name.split("-")[1:2], Run(stage.parent).recipe.train
    return train[int(number[0]) - 1].quantization if number and number[0].isdecimal() else None
