"""The models of a server by name. They may come and go while requests run; `model_loading` opens them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from corral.answering.answerer import Answerer
from corral.answering.consensus import Embed
from corral.answering.open_model import OpenedModel
from corral.engines.base import Engine
from corral.engines.embedding import ASSET, MAX_TOKENS, Embedder
from corral.errors import InputError
from corral.run.promotion import Promotion
from corral.serving.protocol import Model, Refused, RequestLimits
from corral.template import Template
from corral.template.tokenization import PieceTokenizer


@dataclass(frozen=True)
class ServedModel:
    """A model as clients see it."""

    answerer: Answerer
    name: str
    limits: RequestLimits = field(default_factory=RequestLimits)
    fingerprint: str | None = None
    """Changes when the same request and seed may give another answer."""
    created: int = field(default_factory=lambda: int(time.time()))
    """When it was loaded, in seconds since 1970."""
    embed: Embed | None = None
    """For cosine consensus, which is refused without it."""
    opened: OpenedModel | None = None
    """What it was made from; adapters may be loaded beside it."""
    promotion: Promotion | None = None
    """Of a run: which of its models this is."""

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

    A request keeps its model loaded with `use`. The engine of a model that was removed or replaced is closed when no request
    and no other model uses it any more. All methods belong to the event loop of the server.

    Args:
        served: at least one; `close` closes their engines.
        embed: for `/v1/embeddings`; None: there is no such route.
        aliases: other name → name of a model, or of the embedding model.

    Raises:
        InputError: an alias is the name of a model, or names none.
    """

    def __init__(
        self, served: Sequence[ServedModel], embed: Embedder | None = None, aliases: Mapping[str, str] | None = None
    ) -> None:
        self.embed = embed
        self._served = {each.name: each for each in served}
        self._aliases = dict(aliases or {})
        self._requests: Counter[Engine] = Counter()
        """How many requests use each engine."""
        self._closing: set[asyncio.Task[None]] = set()
        names = [*self._served, *([ASSET] if embed is not None else [])]
        for alias, name in self._aliases.items():
            if alias in names or name not in names:
                raise InputError(
                    f"the alias {alias!r} is the name of a model" if alias in names else f"there is no model {name!r}",
                    where=f"--alias {alias}={name}",
                    hint=f"the models are {', '.join(names)}",
                )

    def get(self, name: str) -> ServedModel:
        """The model of that name or alias. Raises: Refused (404, `model_not_found`)."""
        served = self._served.get(self._aliases.get(name, name))
        if served is None:
            names = ", ".join(map(repr, self._served))
            what = f"the model {name!r} does not exist: this server has {names}"
            raise Refused(404, what, param="model", code="model_not_found")
        return served

    def is_embedding_model(self, name: str) -> bool:
        """Whether this is the name or an alias of the model of `/v1/embeddings`."""
        return self._aliases.get(name, name) == ASSET

    def all(self) -> Sequence[ServedModel]:
        """All models, in the given order, and those that came later."""
        return [*self._served.values()]

    @contextlib.contextmanager
    def use(self, served: ServedModel) -> Generator[None]:
        """Keep a model loaded until a request ends."""
        engine = served.answerer.engine
        self._requests[engine] += 1
        try:
            yield
        finally:
            self._requests[engine] -= 1
            self._close_unused(engine)

    def add(self, served: ServedModel) -> None:
        """Serve one more model, or another one under a name that is served: new requests get it, running ones keep theirs."""
        before = self._served.get(served.name)
        self._served[served.name] = served
        if before is not None:
            self._close_unused(before.answerer.engine)

    def remove(self, name: str) -> None:
        """Serve a model no longer; its running requests end as usual."""
        self._close_unused(self._served.pop(name).answerer.engine)

    def has_name(self, name: str) -> bool:
        """Whether a model or an alias has this name."""
        return name in self._served or name in self._aliases or (self.embed is not None and name == ASSET)

    def list_entries(self, max_requests: int) -> list[Model]:
        """The entries of `/v1/models`; the embedding model, if there is one, and aliases come last.

        Args:
            max_requests: how many requests the server runs at once.
        """
        entries = {
            each.name: Model(id=each.name, created=each.created, max_model_len=each.context, max_requests=max_requests)
            for each in self.all()
        }
        if self.embed is not None:
            created = next(iter(entries.values())).created
            entries[ASSET] = Model(
                id=ASSET, created=created, max_model_len=MAX_TOKENS, max_requests=max_requests, task="embeddings"
            )
        aliases = [
            entries[name].model_copy(update={"id": alias, "alias_of": name})
            for alias, name in self._aliases.items()
            if name in entries
        ]
        return [*entries.values(), *aliases]

    async def close(self) -> None:
        """Close all engines."""
        engines = {*(served.answerer.engine for served in self._served.values()), *self._requests}
        await asyncio.gather(*(engine.close() for engine in engines), *self._closing)

    def _close_unused(self, engine: Engine) -> None:
        """Close an engine that no model and no request uses any more."""
        if self._requests[engine] or any(each.answerer.engine is engine for each in self._served.values()):
            return
        del self._requests[engine]
        task = asyncio.get_running_loop().create_task(_close(engine))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


async def _close(engine: Engine) -> None:
    """Close an engine and free its weights now: requests are cycles that hold their engine, and who is idle collects none."""
    await engine.close()
    del engine
    gc.collect()
