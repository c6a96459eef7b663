"""The models of a server by name, and how they are loaded.

A run is served with the settings of its recipe's `[answer]`. Adapters of one base share its weights. With URLs, other servers
compute the answers, and are checked regularly.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from corral.answering.answerer import Answerer
from corral.answering.consensus import Embed
from corral.answering.open_model import OpenedModel, check_engine, connect_model, open_models
from corral.answering.settings import AnswererSettings, find_run, load_answer_settings
from corral.engines.base import CHAT_SAMPLING
from corral.engines.embedding import ASSET, MAX_TOKENS, Embedder
from corral.engines.registry import EngineName
from corral.errors import InputError
from corral.model.naming import model_name
from corral.serving.protocol import Model, Refused, RequestLimits
from corral.template import Template
from corral.template.tokenization import PieceTokenizer

_CHECK_SECONDS = 5.0  # how often replicas are checked while there are no requests
_NAME = re.compile(r"(?P<name>[^=/\\:]+)=(?P<spec>.+)", re.DOTALL)


@dataclass(frozen=True)
class ServedModel:
    """A model as clients see it."""

    answerer: Answerer
    name: str
    limits: RequestLimits = field(default_factory=RequestLimits)
    fingerprint: str | None = None
    """Changes when the same request and seed may give another answer."""
    created: int = field(default_factory=lambda: int(time.time()))
    """When the server started, in seconds since 1970."""
    embed: Embed | None = None
    """For cosine consensus, which is refused without it."""

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        return self.answerer.engine.features.max_length

    @cached_property
    def plain_text(self) -> PlainTextTokenizer:
        """For prompts without a template."""
        return PlainTextTokenizer(self.answerer.template)


class PlainTextTokenizer:
    """Tokenises prompts that are plain text, with the tokenizer's usual start (BOS if it has one).

    A special token's name in the text stays text, as in a chat message. A client that means the token sends its id.
    """

    def __init__(self, template: Template) -> None:
        self._template = template

    def ids(self, text: str, *, begin: bool = True) -> list[int]:
        """The ids of a text, after those that the tokenizer puts before every text if `begin`. Raises: TemplateError."""
        ids = self._tokens.tokenize([(self._tokens.escape(text), False)]).ids
        return [*self._prefix, *ids] if begin else [*ids]

    @cached_property
    def _tokens(self) -> PieceTokenizer:
        return PieceTokenizer(self._template.tokenizer, self._template.bare_source)

    @cached_property
    def _prefix(self) -> list[int]:
        encoded = self._template.tokenizer.backend_tokenizer.encode("a", add_special_tokens=True)
        return encoded.ids[: encoded.special_tokens_mask.index(0)]


class ServedModels:
    """Models by name.

    Args:
        served: at least one; `close` closes their engines.
        embed: for `/v1/embeddings`; None: there is no such route.
    """

    def __init__(self, served: Sequence[ServedModel], embed: Embedder | None = None) -> None:
        self.embed = embed
        self._served = {each.name: each for each in served}

    def get(self, name: str) -> ServedModel:
        """The model of that name. Raises: Refused (404, `model_not_found`)."""
        served = self._served.get(name)
        if served is None:
            names = ", ".join(map(repr, self._served))
            what = f"the model {name!r} does not exist: this server has {names}"
            raise Refused(404, what, param="model", code="model_not_found")
        return served

    def all(self) -> Sequence[ServedModel]:
        """All models, in the given order."""
        return [*self._served.values()]

    def list_entries(self, max_requests: int) -> list[Model]:
        """The entries of `/v1/models`; the embedding model, if there is one, comes last.

        Args:
            max_requests: how many requests the server runs at once.
        """
        entries = [
            Model(id=each.name, created=each.created, max_model_len=each.context, max_requests=max_requests)
            for each in self.all()
        ]
        if self.embed is not None:
            entries.append(
                Model(
                    id=ASSET,
                    created=entries[0].created,
                    max_model_len=MAX_TOKENS,
                    max_requests=max_requests,
                    task="embeddings",
                )
            )
        return entries

    @property
    def ready(self) -> bool:
        """Whether the engines of all models can compute."""
        return all(served.answerer.engine.ready for served in self._served.values())

    async def close(self) -> None:
        """Close all engines."""
        engines = {id(served.answerer.engine): served.answerer.engine for served in self._served.values()}
        await asyncio.gather(*(engine.close() for engine in engines.values()))


def open_served_models(
    specs: Sequence[str],
    *,
    engine: EngineName | None = None,
    urls: Sequence[str] = (),
    name: str | None = None,
    embeddings: bool = False,
    at_once: int = 128,
) -> ServedModels:
    """Load the models of a server.

    Args:
        specs: each a run directory or any model spec, or NAME=SPEC. Without a name it is the run's, folder's, asset's or
            hub's.
        engine: the engine's name; None: the default of this device, or `remote` with URLs.
        urls: replicas, which all serve these models; if there are several models, under the same names as here.
        name: the name of the model, if there is only one.
        embeddings: offer `/v1/embeddings`.
        at_once: requests that this server runs at a time; each URL is sent up to as many.

    Raises:
        InputError: two models have the same name, `name` is given for several, or URLs without the remote engine.
        RunError, ModelError, AssetError, TemplateError, MissingExtraError, DataError: see `open_model` and `build_answerer`.
    """
    local = check_engine(engine, urls)
    named = [(given or name or model_name(spec), spec) for given, spec in map(split_name, specs)]
    if name is not None and len(named) > 1:
        raise InputError("--name names one model", where=f"--name {name}", hint="write NAME=MODEL for each of several")
    names = [*(each for each, _ in named), *([ASSET] if embeddings else [])]
    for each in names:
        if names.count(each) > 1:
            raise InputError(
                f"two models are called {each!r}", where=", ".join(specs), hint="write NAME=MODEL for each"
            )
    opened = _connect_remote(named, urls, at_once) if urls else open_models([spec for _, spec in named], local)
    embed = Embedder()
    served = [_build_served_model(name, spec, each, embed) for (name, spec), each in zip(named, opened, strict=True)]
    if embeddings or any(map(_needs_embeddings, served)):
        embed(["No request should wait for this model to be fetched and loaded."])
        served = [replace(each, embed=embed) for each in served]
    return ServedModels(served, embed if embeddings else None)


def split_name(text: str) -> tuple[str | None, str]:
    """(name, spec) of NAME=SPEC, or (None, spec): a spec may be a folder with an equals sign in its name."""
    match = _NAME.fullmatch(text)
    return (None, text) if match is None or Path(text).exists() else (match["name"], match["spec"])


def _connect_remote(named: Sequence[tuple[str, str]], urls: Sequence[str], at_once: int) -> list[OpenedModel]:
    # No retries: a client whose request no replica takes decides itself whether to wait. No second queue in the engine, which
    # would not be fair to keys as `RequestQueue` is.
    settings: Any = {"retries": 0, "check_seconds": _CHECK_SECONDS, "concurrency": at_once * len(urls)}
    several = len(named) > 1
    return [connect_model(spec, urls, model=name if several else None, **settings) for name, spec in named]


def _build_served_model(name: str, spec: str, opened: OpenedModel, embed: Embedder) -> ServedModel:
    answer, seed = load_answer_settings(spec, {} if find_run(spec) else CHAT_SAMPLING)
    settings = AnswererSettings(spec, answer, seed)
    answerer = settings.build_on(opened.answerer, embed)
    return ServedModel(answerer, name, fingerprint=f"fp_{settings.identity_on(opened.identity).digest}")


def _needs_embeddings(served: ServedModel) -> bool:
    """Whether a model's recipe needs embeddings to answer."""
    prompting, consensus = served.answerer.prompting, served.answerer.consensus
    return (prompting is not None and prompting.choose == "similar" and prompting.count > 0) or (
        consensus is not None and consensus.method == "cosine"
    )
