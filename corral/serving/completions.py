"""Between protocol and Answerer: a ChatRequest → a TextStream → a ChatCompletion, or the events of a stream.

Every fault becomes a Refused with the status and the words OpenAI's clients expect. It does not know HTTP: who is connected,
how events are sent, or that there are routes.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Generator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from corral.answerer import Answerer, TextDelta, TextStream, Token
from corral.engines.base import Finish, Sampling
from corral.errors import CorralError, EngineClosedError, RequestError, TemplateError
from corral.messages import Conversation
from corral.serving.protocol import (
    Ask,
    ChatCompletion,
    ChatMessage,
    ChatRequest,
    Choice,
    Chunk,
    ChunkChoice,
    Limits,
    Logprobs,
    Message,
    Refused,
    TokenLogprob,
    Usage,
)

DONE = "[DONE]"
"""The data of the event that ends a stream."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Served:
    """A model as clients see it."""

    answerer: Answerer
    name: str
    limits: Limits = field(default_factory=Limits)
    fingerprint: str | None = None
    """Changes when the same request and seed may give another answer."""
    created: int = field(default_factory=lambda: int(time.time()))
    """When serving began, in seconds since 1970."""

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        return self.answerer.engine.features.max_length


class Asked:
    """A request under way: its text as it comes (`events`) or at its end (`whole`).

    Args:
        served: what answers.
        request: what was asked.

    Raises:
        Refused: the request cannot be answered.
    """

    def __init__(self, served: Served, request: ChatRequest) -> None:
        self._served = served
        self._request = request
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        with faults():
            self._stream = _begin(served, request)

    async def whole(self) -> ChatCompletion:
        """The answer. Raises: Refused (the engine failed)."""
        with faults():
            answer = await self._stream.whole()
        tokens = answer.tokens or [None] * len(answer.texts)
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._served.name,
            system_fingerprint=self._served.fingerprint,
            choices=[
                Choice(
                    index=i,
                    message=Message(content=text),
                    logprobs=None if of_text is None else self._logprobs(of_text),
                    finish_reason=finish_reason(completion.finish),
                )
                for i, (text, completion, of_text) in enumerate(
                    zip(answer.texts, answer.completions, tokens, strict=True)
                )
            ],
            usage=self._usage(),
        )

    async def events(self) -> AsyncGenerator[str, None]:
        """The data of each event, as JSON, and "[DONE]". A fault is the last event, with nothing after it."""
        try:
            for i in range(self._request.n or 1):
                yield self._chunk(ChunkChoice(index=i, delta=_FIRST, logprobs=None, finish_reason=None))
            with faults():
                async with contextlib.aclosing(aiter(self._stream)) as deltas:
                    async for delta in deltas:
                        for choice in self._choices(delta):
                            yield self._chunk(choice)
            if self._request.wants_usage:
                yield self._chunk(usage=self._usage())
            yield DONE
        except Refused as refused:
            yield refused.body().model_dump_json()

    def cancel(self) -> None:
        """Stop the work; harmless once it has ended."""
        self._stream.cancel()

    def _choices(self, delta: TextDelta) -> list[ChunkChoice]:
        found: list[ChunkChoice] = []
        if delta.text or delta.tokens:
            logprobs = self._logprobs(delta.tokens) if self._request.logprobs else None
            text = {"content": delta.text}
            found.append(ChunkChoice(index=delta.choice, delta=text, logprobs=logprobs, finish_reason=None))
        if delta.finish is not None:
            reason = finish_reason(delta.finish)
            found.append(ChunkChoice(index=delta.choice, delta={}, logprobs=None, finish_reason=reason))
        return found

    def _chunk(self, *choices: ChunkChoice, usage: Usage | None = None) -> str:
        chunk = Chunk(
            id=self._id,
            created=self._created,
            model=self._served.name,
            system_fingerprint=self._served.fingerprint,
            choices=list(choices),
            usage=usage,
        )
        # OpenAI sends `usage` (null in all chunks but the last) only to those who asked for it.
        return chunk.model_dump_json(exclude=None if self._request.wants_usage else {"usage"})

    def _usage(self) -> Usage:
        prompt, completion = self._stream.prompt_tokens, self._stream.completion_tokens
        return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)

    def _logprobs(self, tokens: Sequence[Token]) -> Logprobs:
        tokenizer = self._served.answerer.template.tokenizer
        return Logprobs(
            content=[
                TokenLogprob(
                    token=t.data.decode("utf-8", "replace") or str(tokenizer.convert_ids_to_tokens(t.id)),
                    bytes=list(t.data) or None,
                    logprob=t.logprob,
                )
                for t in tokens
            ]
        )


_FIRST = {"role": "assistant", "content": ""}


def _begin(served: Served, request: ChatRequest) -> TextStream:
    check(served, request, most_stops=4)
    if None not in (request.max_tokens, request.max_completion_tokens):
        what = "'max_tokens': set either it or 'max_completion_tokens'"
        raise Refused(400, what, param="max_tokens")
    conversation = _conversation(request.messages)
    try:
        ids = served.answerer.template.prompt(conversation)
    except TemplateError as error:
        raise Refused(400, error.what, param="messages") from error
    stops = list(dict.fromkeys(request.stops))
    return served.answerer.begin(ids, _sampling(served, request, len(ids)), stops)


def check(served: Served, request: Ask, *, most_stops: int) -> None:
    """Hold what is asked against the model and the limits. Raises: Refused."""
    if request.model != served.name:
        what = f"the model {request.model!r} does not exist: this server has {served.name!r}"
        raise Refused(404, what, param="model", code="model_not_found")
    limits = served.limits
    lengths = [len(stop) for stop in request.stops]
    can_logprobs = served.answerer.engine.features.logprobs
    stops = f"at most {most_stops} strings of 1 to {limits.stop_characters} characters"
    rules = (
        ((request.n or 1) > limits.n, "n", f"at most {limits.n} choices are served"),
        (len(lengths) > most_stops, "stop", stops),
        (any(not 1 <= length <= limits.stop_characters for length in lengths), "stop", stops),
        (request.stream_options is not None and not request.stream, "stream_options", "needs 'stream': true"),
        (request.wants_logprobs and not can_logprobs, "logprobs", "the engine of this server gives none"),
    )
    for is_broken, param, what in rules:
        if is_broken:
            raise Refused(400, f"{param!r}: {what}", param=param)


def _conversation(messages: Sequence[ChatMessage]) -> Conversation:
    conversation = Conversation(())
    for i, message in enumerate(messages):
        role: Literal["system", "user", "assistant"] = "system" if message.role == "developer" else message.role
        if role == "system" and i > 0:
            param = f"messages[{i}].role"
            raise Refused(400, f"{param!r}: there is one system message at most, and it comes first", param=param)
        conversation = conversation.add(role, message.text)
    if messages[-1].role != "user":
        raise Refused(400, "'messages': the last one must be the user's", param="messages")
    return conversation


def _sampling(served: Served, request: ChatRequest, prompt_tokens: int) -> Sampling:
    """OpenAI's defaults; as many tokens as the context leaves. Raises: Refused (the context is too small)."""
    wanted = request.max_completion_tokens or request.max_tokens
    left = room(served, prompt_tokens, wanted, param="messages")
    return sampling(request, wanted or min(left, served.limits.default_tokens))


def room(served: Served, prompt_tokens: int, wanted: int | None, *, param: str) -> int:
    """Tokens that a prompt leaves for its answer. Raises: Refused (fewer than wanted, or none)."""
    left = served.context - prompt_tokens
    if (1 if wanted is None else wanted) > left:
        asked = f" and {wanted} were asked for" if wanted else ", which leaves none for an answer"
        what = f"the context of this model is {served.context} tokens: {param!r} takes {prompt_tokens}{asked}"
        raise Refused(400, what, param=param, code="context_length_exceeded")
    return left


def sampling(request: Ask, max_tokens: int) -> Sampling:
    """How a request wants its answers drawn, with OpenAI's defaults."""
    return Sampling(
        max_tokens=max_tokens,
        n=request.n or 1,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=request.top_k or 0,
        seed=request.seed,
        logprobs=request.wants_logprobs,
    )


def finish_reason(finish: Finish) -> Literal["stop", "length"]:
    """The reason as OpenAI names it. Raises: Refused (the engine cancelled the answer)."""
    if finish == "cancelled":
        raise Refused(503, "the answer was cut off by the engine", code="engine_unavailable")
    return finish


@contextlib.contextmanager
def faults() -> Generator[None]:
    """Errors of corral → Refused. What is no CorralError passes: it is a fault in the server."""
    try:
        yield
    except Refused:
        raise
    except RequestError as error:
        raise Refused(400, error.what) from error
    except EngineClosedError as error:
        raise Refused(503, "the engine of this server is closed", code="engine_unavailable") from error
    except CorralError as error:
        _log.error("the engine failed: %s", error.what)
        raise Refused(500, "the engine failed on this request", code="engine_failed") from error
