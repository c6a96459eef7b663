"""The route `/v1/embeddings`: texts → vectors of length 1 that are close to each other if the texts mean the same."""

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
from corral.serving.accounts import Reserve
from corral.serving.admission import Admission
from corral.serving.generation import count_usage
from corral.serving.models import ServedModels
from corral.serving.protocol import DEFAULT_LIMITS, Refused, RequestLimits, StrictModel, Usage, unsupported_except
from corral.serving.streams import Event, error_event

T = TypeVar("T")

_BATCH_TEXTS = 32  # a cancelled request computes at most these to the end


class EmbeddingRequest(StrictModel):
    """`POST /v1/embeddings`."""

    input: str | Annotated[list[str], Field(max_length=DEFAULT_LIMITS.inputs, fail_fast=True)]
    model: str
    encoding_format: Literal["float", "base64"] | None = None
    """`base64`: of little-endian 32-bit floats."""
    dimensions: Annotated[Any, unsupported_except(None, DIMENSIONS)] = None

    # Accepted without effect.
    user: str | None = None


class Embedding(BaseModel):
    """The vector of one text."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    """The response."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


def build_router(models: ServedModels, admission: Admission) -> APIRouter:
    """The route, for a server whose models have `embed`."""
    router = APIRouter()
    embed = models.embed
    assert embed is not None
    (limits, *_) = (served.limits for served in models.all())
    # One thread of its own: requests that wait do not hold threads that others need, and if they are cancelled while they
    # wait, they are never computed.
    thread = ThreadPoolExecutor(1, "embeddings")

    @router.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        if not models.is_embedding_model(body.model):
            what = f"the model {body.model!r} gives no embeddings: here {ASSET!r} does"
            raise Refused(404, what, param="model", code="model_not_found")
        return await admission.handle(
            request, lambda reserve: _start_embeddings(embed, thread, body, limits, reserve), stream=False, model=ASSET
        )

    return router


async def _run(thread: ThreadPoolExecutor, compute: Callable[[Sequence[str]], T], texts: Sequence[str]) -> T:
    return await asyncio.get_running_loop().run_in_executor(thread, compute, texts)


async def _start_embeddings(
    embed: Embedder, thread: ThreadPoolExecutor, body: EmbeddingRequest, limits: RequestLimits, reserve: Reserve
) -> EmbeddingsHandler:
    """Raises: Refused (there is nothing to embed, or too much)."""
    texts = [body.input] if isinstance(body.input, str) else body.input
    if not 1 <= len(texts) <= limits.inputs:
        raise Refused(400, f"'input': from 1 to {limits.inputs} texts are embedded at once", param="input")
    counts = await _run(thread, embed.count_tokens, texts)
    for index, (text, count) in enumerate(zip(texts, counts, strict=True)):
        param = "input" if isinstance(body.input, str) else f"input[{index}]"
        if not text:
            raise Refused(400, f"{param!r}: an empty text has no meaning to embed", param=param)
        if count > MAX_TOKENS:
            what = f"{param!r}: this model reads {MAX_TOKENS} tokens, and the text has {count}"
            raise Refused(400, what, param=param, code="context_length_exceeded")
    reserve(sum(counts), 0)
    return EmbeddingsHandler(embed, thread, texts, sum(counts), body.encoding_format or "float")


class EmbeddingsHandler:
    """An embeddings request that is being answered; see `RequestHandler`."""

    def __init__(
        self,
        embed: Embedder,
        thread: ThreadPoolExecutor,
        texts: Sequence[str],
        tokens: int,
        encoding: Literal["float", "base64"],
    ) -> None:
        self._embed = embed
        self._thread = thread
        self._texts = texts
        self._encoding = encoding
        self.usage: Usage = count_usage(tokens, 0)
        """The tokens of all texts."""

    async def result(self) -> EmbeddingList:
        """The complete response."""
        vectors: list[NDArray[np.float64]] = []
        for start in range(0, len(self._texts), _BATCH_TEXTS):
            vectors += [*await _run(self._thread, self._embed, self._texts[start : start + _BATCH_TEXTS])]
        tokens = self.usage.prompt_tokens
        return EmbeddingList(
            data=[Embedding(index=i, embedding=self._encode(vector)) for i, vector in enumerate(vectors)],
            model=ASSET,
            usage=EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens),
        )

    def _encode(self, vector: NDArray[np.float64]) -> list[float] | str:
        if self._encoding == "float":
            return vector.tolist()
        return base64.b64encode(vector.astype(np.dtype("<f4")).tobytes()).decode()

    async def events(self) -> AsyncGenerator[Event, None]:
        """The response as one event; OpenAI streams no vectors."""
        yield Event((await self.result()).model_dump_json())

    def error_event(self, refused: Refused) -> Event:
        """The error as the last event."""
        return error_event(refused)

    def cancel(self) -> None:
        """Do nothing: a cancelled `result` starts no further batch."""
