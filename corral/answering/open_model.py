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

from corral.answering.answerer import Answerer
from corral.engines.base import Engine, Sampling
from corral.engines.registry import EngineName, LocalEngine, default_engine, load_engines
from corral.errors import InputError, ModelError
from corral.export import contract
from corral.export_forms import CONTRACT_FILE, OPENVINO_MODEL
from corral.model.naming import ModelFiles, find_contract, find_model_files, model_name
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


def open_model(
    spec: str, engine: EngineName | None = None, sampling: Sampling | None = None, *, urls: Sequence[str] = ()
) -> Opened:
    """Load a model into an engine on this machine's best device. The engine is the caller's to close.

    Args:
        spec: what `find_model_files` finds.
        engine: one of `engines.load.ENGINES`; None takes `remote` with URLs, else the one meant for the device.
        sampling: the Answerer's default.
        urls: of endpoints that serve this model: they compute, and only its template and vocabulary are read here.

    A model that carries a contract is held to it as far as that takes no computing: `contract.check_unchanged`. So is the base
    of an adapter.

    Raises:
        RunError, ModelError, AssetError: there is no such model, or it cannot be loaded.
        ContractError: its files or its template are not those its contract was written for.
        TemplateError: its tokenizer has no chat template that can be used.
        MissingExtraError: the engine is not installed.
        InputError: URLs without the remote engine, or it without them.
    """
    local = local_engine(engine, urls)
    return reach_model(spec, urls, sampling) if urls else open_models([spec], local, sampling)[0]


def local_engine(engine: EngineName | None, urls: Sequence[str]) -> LocalEngine | None:
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


def open_models(
    specs: Sequence[str], engine: LocalEngine | None = None, sampling: Sampling | None = None
) -> list[Opened]:
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


def computing(
    folder: Path, engine: LocalEngine | None = None, *, adapter: bool = False
) -> tuple[LocalEngine, str, DType]:
    """(engine, device, dtype) that compute a model folder on this machine: this engine, or the one meant for the device."""
    from corral.model.device import choose_device

    name = engine or ("openvino" if (folder / OPENVINO_MODEL).is_file() else None)
    device, dtype = choose_device("cpu" if name == "openvino" else "auto")
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
    from corral.engines.remote.engine import RemoteEngine

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
        encode=lambda text: encode(text, add_special_tokens=False).ids,
        probe=True,
        concurrency=concurrency,
        retries=retries,
        check_seconds=check_seconds,
    )
    return _opened(spec, found, template, engine, sampling, urls)


def _checked(spec: str) -> tuple[ModelFiles, Template]:
    """The files of a model and its template, held to its contract."""
    from corral.model.loading import load_tokenizer

    found = find_model_files(spec)
    tokenizer = load_tokenizer(found.folder)
    record = found.folder / CONTRACT_FILE if found.adapter else find_contract(spec)
    if record.is_file():
        contract.raise_if_failed(contract.check_unchanged(record, Template.load(tokenizer)), where=record)
    return found, Template.load(tokenizer, found.template or "tokenizer")


def _opened(
    spec: str,
    found: ModelFiles,
    template: Template,
    engine: Engine,
    sampling: Sampling | None,
    urls: Sequence[str] = (),
) -> Opened:
    from corral.model.folder import model_identity

    weights = [model_identity(folder) for folder in (found.folder, found.adapter) if folder is not None]
    made_of = " ".join([*weights, template.digest, engine.name, *urls])
    fingerprint = hashlib.sha256(made_of.encode()).hexdigest()[:12]
    return Opened(model_name(spec), fingerprint, Answerer(engine, template, sampling))
