"""Opens a model that a user names (a run, a folder, an adapter, `asset:`, `hub:`, a `.gguf` file) as an Answerer."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from corral.answering.answerer import Answerer
from corral.answering.identity import AnswerIdentity, identify_model, weights_identity
from corral.engines.base import Engine
from corral.engines.registry import EngineName, LocalEngine, default_engine, load_engines
from corral.errors import InputError, ModelError
from corral.export import contract
from corral.export_forms import CONTRACT_FILE, OPENVINO_MODEL
from corral.model.adapter_files import AdapterFiles
from corral.model.naming import ModelFiles, find_contract, find_model_files, model_name
from corral.run.directory import is_run
from corral.run.promotion import earlier_model_note
from corral.template import Template

if TYPE_CHECKING:
    from corral.model.loading import DType

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A loaded model."""

    name: str
    """A short name: of the run, the folder, the asset, or OWNER/NAME on the hub."""
    identity: AnswerIdentity
    """What its likelihoods depend on; with the remote engine also its URLs, as the weights there cannot be seen."""
    answerer: Answerer
    files: ModelFiles
    """Of an adapter: with the folder of its base."""


def open_model(spec: str, engine: EngineName | None = None, *, urls: Sequence[str] = ()) -> OpenedModel:
    """Load a model into an engine on the best device of this machine, or connect to it. The caller closes the engine.

    Args:
        spec: what `find_model_files` accepts.
        engine: None takes `remote` if there are URLs, else the best engine for the device.
        urls: of endpoints that serve this model: they compute, and only the template and vocabulary are read here.

    A model with a contract, and the base of an adapter, are checked against it as far as no computing is needed
    (`contract.check_unchanged`).

    Raises:
        RunError, ModelError, AssetError: there is no such model, or it cannot be loaded.
        ContractError: its files or its template are not those its contract was written for.
        TemplateError: its tokenizer has no usable chat template.
        MissingExtraError: the engine is not installed.
        InputError: URLs without the remote engine, or the remote engine without URLs.
    """
    local = check_engine(engine, urls)
    return connect_model(spec, urls) if urls else open_models([spec], local)[0]


def check_engine(engine: EngineName | None, urls: Sequence[str]) -> LocalEngine | None:
    """The engine on this machine that the user chose; None if none was chosen, or endpoints compute.

    Raises: InputError (URLs without the remote engine, or the remote engine without URLs).
    """
    if urls and engine in (None, "remote"):
        return None
    if engine == "remote" or urls:
        raise InputError(
            f"the {engine} engine computes on this machine and uses no URL"
            if urls
            else "the remote engine needs a URL",
            where=f"engine {engine}",
            hint="leave out the engine or the URLs" if urls else "give --url http://HOST:PORT/v1",
        )
    return engine


def open_models(
    specs: Sequence[str],
    engine: LocalEngine | None = None,
    *,
    later_adapters: int = 0,
    memory_share: float = 1,
) -> list[OpenedModel]:
    """`open_model` for several models on this machine. A base model and its adapters share the weights of the base.

    Args:
        later_adapters: how many `open_adapter` is to load beside each base.
        memory_share: the most of a GPU's memory that the vllm engine takes for a base.

    Raises: as `open_model`.
    """
    checked = [_find_checked(spec) for spec in specs]
    bases: dict[Path, list[Path | None]] = {}
    for files, _ in checked:
        adapters = bases.setdefault(files.folder.resolve(), [])
        if files.adapter not in adapters:
            adapters.append(files.adapter)
    opened: dict[tuple[Path, Path | None], tuple[Engine, str, DType]] = {}
    for folder, adapters in bases.items():
        name, device, dtype = choose_engine(folder, engine, adapter=any(adapters) or later_adapters > 0)
        loaded = load_engines(
            name,
            folder,
            dtype=dtype,
            device=device,
            adapters=adapters,
            later_adapters=later_adapters,
            memory_share=memory_share,
        )
        opened |= {(folder, adapter): (each, device, dtype) for adapter, each in zip(adapters, loaded, strict=True)}
    models: list[OpenedModel] = []
    for spec, (files, template) in zip(specs, checked, strict=True):
        loaded, device, dtype = opened[files.folder.resolve(), files.adapter]
        identity = identify_model(weights_identity(files), template, loaded.name, dtype=dtype, device=device)
        models.append(OpenedModel(model_name(spec), identity, Answerer(loaded, template), files))
    return models


def open_adapter(folder: Path, opened: Sequence[OpenedModel]) -> OpenedModel:
    """Load an adapter on the weights of a model that is loaded and has the same base. The caller closes its engine.

    Raises:
        ModelError: none of them has its base, or it is no adapter that can be loaded.
        ContractError, TemplateError: as `open_model`.
        RequestError: their engine loads no adapters while it serves, or not this kind.
    """
    adapter = AdapterFiles.read(folder)
    files, template = _find_checked(str(folder))
    base = next((each for each in opened if each.files.folder.resolve() == files.folder.resolve()), None)
    if base is None:
        bases = ", ".join(dict.fromkeys(str(each.files.folder) for each in opened))
        what = "no model that is loaded is the base of this adapter"
        raise ModelError(what, where=str(folder), hint=f"name an adapter of {bases}")
    adapter.check_fit(files.folder)
    adapter.check_trained()
    engine = base.answerer.engine.with_adapter(adapter.folder)
    identity = identify_model(
        weights_identity(files), template, engine.name, dtype=base.identity.dtype, device=base.identity.device
    )
    return OpenedModel(model_name(str(folder)), identity, Answerer(engine, template), files)


def choose_engine(
    folder: Path, engine: LocalEngine | None = None, *, adapter: bool = False
) -> tuple[LocalEngine, str, DType]:
    """(engine, device, dtype) for a model folder on this machine; by default the best engine for the device."""
    from corral.model.device import choose_device

    name = engine or ("openvino" if (folder / OPENVINO_MODEL).is_file() else None)
    placement = choose_device("cpu" if name == "openvino" else "auto")
    for note in placement.notes:
        _log.warning(note)
    return name or default_engine(placement.device, adapter=adapter), placement.device, placement.dtype


def connect_model(
    spec: str,
    urls: Sequence[str],
    *,
    model: str | None = None,
    concurrency: int | None = None,
    retries: int = 8,
    check_seconds: float | None = None,
) -> OpenedModel:
    """A model that remote endpoints compute; its template and vocabulary are read here.

    Args:
        model: its name there; None takes the only one that is listed.
        concurrency, retries, check_seconds: as in `RemoteEngine`.

    Raises: as `open_model`.
    """
    from corral.engines.remote.engine import RemoteEngine

    files, template = _find_checked(spec)
    path = files.folder / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
        vocabulary, length = int(config["vocab_size"]), int(config["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"config.json does not give vocab_size and max_position_embeddings: {error!r}", where=str(path)
        ) from error
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
    identity = identify_model(weights_identity(files), template, engine.name, dtype=None, endpoints=urls)
    return OpenedModel(model_name(spec), identity, Answerer(engine, template), files)


def _find_checked(spec: str) -> tuple[ModelFiles, Template]:
    """The files of a model and its template, checked against its contract if there is one."""
    from corral.model.loading import load_template

    files = find_model_files(spec)
    if is_run(Path(spec)) and (note := earlier_model_note(Path(spec))):
        _log.warning(note)
    record = files.folder / CONTRACT_FILE if files.adapter else find_contract(spec)
    if record.is_file():
        checks = contract.check_unchanged(record, load_template(files.folder))
        contract.raise_if_failed(checks, where=record, hint="restore the files, or merge or export the model again")
    return files, files.load_template()
