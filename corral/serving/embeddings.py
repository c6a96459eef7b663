"""`/v1/embeddings`: texts → vectors of length 1 that are near each other where the texts mean the same.

Offered where a server was started with it. It knows OpenAI's form of request and answer; it does not know how vectors are
computed, or what they are for.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from corral.engines.embedding import ASSET, DIMENSIONS, MAX_TOKENS, Embedder
from corral.serving.admission import Door, Event
from corral.serving.generation import usage
from corral.serving.protocol import USUAL, Body, Limits, Refused, Usage, only
from corral.serving.served_models import Models

T = TypeVar("T")

_AT_ONCE = 32  # texts: a client that goes away, or whose time is up, waits for no more than these


class EmbeddingRequest(Body):
    """`POST /v1/embeddings`."""

    input: str | Annotated[list[str], Field(max_length=USUAL.inputs, fail_fast=True)]
    model: str
    encoding_format: Literal["float", "base64"] | None = None
    """`base64`: of little-endian 32-bit floats."""
    dimensions: Annotated[Any, only(None, DIMENSIONS)] = None

    # Sent by habit.
    user: str | None = None


class Embedding(BaseModel):
    """The vector of one text."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens that were read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    """The answer."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


def routes(models: Models, door: Door) -> APIRouter:
    """The route, of a server whose models have `embed`."""
    router = APIRouter()
    embed = models.embed
    assert embed is not None
    (limits, *_) = (served.limits for served in models.all())
    turns = InTurn()

    @router.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        if body.model != ASSET:
            what = f"the model {body.model!r} gives no embeddings: here {ASSET!r} does"
            raise Refused(404, what, param="model", code="model_not_found")
        return await door.answer(request, lambda: _asked(embed, turns, body, limits), stream=False, model=ASSET)

    return router


class InTurn:
    """Computes one thing at a time, in a thread of its own, so that those who wait do not hold the threads that others need.

    What is cancelled while it waits is never computed; what is being computed is computed to its end, and only then the next.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "embeddings")

    async def take(self, compute: Callable[[Sequence[str]], T], texts: Sequence[str]) -> T:
        """What `compute` makes of these texts. Raises: what it raises."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, compute, texts)


async def _asked(embed: Embedder, turns: InTurn, body: EmbeddingRequest, limits: Limits) -> AskedVectors:
    """Raises: Refused (there is nothing to embed, or too much)."""
    texts = [body.input] if isinstance(body.input, str) else body.input
    if not 1 <= len(texts) <= limits.inputs:
        raise Refused(400, f"'input': from 1 to {limits.inputs} texts are embedded at once", param="input")
    counts = await turns.take(embed.count_tokens, texts)
    for place, (text, count) in enumerate(zip(texts, counts, strict=True)):
        param = "input" if isinstance(body.input, str) else f"input[{place}]"
        if not text:
            raise Refused(400, f"{param!r}: an empty text has no meaning to embed", param=param)
        if count > MAX_TOKENS:
            what = f"{param!r}: this model reads {MAX_TOKENS} tokens, and the text has {count}"
            raise Refused(400, what, param=param, code="context_length_exceeded")
    return AskedVectors(embed, turns, texts, sum(counts), body.encoding_format or "float")


class AskedVectors:
    """A request under way."""

    def __init__(
        self,
        embed: Embedder,
        turns: InTurn,
        texts: Sequence[str],
        tokens: int,
        form: Literal["float", "base64"],
    ) -> None:
        self._embed = embed
        self._turns = turns
        self._texts = texts
        self._form = form
        self.usage: Usage = usage(tokens, 0)
        """The tokens of all texts."""

    async def whole(self) -> EmbeddingList:
        """The answer."""
        vectors: list[NDArray[np.float64]] = []
        for start in range(0, len(self._texts), _AT_ONCE):
            vectors += [*await self._turns.take(self._embed, self._texts[start : start + _AT_ONCE])]
        told = [
            vector.tolist()
            if self._form == "float"
            else base64.b64encode(vector.astype(np.dtype("<f4")).tobytes()).decode()
            for vector in vectors
        ]
        tokens = self.usage.prompt_tokens
        return EmbeddingList(
            data=[Embedding(index=i, embedding=each) for i, each in enumerate(told)],
            model=ASSET,
            usage=EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens),
        )

    async def events(self) -> AsyncGenerator[Event, None]:
        """The answer as one event; OpenAI streams no vectors."""
        yield Event((await self.whole()).model_dump_json())

    def cancel(self) -> None:
        """Nothing outlives `whole` but the texts at hand."""
