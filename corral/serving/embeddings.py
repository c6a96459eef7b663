"""The route `/v1/embeddings`: texts → vectors of length 1 that are close to each other if the texts mean the same.

The model reads 254 tokens. A longer text is read in windows of so many; its vector is the mean of theirs, weighted by their
tokens and brought to length 1 again. With `dimensions`, a vector is cut to its first so many numbers and brought to length 1;
the model was not trained for that, so short ones lose more than those of models that were.
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

from corral.engines.embedding import ASSET, DIMENSIONS, VOCABULARY, WINDOW, Embedder
from corral.serving.accounts import Reserve
from corral.serving.admission import Admission
from corral.serving.errors import Refused
from corral.serving.generation import check_known_fields, check_rules, count_usage
from corral.serving.models import ServedModels
from corral.serving.protocol import DEFAULT_LIMITS, RequestLimits, Usage, json_list, json_with, texts_or_ids
from corral.serving.request_fields import RequestBody, report
from corral.serving.streams import Event, error_event

T = TypeVar("T")

_BATCH = 32  # windows; a cancelled request computes at most these to the end


class EmbeddingRequest(RequestBody):
    """`POST /v1/embeddings`. Token ids are those of the embedding model's own tokenizer."""

    input: Annotated[Any, texts_or_ids(DEFAULT_LIMITS.inputs)]
    model: str
    encoding_format: Literal["float", "base64"] | None = None
    """`base64`: of little-endian 32-bit floats."""
    dimensions: int | None = Field(None, ge=1, le=DIMENSIONS)
    ignored = frozenset({"user"})


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
        response = await admission.handle(
            request, lambda reserve: _start_embeddings(embed, thread, body, limits, reserve), stream=False, model=ASSET
        )
        return report(body.notes, response)

    return router


async def _run(thread: ThreadPoolExecutor, function: Callable[..., T], *arguments: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(thread, function, *arguments)


async def _start_embeddings(
    embed: Embedder, thread: ThreadPoolExecutor, body: EmbeddingRequest, limits: RequestLimits, reserve: Reserve
) -> EmbeddingsHandler:
    """Raises: Refused (there is nothing to embed, or too much)."""
    check_known_fields(limits, body)
    inputs: list[Any] = body.input
    texts = all(isinstance(each, str) for each in inputs)
    empty = next((i for i, each in enumerate(inputs) if not each), None)
    broken = next((i for i, each in enumerate(inputs) if texts and _is_broken(each)), None)
    check_rules(
        (
            (len(inputs) > limits.inputs, "input", f"at most {limits.inputs} texts are embedded at once"),
            (empty is not None, f"input[{empty}]", "an empty text has no meaning to embed"),
            (broken is not None, f"input[{broken}]", "the text contains half a surrogate pair, which is no character"),
        )
    )
    ids: list[list[int]] = await _run(thread, embed.tokenize, inputs) if texts else inputs
    beyond = next((i for i, each in enumerate(ids) if each and not 0 <= min(each) <= max(each) < VOCABULARY), None)
    windows = [(i, each[at : at + WINDOW]) for i, each in enumerate(ids) for at in range(0, max(1, len(each)), WINDOW)]
    own = (
        f"ids are those of this model's tokenizer, from 0 to {VOCABULARY - 1}: send text (in LangChain: "
        f"check_embedding_ctx_length=False), or the ids of {ASSET!r}"
    )
    most = f"the texts have {sum(map(len, ids))} tokens, and at most {limits.inputs} windows of {WINDOW} are embedded"
    check_rules(((beyond is not None, f"input[{beyond}]", own), (len(windows) > limits.inputs, "input", most)))
    handler = EmbeddingsHandler(embed, thread, body, windows)
    reserve(handler.usage.prompt_tokens, 0)
    return handler


def _is_broken(text: str) -> bool:
    """Whether a text has no UTF-8, because it contains half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


class EmbeddingsHandler:
    """An embeddings request that is being answered; see `RequestHandler`.

    Args:
        windows: (index of the text, ids of a part of it), in the order of the texts.
    """

    def __init__(
        self,
        embed: Embedder,
        thread: ThreadPoolExecutor,
        request: EmbeddingRequest,
        windows: Sequence[tuple[int, Sequence[int]]],
    ) -> None:
        self._embed = embed
        self._thread = thread
        self._request = request
        self._windows = windows
        self.usage: Usage = count_usage(sum(len(ids) + 2 for _, ids in windows), 0)
        """The tokens of all texts, with the special ones around each window."""

    async def result(self) -> str:
        """The complete response as JSON."""
        sums = np.zeros((1 + self._windows[-1][0], DIMENSIONS))
        for start in range(0, len(self._windows), _BATCH):
            batch = self._windows[start : start + _BATCH]
            vectors = await _run(self._thread, self._embed.embed_ids, [ids for _, ids in batch])
            for (index, ids), vector in zip(batch, vectors, strict=True):
                sums[index] += max(1, len(ids)) * vector
        return await _run(self._thread, self._encode, sums)

    def _encode(self, sums: NDArray[np.float64]) -> str:
        vectors = _normalise(_normalise(sums)[:, : self._request.dimensions or DIMENSIONS])
        tokens = self.usage.prompt_tokens
        usage = EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens)
        data = (Embedding(index=i, embedding=self._form(each)).model_dump_json() for i, each in enumerate(vectors))
        return json_with(EmbeddingList(data=[], model=ASSET, usage=usage), data=json_list(data))

    def _form(self, vector: NDArray[np.float64]) -> list[float] | str:
        if self._request.encoding_format != "base64":
            return vector.tolist()
        return base64.b64encode(vector.astype(np.dtype("<f4")).tobytes()).decode()

    async def events(self) -> AsyncGenerator[Event, None]:
        """The response as one event; OpenAI streams no vectors."""
        yield Event(await self.result())

    def error_event(self, refused: Refused) -> Event:
        """The error as the last event."""
        return error_event(refused)

    def cancel(self) -> None:
        """Do nothing: a cancelled `result` starts no further batch."""


def _normalise(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bring each row to length 1; a row of zeros stays."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1)
