"""Loads the models of a server: those it starts with, and the models that the followed runs promote later.

A run is served with the settings of its recipe's `[answer]`. Adapters of one base share its weights. With URLs, other servers
compute the answers, and are checked regularly.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from corral.answering.open_model import OpenedModel, check_engine, connect_model, open_models
from corral.answering.settings import AnswererSettings, find_run, load_answer_settings
from corral.engines.base import CHAT_SAMPLING
from corral.engines.embedding import ASSET, Embedder
from corral.engines.registry import EngineName
from corral.errors import CorralError, InputError, RunError
from corral.model.naming import model_name
from corral.run.directory import is_run
from corral.run.promotion import Promotion, read_promotion
from corral.serving.database import run_in_thread
from corral.serving.logs import traceback_without_message
from corral.serving.models import ServedModel, ServedModels
from corral.serving.protocol import DEFAULT_LIMITS, RequestLimits

_CHECK_SECONDS = 5.0  # how often replicas are checked while there are no requests
_FOLLOW_SECONDS = 2.0  # how often the promotion of a followed run is read
_LATER_ADAPTERS = 8  # slots in the memory of vLLM, which swaps adapters if more are in use
_NAME = re.compile(r"(?P<name>[^=/\\:]+)=(?P<spec>.+)", re.DOTALL)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which models a server has.

    Args:
        specs: each a run directory or any model spec, or NAME=SPEC. Without a name it is the run's, folder's, asset's or
            hub's.
        engine: the engine's name; None: the default of this device, or `remote` with URLs.
        urls: replicas, which all serve these models; if there are several models, under the same names as here.
        name: the name of the model, if there is only one.
        aliases: each NAME=MODEL, or NAME if there is only one model.
        embeddings: offer `/v1/embeddings`.
        follow: serve the models that the runs among them promote later.
        adapters: the folder from which adapters may be loaded later; None: none may.
        limits: of one request.
    """

    specs: Sequence[str]
    engine: EngineName | None = None
    urls: Sequence[str] = ()
    name: str | None = None
    aliases: Sequence[str] = ()
    embeddings: bool = False
    follow: bool = False
    adapters: Path | None = None
    limits: RequestLimits = DEFAULT_LIMITS


def open_served_models(options: ModelOptions, at_once: int = 128) -> ServedModels:
    """Load the models of a server.

    Args:
        at_once: requests that this server runs at a time; each URL is sent up to as many.

    Raises:
        InputError: two models have the same name, a setting does not fit the others, or URLs without the remote engine.
        RunError, ModelError, AssetError, TemplateError, MissingExtraError, DataError: see `open_model` and `build_answerer`.
    """
    local = check_engine(options.engine, options.urls)
    named = _names(options)
    _check(options, named)
    promotions = [
        _read_promotion(spec) for _, spec in named
    ]  # first: what is promoted meanwhile is loaded again, not missed
    specs = [spec for _, spec in named]
    opened = _connect(named, options.urls, at_once) if options.urls else open_models(specs, local, **_plans(options))
    embed = Embedder()
    served = [
        replace(build_served_model(name, spec, each, embed, options.limits), promotion=promotion)
        for (name, spec), each, promotion in zip(named, opened, promotions, strict=True)
    ]
    if options.embeddings or any(map(_needs_embeddings, served)):
        served = [replace(each, embed=_load_embedder(embed)) for each in served]
    return ServedModels(served, embed if options.embeddings else None, _aliases(options, served[0].name))


async def follow_runs(options: ModelOptions, models: ServedModels) -> None:
    """Serve what the runs promote from now on, in place of their models before, until cancelled.

    A model is loaded beside the one before. If it cannot be loaded, that is logged once, and the one before stays.
    """
    runs = [(name, spec) for name, spec in _names(options) if is_run(Path(spec))]
    failed: dict[str, Promotion | None] = {}
    while True:
        await asyncio.sleep(_FOLLOW_SECONDS)
        for name, spec in runs:
            before = models.get(name)
            promotion = await run_in_thread(_read_promotion, spec)
            if promotion in (None, before.promotion, failed.get(name)):
                continue
            _log.info("%s promoted the model of %s, which is loaded now", spec, promotion and promotion.stage)
            try:
                models.add(replace(await _open_beside(before, spec, options), promotion=promotion))
            except Exception as error:  # also from the packages that load it: the server must go on
                failed[name] = promotion
                reason = str(error) if isinstance(error, CorralError) else traceback_without_message(error)
                _log.error("the promoted model of %s cannot be loaded, and the one before stays: %s", spec, reason)
            else:
                _log.info(
                    "%s is now the model of %s, %s", name, promotion and promotion.stage, models.get(name).fingerprint
                )


async def _open_beside(before: ServedModel, spec: str, options: ModelOptions) -> ServedModel:
    """Load the model of a run again, as what it stands for now. Raises: as `open_served_models`."""
    engine = check_engine(options.engine, ())
    # In a thread that does not keep the process from ending, as a file may be slow to read, or never end.
    loading = asyncio.ensure_future(run_in_thread(partial(open_models, [spec], engine, **_plans(options))))
    try:
        (opened,) = await asyncio.shield(loading)
    except asyncio.CancelledError:  # the thread goes on, and what it loads must be closed
        await (await loading)[0].answerer.engine.close()
        raise
    try:
        embed = before.embed if isinstance(before.embed, Embedder) else Embedder()
        served = await run_in_thread(build_served_model, before.name, spec, opened, embed, before.limits)
        if before.embed is not None or _needs_embeddings(served):
            served = replace(served, embed=await run_in_thread(_load_embedder, embed))
    except BaseException:
        await opened.answerer.engine.close()
        raise
    return served


def build_served_model(
    name: str, spec: str, opened: OpenedModel, embed: Embedder, limits: RequestLimits
) -> ServedModel:
    """A loaded model as its run's recipe asks it, if it belongs to a run. Raises: as `build_answerer`."""
    answer, seed = load_answer_settings(spec, {} if find_run(spec) else CHAT_SAMPLING)
    settings = AnswererSettings(spec, answer, seed)
    answerer = settings.build_on(opened.answerer, embed)
    fingerprint = f"fp_{settings.identity_on(opened.identity).digest}"
    return ServedModel(answerer, name, limits, fingerprint, opened=opened)


def _plans(options: ModelOptions) -> dict[str, Any]:
    """Room for what is loaded later, which the vllm engine needs to know: it takes most of the memory otherwise."""
    return {
        "later_adapters": 0 if options.adapters is None else _LATER_ADAPTERS,
        "memory_share": 0.45 if options.follow else 1,
    }


def _names(options: ModelOptions) -> list[tuple[str, str]]:
    """(name, spec) of each model. Raises: RunError, RecipeError."""
    return [(given or options.name or model_name(spec), spec) for given, spec in map(split_name, options.specs)]


def _read_promotion(spec: str) -> Promotion | None:
    """What a run stands for now; None if the spec is no run, or the run has no pointer that can be read."""
    with contextlib.suppress(RunError):
        return read_promotion(Path(spec)) if is_run(Path(spec)) else None
    return None


def _load_embedder(embed: Embedder) -> Embedder:
    """Fetch and load its model now, so that no request waits for it. Raises: AssetError."""
    embed(["loaded"])
    return embed


def split_name(text: str) -> tuple[str | None, str]:
    """(name, spec) of NAME=SPEC, or (None, spec): a spec may be a folder with an equals sign in its name."""
    match = _NAME.fullmatch(text)
    return (None, text) if match is None or Path(text).exists() else (match["name"], match["spec"])


def _check(options: ModelOptions, named: Sequence[tuple[str, str]]) -> None:
    """Raises: InputError (options that exclude each other), before anything is loaded."""
    if options.name is not None and len(named) > 1:
        where, hint = f"--name {options.name}", "write NAME=MODEL for each of several"
        raise InputError("--name names one model", where=where, hint=hint)
    names = [*(each for each, _ in named), *([ASSET] if options.embeddings else [])]
    for each in names:
        if names.count(each) > 1:
            raise InputError(
                f"two models are called {each!r}", where=", ".join(options.specs), hint="write NAME=MODEL for each"
            )
    if options.urls and (options.follow or options.adapters):
        flag = "--follow" if options.follow else "--adapters"
        raise InputError(
            "models at other endpoints cannot be loaded from here", where=flag, hint="give it to the servers at --url"
        )
    if options.follow and not any(is_run(Path(spec)) for _, spec in named):
        what = "only a run promotes models, and this is none"
        raise InputError(what, where=f"--follow {', '.join(options.specs)}", hint="name a run directory")
    if options.adapters is not None and not options.adapters.is_dir():
        hint = "name the folder that holds the folders of adapters"
        raise InputError("there is no such folder", where=f"--adapters {options.adapters}", hint=hint)


def _aliases(options: ModelOptions, first: str) -> Mapping[str, str]:
    """Alias → name. Raises: InputError (there are several models, and an alias names none)."""
    aliases: dict[str, str] = {}
    for text in options.aliases:
        alias, _, name = text.partition("=")
        if not name and len(options.specs) > 1:
            raise InputError("there are several models", where=f"--alias {text}", hint=f"write --alias {text}=MODEL")
        aliases[alias] = name or first
    return aliases


def _connect(named: Sequence[tuple[str, str]], urls: Sequence[str], at_once: int) -> list[OpenedModel]:
    # No retries: a client whose request no replica takes decides itself whether to wait. No second queue in the engine, which
    # would not be fair to keys as the server's own is.
    settings: Any = {"retries": 0, "check_seconds": _CHECK_SECONDS, "concurrency": at_once * len(urls)}
    several = len(named) > 1
    return [connect_model(spec, urls, model=name if several else None, **settings) for name, spec in named]


def _needs_embeddings(served: ServedModel) -> bool:
    """Whether a model's recipe needs embeddings to answer."""
    prompting, consensus = served.answerer.prompting, served.answerer.consensus
    return (prompting is not None and prompting.choose == "similar" and prompting.count > 0) or (
        consensus is not None and consensus.method == "cosine"
    )
