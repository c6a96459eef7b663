"""From what a user names (a run, a folder, an adapter, `asset:`, `hub:`, a `.gguf` file) to an Answerer over it.

It knows where a run keeps its models and what its adapters belong to. It does not know what the answers are for, nor how a
model is found, loaded or run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from corral import contract
from corral.answerer import Answerer
from corral.engines.base import Engine, Sampling
from corral.engines.load import Name, default_engine, load_engine
from corral.errors import InputError, ModelError
from corral.forms import CONTRACT, OPENVINO
from corral.template import Template


@dataclass(frozen=True, slots=True)
class Opened:
    """A loaded model."""

    name: str
    """A short name: the run's, the folder's, the asset's, or the hub's OWNER/NAME."""
    fingerprint: str
    """Short hash of weights, configuration, tokenizer, template and engine: the same text and seed, the same answer. With
    the remote engine its URLs stand for the weights there, which nobody here can see."""
    answerer: Answerer


@dataclass(frozen=True, slots=True)
class Found:
    """A model's files."""

    folder: Path
    """Of the model; of the base model, if an adapter is named."""
    adapter: Path | None
    template: str | None
    """What of a chat template belongs to the adapter (see `Template.load`); None: that of the model's tokenizer."""


def find_model(spec: str) -> Found:
    """The files of what a user names, fetched or converted if need be.

    An adapter's base is what its config names: `asset:`, `hub:`, a folder, or a hub id; if that folder is gone and the adapter
    lies in a run, the run's own. Its template is the run's, its own `chat_template.jinja`, or its base's.

    Raises:
        RunError, ModelError, AssetError: there is no such model, or it cannot be loaded.
    """
    adapter = _adapter_folder(spec)
    if adapter is None:
        return Found(model_folder(spec), None, None)
    from corral.model.folder import check_adapter

    base = check_adapter(adapter)
    template = adapter / "chat_template.jinja"
    found = Found(_base_folder(adapter, base), adapter, str(template) if template.is_file() else None)
    return _of_run(found, adapter) if _is_run(str(adapter.absolute().parents[1])) else found


def model_folder(spec: str) -> Path:
    """The model folder of a run directory, or of any model spec. Raises: RunError, ModelError, AssetError."""
    from corral.model.loading import resolve
    from corral.run import Run

    if _is_run(spec):
        return Run(Path(spec)).merged_model
    if (Path(spec) / OPENVINO).is_file():
        return Path(spec)
    return resolve(spec).folder


def contract_of(spec: str) -> Path:
    """Where the contract of a run's model, a model folder or an exported form stands, if it has one. Raises: as above."""
    path = Path(spec)
    if path.suffix == ".gguf":
        model_folder(spec)
    return path.with_suffix(".contract.json") if path.suffix == ".gguf" else model_folder(spec) / CONTRACT


def open_model(
    spec: str, engine: Name | None = None, sampling: Sampling | None = None, *, urls: Sequence[str] = ()
) -> Opened:
    """Load a model into an engine on this machine's best device. The engine is the caller's to close.

    Args:
        spec: what `find_model` finds.
        engine: one of `engines.load.ENGINES`; None takes `remote` with URLs, else the one meant for the device.
        sampling: the Answerer's default.
        urls: of endpoints that serve this model: they compute, and only its template and vocabulary are read here.

    A model that carries a contract is held to it as far as that takes no computing: `contract.unchanged`. So is the base of an
    adapter.

    Raises:
        RunError, ModelError, AssetError: there is no such model, or it cannot be loaded.
        ContractError: its files or its template are not those its contract was written for.
        TemplateError: its tokenizer has no chat template that can be used.
        MissingExtraError: the engine is not installed.
        InputError: URLs without the remote engine, or it without them.
    """
    from corral.model.folder import identity
    from corral.model.loading import load_tokenizer
    from corral.model.placement import placement

    if engine is None and urls:
        engine = "remote"
    if (engine == "remote") != bool(urls):
        raise InputError(
            "the remote engine needs an endpoint" if not urls else f"the {engine} engine computes here, at no URL",
            where=f"engine {engine}",
            hint="give --url http://HOST:PORT/v1" if not urls else "leave out the engine or the URLs",
        )
    found = find_model(spec)
    tokenizer = load_tokenizer(found.folder)
    record = found.folder / CONTRACT if found.adapter else contract_of(spec)
    if record.is_file():
        contract.enforce(contract.unchanged(record, Template.load(tokenizer)), where=record)
    template = Template.load(tokenizer, found.template or "tokenizer")
    if engine == "remote":
        loaded = _remote(found.folder, urls)
    else:
        if engine is None and (found.folder / OPENVINO).is_file():
            engine = "openvino"
        device, dtype = placement("cpu" if engine == "openvino" else "auto")
        engine = engine or default_engine(device, adapter=found.adapter is not None)
        loaded = load_engine(engine, found.folder, dtype=dtype, device=device, adapter=found.adapter)
    weights = [identity(folder) for folder in (found.folder, found.adapter) if folder is not None]
    made_of = " ".join([*weights, template.digest, loaded.name, *urls])
    fingerprint = hashlib.sha256(made_of.encode()).hexdigest()[:12]
    return Opened(_short_name(spec), fingerprint, Answerer(loaded, template, sampling))


def _remote(folder: Path, urls: Sequence[str]) -> Engine:
    from corral.engines.remote import RemoteEngine

    config = folder / "config.json"
    try:
        vocabulary = int(json.loads(config.read_text("utf-8"))["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"config.json does not tell the vocabulary: {error!r}", where=str(config)) from error
    return RemoteEngine(urls, model=None, vocabulary=vocabulary)


def _adapter_folder(spec: str) -> Path | None:
    """Where the adapter of that name lies, if it is one."""
    from corral.model.folder import ADAPTER

    if spec.startswith("hub:"):
        from corral.model import hub
        from corral.model.loading import quiet

        with quiet():
            folder = hub.download(spec, offline=False, say=lambda _: None)
    else:
        folder = Path(spec).expanduser()
    return folder if (folder / ADAPTER).is_file() else None


def _base_folder(adapter: Path, base: str) -> Path:
    from corral.model.hub import HUB_ID
    from corral.model.loading import resolve

    run = adapter.absolute().parents[1]
    if not base.startswith(("asset:", "hub:")) and not Path(base).expanduser().exists():
        # A run that was moved, or is named from elsewhere, still has the model that an earlier stage merged.
        own = run.joinpath(*Path(base).parts[-2:])
        if _is_run(str(run)) and own.is_dir():
            base = str(own)
        elif HUB_ID.fullmatch(base):
            base = f"hub:{base}"
    try:
        return resolve(base).folder
    except ModelError as error:
        raise ModelError(f"the base model of the adapter: {error.what}", where=str(adapter), hint=error.hint) from error


def _of_run(found: Found, adapter: Path) -> Found:
    """What the run says of an adapter that it trained. Raises: ModelError (its base was quantised), RecipeError."""
    from corral.run import Run

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
    return Found(found.folder, found.adapter, recipe.model.template)


def _is_run(spec: str) -> bool:
    return (Path(spec) / "recipe.toml").is_file()


def _short_name(spec: str) -> str:
    from corral.model.folder import ADAPTER
    from corral.run import Run

    if _is_run(spec):
        return Run(Path(spec)).recipe.name
    kind, _, name = spec.partition(":")
    if kind in ("asset", "hub") and name:
        return name.partition("@")[0]
    path = Path(spec).expanduser().resolve()
    if (path / ADAPTER).is_file() and _is_run(str(path.parents[1])):
        return f"{Run(path.parents[1]).recipe.name}-{path.parent.name}"
    return path.stem if path.suffix == ".gguf" else path.name or "model"
