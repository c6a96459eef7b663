"""The models of a server by the name that clients give, and how what `corral serve` is given becomes them.

A run is asked as its recipe's `[answer]` says. Adapters of one base share its weights. With URLs other machines compute, and
whether they do is looked at now and then. It knows nothing about requests.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from corral.answering.identity import fingerprint_with_settings
from corral.answering.open_model import OpenedModel, check_engine, connect_model, open_models
from corral.answering.settings import AnswererSettings, find_run, load_answer_settings
from corral.engines.base import CHAT_SAMPLING
from corral.engines.embedding import ASSET, MAX_TOKENS, Embedder
from corral.engines.registry import EngineName
from corral.errors import InputError
from corral.model.naming import model_name
from corral.serving.generation import Served
from corral.serving.protocol import Limits, Model, Refused

_CHECK_SECONDS = 5.0  # how long a replica may be gone before readiness tells, where nobody asks
_NAME = re.compile(r"(?P<name>[^=/\\:]+)=(?P<spec>.+)", re.DOTALL)


class Models:
    """Models by name.

    Args:
        served: at least one; their engines are closed with `close`.
        embed: what `/v1/embeddings` and votes by cosine compute with.
    """

    def __init__(self, served: Sequence[Served], embed: Embedder | None = None) -> None:
        self.embed = embed
        self._served = {each.name: each for each in served}

    def find(self, name: str) -> Served:
        """The model of that name. Raises: Refused (404, `model_not_found`)."""
        found = self._served.get(name)
        if found is None:
            names = ", ".join(map(repr, self._served))
            what = f"the model {name!r} does not exist: this server has {names}"
            raise Refused(404, what, param="model", code="model_not_found")
        return found

    def all(self) -> Sequence[Served]:
        """All of them, in the order they were given."""
        return [*self._served.values()]

    def listed(self) -> list[Model]:
        """The entries of `/v1/models`: with `embed`, its model comes last."""
        found = [Model(id=each.name, created=each.created, max_model_len=each.context) for each in self.all()]
        if self.embed is not None:
            found.append(Model(id=ASSET, created=found[0].created, max_model_len=MAX_TOKENS, task="embeddings"))
        return found

    @property
    def ready(self) -> bool:
        """Whether each of them has an engine that computes."""
        return all(served.answerer.engine.ready for served in self._served.values())

    async def close(self) -> None:
        """Close all engines."""
        engines = {id(served.answerer.engine): served.answerer.engine for served in self._served.values()}
        await asyncio.gather(*(engine.close() for engine in engines.values()))


def open_served(
    specs: Sequence[str],
    *,
    engine: EngineName | None = None,
    urls: Sequence[str] = (),
    name: str | None = None,
    limits: Limits | None = None,
    embeddings: bool = False,
    at_once: int = 128,
) -> Models:
    """Load what a server is to serve.

    Args:
        specs: each a run directory or any model spec, or NAME=SPEC. Without a name it is the run's, folder's, asset's or
            hub's.
        engine: one of `engines.load.ENGINES`; None takes the one meant for the device, or `remote` with URLs.
        urls: of replicas, endpoints that all serve these models; of several models, under these names.
        name: of the one model, if there is one.
        limits: of each request.
        embeddings: load what embeds, for clients that ask for it.
        at_once: how many requests of clients are worked on at a time: so many have room at each URL.

    Raises:
        InputError: two models have one name, a name is given for several, or URLs without the remote engine.
        RunError, ModelError, AssetError, TemplateError, MissingExtraError, DataError: see `open_model` and `build_answerer`.
    """
    local = check_engine(engine, urls)
    named = [_named(text, name) for text in specs]
    if name is not None and len(named) > 1:
        raise InputError("--name names one model", where=f"--name {name}", hint="write NAME=MODEL for each of several")
    names = [*(each for each, _ in named), *([ASSET] if embeddings else [])]
    for each in names:
        if names.count(each) > 1:
            raise InputError(
                f"two models are called {each!r}", where=", ".join(specs), hint="write NAME=MODEL for each"
            )
    opened = _reached(named, urls, at_once) if urls else open_models([spec for _, spec in named], local)
    embed = Embedder()
    limits = limits or Limits()
    served = [_served(*of, each, limits, embed) for of, each in zip(named, opened, strict=True)]
    if embeddings or any(map(_embeds, served)):
        embed(["No request should wait for this model to be fetched and loaded."])
        served = [replace(each, embed=embed) for each in served]
    return Models(served, embed if embeddings else None)


def _named(text: str, name: str | None) -> tuple[str, str]:
    """(name, spec) of NAME=SPEC, or of a spec: a folder may have an equals sign in its name."""
    found = _NAME.fullmatch(text)
    if found is None or Path(text).exists():
        return name or model_name(text), text
    return name or found["name"], found["spec"]


def _reached(named: Sequence[tuple[str, str]], urls: Sequence[str], at_once: int) -> list[OpenedModel]:
    # A request that no replica takes is told so at once; who asked knows better whether to wait. Those let in are not made to
    # wait once more, where turns would not go round the keys.
    settings: Any = {"retries": 0, "check_seconds": _CHECK_SECONDS, "concurrency": at_once * len(urls)}
    several = len(named) > 1
    return [connect_model(spec, urls, model=name if several else None, **settings) for name, spec in named]


def _served(name: str, spec: str, opened: OpenedModel, limits: Limits, embed: Embedder) -> Served:
    answer, seed = load_answer_settings(spec, {} if find_run(spec) else CHAT_SAMPLING)
    answerer = AnswererSettings(spec, answer, seed).build_on(opened.answerer, embed)
    fingerprint = opened.fingerprint
    if answerer.prompting or answerer.consensus:
        fingerprint = fingerprint_with_settings(fingerprint, answer)
    return Served(answerer, name, limits, f"fp_{fingerprint}")


def _embeds(served: Served) -> bool:
    """Whether the recipe of a model needs embeddings for each answer."""
    prompting, consensus = served.answerer.prompting, served.answerer.consensus
    return (prompting is not None and prompting.choose == "similar" and prompting.count > 0) or (
        consensus is not None and consensus.method == "cosine"
    )
