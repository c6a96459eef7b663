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
from typing import TYPE_CHECKING

from corral import contract
from corral.answerer import Answerer
from corral.engines.base import Engine, Sampling
from corral.engines.load import Local, Name, default_engine, load_engines
from corral.errors import InputError, ModelError
from corral.forms import CONTRACT, OPENVINO
from corral.template import Template

if TYPE_CHECKING:
    from corral.model.loading import DType


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
    local = local_engine(engine, urls)
    return reach_model(spec, urls, sampling) if urls else open_models([spec], local, sampling)[0]


def local_engine(engine: Name | None, urls: Sequence[str]) -> Local | None:
    """The engine of this machine that is wanted, if one is named. Raises: InputError (URLs without the remote engine …)."""
    if urls and engine in (None, "remote"):
        return None
    if engine == "remote" or urls:
        raise InputError(
            "the remote engine needs an endpoint" if not urls else f"the {engine} engine computes here, at no URL",
            where=f"engine {engine}",
            hint="give --url http://HOST:PORT/v1" if not urls else "leave out the engine or the URLs",
        )
    return engine


def open_models(specs: Sequence[str], engine: Local | None = None, sampling: Sampling | None = None) -> list[Opened]:
    """`open_model` for several, on this machine. What belongs to one base (it, and adapters of it) shares its weights.

    Raises: as `open_model`.
    """
    checked = [_checked(spec) for spec in specs]
    bases: dict[Path, list[Path | None]] = {}
    for found, _ in checked:
        adapters = bases.setdefault(found.folder.resolve(), [])
        if found.adapter not in adapters:
            adapters.append(found.adapter)
    engines: dict[tuple[Path, Path | None], Engine] = {}
    for folder, adapters in bases.items():
        name, device, dtype = computing(folder, engine, adapter=any(adapters))
        loaded = load_engines(name, folder, dtype=dtype, device=device, adapters=adapters)
        engines |= {(folder, adapter): each for adapter, each in zip(adapters, loaded, strict=True)}
    return [
        _opened(spec, found, template, engines[found.folder.resolve(), found.adapter], sampling)
        for spec, (found, template) in zip(specs, checked, strict=True)
    ]


def computing(folder: Path, engine: Local | None = None, *, adapter: bool = False) -> tuple[Local, str, DType]:
    """(engine, device, dtype) that compute a model folder on this machine: this engine, or the one meant for the device."""
    from corral.model.placement import placement

    name = engine or ("openvino" if (folder / OPENVINO).is_file() else None)
    device, dtype = placement("cpu" if name == "openvino" else "auto")
    return name or default_engine(device, adapter=adapter), device, dtype


def reach_model(
    spec: str,
    urls: Sequence[str],
    sampling: Sampling | None = None,
    *,
    model: str | None = None,
    concurrency: int = 64,
    retries: int = 8,
    check_seconds: float | None = None,
) -> Opened:
    """A model that endpoints compute; its template and vocabulary are read here.

    Args:
        model: its name there; None takes the only one they have.
        concurrency, retries, check_seconds: as in `RemoteEngine`.

    Raises: as `open_model`.
    """
    from corral.engines.remote import RemoteEngine

    found, template = _checked(spec)
    path = found.folder / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
        vocabulary, length = int(config["vocab_size"]), int(config["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"config.json does not tell vocabulary and context: {error!r}", where=str(path)) from error
    encode = template.tokenizer.backend_tokenizer.encode
    engine = RemoteEngine(
        urls,
        model=model,
        vocabulary=vocabulary,
        max_length=length,
        ids_of=lambda text: encode(text, add_special_tokens=False).ids,
        try_out=True,
        concurrency=concurrency,
        retries=retries,
        check_seconds=check_seconds,
    )
    return _opened(spec, found, template, engine, sampling, urls)


def _checked(spec: str) -> tuple[Found, Template]:
    """The files of a model and its template, held to its contract."""
    from corral.model.loading import load_tokenizer

    found = find_model(spec)
    tokenizer = load_tokenizer(found.folder)
    record = found.folder / CONTRACT if found.adapter else contract_of(spec)
    if record.is_file():
        contract.enforce(contract.unchanged(record, Template.load(tokenizer)), where=record)
    return found, Template.load(tokenizer, found.template or "tokenizer")


def _opened(
    spec: str, found: Found, template: Template, engine: Engine, sampling: Sampling | None, urls: Sequence[str] = ()
) -> Opened:
    from corral.model.folder import identity

    weights = [identity(folder) for folder in (found.folder, found.adapter) if folder is not None]
    made_of = " ".join([*weights, template.digest, engine.name, *urls])
    fingerprint = hashlib.sha256(made_of.encode()).hexdigest()[:12]
    return Opened(short_name(spec), fingerprint, Answerer(engine, template, sampling))


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


def short_name(spec: str) -> str:
    """The run's, the folder's, the asset's, or the hub's OWNER/NAME. Raises: RunError, RecipeError."""
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
