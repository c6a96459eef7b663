"""What the endpoints offer: the model, the length of its context, and what they return besides text."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx2

from corral.engines.base import OPTIONAL_SAMPLING
from corral.engines.remote.client import Chunk, ListedModel
from corral.engines.remote.failover import FailoverClient
from corral.engines.remote.protocol import one_line
from corral.errors import EngineError, EngineUnavailableError, InputError, ModelError, RequestError

DEFAULT_REQUESTS = 64
"""Requests that an endpoint is sent at once if it does not list how many it runs."""
_MOST_REQUESTS = 1024  # whatever an endpoint lists

RETURN_TOPS: dict[str, Any] = {"return_tokens_as_token_ids": True}
"""Fields that make a server name the most likely tokens by their ids."""
RETURN_IDS: dict[str, Any] = {"return_token_ids": True, "ignore_eos": True, "stop_token_ids": []}
"""Fields of a request that make a server return token ids, and end at stop ids only."""


@dataclass(frozen=True)
class Returned:
    """What a server returns besides text."""

    ids: bool
    logprobs: bool
    """Of the ids that it generates."""
    scores: bool
    """Log-probabilities of the prompt."""
    tops: bool
    """The most likely ids at each place of both."""

    @property
    def honours(self) -> frozenset[str]:
        """The optional fields of Sampling that the server is taken to honour: OpenAI's. All if it knows vLLM's extensions: it
        returns ids."""
        if not self.ids:
            return frozenset({"frequency_penalty", "presence_penalty", "logit_bias"})
        return frozenset(OPTIONAL_SAMPLING) - (frozenset() if self.tops else {"top_logprobs"})


async def probe(endpoints: FailoverClient, model: str) -> Returned:
    """Ask for one token, and for less of the rest until the server knows all fields.

    Returns: all of it if the endpoints are too busy to answer: they are taken to be corral's own.

    Raises:
        ModelError: the server completes no token ids.
    """

    async def read(response: httpx2.Response) -> Returned:
        chunk = Chunk.model_validate_json(await response.aread())
        if not chunk.choices or chunk.choices[0].token_ids is None:
            return Returned(False, False, False, False)
        values, tops = chunk.logprobs.token_logprobs, False
        with suppress(EngineError):
            tops = any(chunk.logprobs.alternatives(1))
        return Returned(True, bool(values), len(values) > 1 and values[1] is not None, tops)

    tops, logprobs, echo = RETURN_TOPS | {"logprobs": 1}, {"logprobs": 0}, {"echo": True}
    refusal = EngineError("")
    for more in (tops | echo, logprobs | echo, logprobs, {}, None):
        fields: dict[str, Any] = {} if more is None else RETURN_IDS | more
        try:
            body = {"model": model, "prompt": [1, 2], "max_tokens": 1} | fields
            return await endpoints.post("/completions", body, read)
        except RequestError as error:
            refusal = error
        except EngineUnavailableError:
            return Returned(True, True, True, True)
        except EngineError as error:
            refusal = error
            break
    hint = "it must complete token ids at /v1/completions, as corral serve, vLLM and llama.cpp's server do"
    raise ModelError(refusal.what, where=refusal.where, hint=hint)


def find_model(listed: Sequence[tuple[str, Sequence[ListedModel]]], name: str | None) -> list[ListedModel]:
    """The entry of the model in the list of each endpoint. Raises: ModelError."""
    entries: list[ListedModel] = []
    for url, all_models in listed:
        models = {model.id: model for model in reversed(all_models) if model.task == "chat"}
        own = [name for name, model in reversed(models.items()) if model.alias_of is None]
        names = one_line(", ".join(own)) or "none"
        if name is None and len(own) != 1:
            raise ModelError(f"the endpoint has several models, or none: {names}", where=url, hint="name one of them")
        name = name or own[0]  # the other endpoints must have it too
        if name not in models:
            raise ModelError(f"the endpoint has no model {name!r}; it has: {names}", where=url, hint="name one of them")
        entries.append(models[name])
    return entries


def shortest_context(models: Sequence[ListedModel], known: int | None) -> int:
    """The context length that all endpoints have. Raises: InputError (an endpoint lists none, and none is known)."""
    lengths = [length for model in models if (length := model.max_model_len or known)]
    if len(lengths) != len(models):
        raise InputError("an endpoint does not tell the model's context", hint="give max_length, in tokens")
    return min(lengths if known is None else [*lengths, known])


def requests_at_once(models: Sequence[ListedModel], endpoints: int) -> int:
    """How many requests so many endpoints run at once, of which some answered with their entry of the model."""
    listed = [min(max(1, model.max_requests or DEFAULT_REQUESTS), _MOST_REQUESTS) for model in models]
    return sum(listed) + DEFAULT_REQUESTS * (endpoints - len(listed))
