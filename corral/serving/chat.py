"""OpenAI's chat protocol: its requests and responses as types, and how a request is answered, whole or as a stream."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from corral.answering.answerer import Answer, TextDelta, Token
from corral.messages import Conversation, Role
from corral.serving.accounts import Reserve, reserve_any
from corral.serving.generation import RunningAnswer, finish_reason, start_answer
from corral.serving.models import ServedModel
from corral.serving.protocol import (
    DEFAULT_LIMITS,
    ConsensusResult,
    ConversationRequest,
    IgnoredObject,
    MustBeEmpty,
    MustBeNull,
    MustBeZero,
    Refused,
    StrictModel,
    Usage,
    unsupported_except,
)
from corral.serving.streams import DONE, Event, error_event

_FIRST_DELTA = {"role": "assistant", "content": ""}


class TextPart(StrictModel):
    """A part of a message; text is the only supported type."""

    type: Literal["text"]
    text: str


class ChatMessage(StrictModel):
    """One message. `developer` is another name for `system`. Parts are joined without a separator."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=DEFAULT_LIMITS.parts, fail_fast=True)]
    # Fields of a response's message, for clients that send it back unchanged.
    refusal: MustBeNull = None
    annotations: MustBeEmpty = None
    audio: MustBeNull = None
    name: MustBeNull = None
    tool_calls: MustBeEmpty = None
    function_call: MustBeNull = None
    # Some clients add the type, as in a part or an item.
    type: Annotated[Any, unsupported_except(None, "text", "message")] = None

    @property
    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(ConversationRequest):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=DEFAULT_LIMITS.messages, fail_fast=True)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: MustBeZero = None

    # Accepted without effect: they concern the account, not the answer.
    metadata: IgnoredObject = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: IgnoredObject = None
    service_tier: str | None = None
    parallel_tool_calls: bool | None = None
    store: Annotated[Any, unsupported_except(None, False)] = None

    # Unsupported, except for values that change nothing.
    tools: MustBeEmpty = None
    tool_choice: Annotated[Any, unsupported_except(None, "none", "auto")] = None
    functions: MustBeEmpty = None
    function_call: Annotated[Any, unsupported_except(None, "none", "auto")] = None
    response_format: Annotated[Any, unsupported_except(None, {"type": "text"})] = None
    modalities: Annotated[Any, unsupported_except(None, ["text"])] = None
    audio: MustBeNull = None
    prediction: MustBeNull = None
    moderation: MustBeNull = None
    reasoning_effort: Annotated[Any, unsupported_except(None, "none")] = None
    verbosity: MustBeNull = None
    web_search_options: MustBeNull = None

    @property
    def wants_logprobs(self) -> bool:  # noqa: D102 (see GenerationRequest)
        return bool(self.logprobs)


class Message(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class TokenLogprob(BaseModel):
    """A generated token. `bytes` are what it adds to the text; null for a special token, which adds nothing."""

    token: str
    bytes: list[int] | None
    logprob: float
    top_logprobs: list[Any] = []


class Logprobs(BaseModel):
    """The tokens of an answer."""

    content: list[TokenLogprob]
    refusal: None = None


class Choice(BaseModel):
    """One answer."""

    index: int
    message: Message
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"]


def _is_none(value: object) -> bool:
    return value is None


class ChatCompletion(BaseModel):
    """A complete response."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[Choice]
    usage: Usage
    consensus: ConsensusResult | None = Field(None, exclude_if=_is_none)
    """Present if the answer was chosen from several; an extension."""


class ChunkChoice(BaseModel):
    """New text of one choice."""

    index: int
    delta: dict[str, str]
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None


class Chunk(BaseModel):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[ChunkChoice]
    usage: Usage | None = None
    consensus: ConsensusResult | None = Field(None, exclude_if=_is_none)
    """In the chunk that ends an answer that was chosen from several; an extension."""


async def start_chat(served: ServedModel, request: ChatRequest, reserve: Reserve = reserve_any) -> ChatHandler:
    """Start to answer a request. Raises: Refused."""
    if None not in (request.max_tokens, request.max_completion_tokens):
        what = "'max_tokens': set either it or 'max_completion_tokens'"
        raise Refused(400, what, param="max_tokens")
    conversation = _conversation(request.messages)
    max_tokens = request.max_completion_tokens or request.max_tokens
    answer = await start_answer(served, conversation, request, reserve, max_tokens=max_tokens, param="messages")
    return ChatHandler(served, request, answer)


class ChatHandler:
    """A chat request that is being answered, from `start_chat`; see `RequestHandler`."""

    def __init__(self, served: ServedModel, request: ChatRequest, answer: RunningAnswer) -> None:
        self._served = served
        self._request = request
        self._answer = answer
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())

    async def result(self) -> ChatCompletion:
        """The complete response; with consensus, its only choice is the chosen answer. Raises: Refused (the engine failed)."""
        answer = await self._answer.result()
        indices = range(len(answer.texts)) if answer.vote is None else [answer.winner]
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._served.name,
            system_fingerprint=self._served.fingerprint,
            choices=[self._choice(answer, source, index) for index, source in enumerate(indices)],
            usage=self.usage,
            consensus=self._answer.consensus_result,
        )

    async def events(self) -> AsyncGenerator[Event, None]:
        """Chunks as JSON, then `DONE`. Raises: Refused (the answer failed)."""
        for i in range(self._request.n or 1):
            yield self._chunk(ChunkChoice(index=i, delta=_FIRST_DELTA, logprobs=None, finish_reason=None))
        async with contextlib.aclosing(self._answer.deltas()) as deltas:
            async for delta in deltas:
                for choice in self._choices(delta):
                    yield self._chunk(choice, vote=self._answer.consensus_result if choice.finish_reason else None)
        if self._request.wants_usage:
            yield self._chunk(usage=self.usage)
        yield DONE

    @property
    def usage(self) -> Usage:
        """Tokens so far, of all choices or candidates."""
        return self._answer.usage

    def error_event(self, refused: Refused) -> Event:
        """The error as the last event."""
        return error_event(refused)

    def cancel(self) -> None:
        """Stop the work; does nothing if it is done."""
        self._answer.cancel()

    def _choice(self, answer: Answer, source: int, index: int) -> Choice:
        tokens = answer.tokens[source] if answer.tokens and self._request.logprobs else None
        return Choice(
            index=index,
            message=Message(content=answer.texts[source]),
            logprobs=None if tokens is None else self._logprobs(tokens),
            finish_reason=finish_reason(answer.completions[source].finish),
        )

    def _choices(self, delta: TextDelta) -> list[ChunkChoice]:
        choices: list[ChunkChoice] = []
        if delta.text or delta.tokens:
            logprobs = self._logprobs(delta.tokens) if self._request.logprobs else None
            text = {"content": delta.text}
            choices.append(ChunkChoice(index=delta.choice, delta=text, logprobs=logprobs, finish_reason=None))
        if delta.finish is not None:
            reason = finish_reason(delta.finish)
            choices.append(ChunkChoice(index=delta.choice, delta={}, logprobs=None, finish_reason=reason))
        return choices

    def _chunk(self, *choices: ChunkChoice, usage: Usage | None = None, vote: ConsensusResult | None = None) -> Event:
        chunk = Chunk(
            id=self._id,
            created=self._created,
            model=self._served.name,
            system_fingerprint=self._served.fingerprint,
            choices=list(choices),
            usage=usage,
            consensus=vote,
        )
        # As OpenAI, send `usage` (null in all chunks but the last) only if the client asked for it.
        return Event(chunk.model_dump_json(exclude=None if self._request.wants_usage else {"usage"}))

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


def _conversation(messages: Sequence[ChatMessage]) -> Conversation:
    turns: list[tuple[Role, str]] = []
    for i, message in enumerate(messages):
        role: Role = "system" if message.role == "developer" else message.role
        if role == "system" and i > 0:
            param = f"messages[{i}].role"
            raise Refused(400, f"{param!r}: only the first message may be a system message", param=param)
        turns.append((role, message.text))
    if messages[-1].role != "user":
        raise Refused(400, "'messages': the last message must be the user's", param="messages")
    return Conversation.from_turns(*turns)
