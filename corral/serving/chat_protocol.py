"""OpenAI's chat protocol as types: requests and responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from corral.serving.protocol import (
    DEFAULT_LIMITS,
    ConsensusResult,
    ConversationRequest,
    IgnoredObject,
    MustBeEmpty,
    MustBeNull,
    MustBeZero,
    StrictModel,
    Usage,
    unsupported_except,
)


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
