"""From what a user names (a run, a folder, an adapter, `asset:`, `hub:`, a `.gguf` file) to the files of that model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from corral.errors import ModelError
from corral.export_forms import CONTRACT_FILE, OPENVINO_MODEL


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model's files."""

    folder: Path
    """Of the model; of the base model, if an adapter is named."""
    adapter: Path | None
    template: str | None
    """What of a chat template belongs to the adapter (see `Template.load`); None: that of the model's tokenizer."""


def find_model_files(spec: str) -> ModelFiles:
    """The files of what a user names, fetched or converted if need be.

    An adapter's base is what its config names: `asset:`, `hub:`, a folder, or a hub id; if that folder is gone and the adapter
    lies in a run, the run's own. Its template is the run's, its own `chat_template.jinja`, or its base's.

    Raises:
        RunError, ModelError, AssetError: there is no such model, or it cannot be loaded.
    """
    adapter = _find_adapter_folder(spec)
    if adapter is None:
        return ModelFiles(find_model_folder(spec), None, None)
    from corral.model.folder import check_adapter

    base = check_adapter(adapter)
    template = adapter / "chat_template.jinja"
    found = ModelFiles(_base_folder(adapter, base), adapter, str(template) if template.is_file() else None)
    return _of_run(found, adapter) if _is_run(str(adapter.absolute().parents[1])) else found


def find_model_folder(spec: str) -> Path:
    """The model folder of a run directory, or of any model spec. Raises: RunError, ModelError, AssetError."""
    from corral.model.loading import resolve_model
    from corral.run.directory import Run

    if _is_run(spec):
        return Run(Path(spec)).merged_model
    if (Path(spec) / OPENVINO_MODEL).is_file():
        return Path(spec)
    return resolve_model(spec).folder


def find_contract(spec: str) -> Path:
    """Where the contract of a run's model, a model folder or an exported form stands, if it has one. Raises: as above."""
    path = Path(spec)
    if path.suffix == ".gguf":
        find_model_folder(spec)
    return path.with_suffix(".contract.json") if path.suffix == ".gguf" else find_model_folder(spec) / CONTRACT_FILE


def _find_adapter_folder(spec: str) -> Path | None:
    """Where the adapter of that name lies, if it is one."""
    from corral.model.folder import ADAPTER_CONFIG

    if spec.startswith("hub:"):
        from corral.model import hub
        from corral.model.loading import quiet

        with quiet():
            folder = hub.download(spec, offline=False, say=lambda _: None)
    else:
        folder = Path(spec).expanduser()
    return folder if (folder / ADAPTER_CONFIG).is_file() else None


def _base_folder(adapter: Path, base: str) -> Path:
    from corral.model.hub import HUB_ID
    from corral.model.loading import resolve_model

    run = adapter.absolute().parents[1]
    if not base.startswith(("asset:", "hub:")) and not Path(base).expanduser().exists():
        # A run that was moved, or is named from elsewhere, still has the model that an earlier stage merged.
        own = run.joinpath(*Path(base).parts[-2:])
        if _is_run(str(run)) and own.is_dir():
            base = str(own)
        elif HUB_ID.fullmatch(base):
            base = f"hub:{base}"
    try:
        return resolve_model(base).folder
    except ModelError as error:
        raise ModelError(f"the base model of the adapter: {error.what}", where=str(adapter), hint=error.hint) from error


def _of_run(found: ModelFiles, adapter: Path) -> ModelFiles:
    """What the run says of an adapter that it trained. Raises: ModelError (its base was quantised), RecipeError."""
    from corral.run.directory import Run

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
    return ModelFiles(found.folder, found.adapter, recipe.model.template)


def _is_run(spec: str) -> bool:
    return (Path(spec) / "recipe.toml").is_file()


def model_name(spec: str) -> str:
    """The run's, the folder's, the asset's, or the hub's OWNER/NAME. Raises: RunError, RecipeError."""
    from corral.model.folder import ADAPTER_CONFIG
    from corral.run.directory import Run

    if _is_run(spec):
        return Run(Path(spec)).recipe.name
    kind, _, name = spec.partition(":")
    if kind in ("asset", "hub") and name:
        return name.partition("@")[0]
    path = Path(spec).expanduser().resolve()
    if (path / ADAPTER_CONFIG).is_file() and _is_run(str(path.parents[1])):
        return f"{Run(path.parents[1]).recipe.name}-{path.parent.name}"
    return path.stem if path.suffix == ".gguf" else path.name or "model"
