"""OpenAI's chat protocol as types: requests and answers.

As in `protocol`, they hold what can be judged from the request alone: they do not know the model or its context.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from corral.serving.protocol import USUAL, AskConversation, Body, Empty, Ignored, Nothing, Usage, VoteShown, Zero, only


class TextPart(Body):
    """A part of a message; text is the only kind."""

    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """One message. `developer` is another name for `system`. Parts are joined as they are, with nothing between them."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=USUAL.parts, fail_fast=True)]
    # What an answer's message holds, for those who send it back as they got it.
    refusal: Nothing = None
    annotations: Empty = None
    audio: Nothing = None
    name: Nothing = None
    tool_calls: Empty = None
    function_call: Nothing = None
    # What some clients put beside the role, as for a part or an item.
    type: Annotated[Any, only(None, "text", "message")] = None

    @property
    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(AskConversation):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=USUAL.messages, fail_fast=True)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: Zero = None

    # Sent by habit; they concern the account, not the answer.
    metadata: Ignored = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: Ignored = None
    service_tier: str | None = None
    parallel_tool_calls: bool | None = None
    store: Annotated[Any, only(None, False)] = None

    # Would change the answer, save for the values that do not.
    tools: Empty = None
    tool_choice: Annotated[Any, only(None, "none", "auto")] = None
    functions: Empty = None
    function_call: Annotated[Any, only(None, "none", "auto")] = None
    response_format: Annotated[Any, only(None, {"type": "text"})] = None
    modalities: Annotated[Any, only(None, ["text"])] = None
    audio: Nothing = None
    prediction: Nothing = None
    moderation: Nothing = None
    reasoning_effort: Annotated[Any, only(None, "none")] = None
    verbosity: Nothing = None
    web_search_options: Nothing = None

    @property
    def wants_logprobs(self) -> bool:  # noqa: D102 (see Ask)
        return bool(self.logprobs)


class Message(BaseModel):
    """The assistant's message in an answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class TokenLogprob(BaseModel):
    """A drawn token. `bytes` are what it adds to the text; null for a special token, which adds none."""

    token: str
    bytes: list[int] | None
    logprob: float
    top_logprobs: list[Any] = []


class Logprobs(BaseModel):
    """The tokens of a text."""

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
    """A whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[Choice]
    usage: Usage
    consensus: VoteShown | None = Field(None, exclude_if=_is_none)
    """Where the answer was chosen from several; an extension."""


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
    consensus: VoteShown | None = Field(None, exclude_if=_is_none)
    """In the chunk that ends the answer, where it was chosen from several; an extension."""
