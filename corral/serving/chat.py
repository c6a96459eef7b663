"""OpenAI's chat protocol: its requests and responses as types, and how a request is answered, whole or as a stream.

A conversation that ends with the assistant's message is continued: the answer is what follows its text, as with vLLM's
`continue_final_message` and Anthropic's prefill.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, cast

from pydantic import BaseModel, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from corral.answering.answerer import Answer, TextDelta, Token
from corral.engines.base import MAX_ALTERNATIVES
from corral.messages import Conversation, Role
from corral.serving.accounts import Reserve, reserve_any
from corral.serving.generation import IMPOSSIBLE_LOGPROB, RunningAnswer, check_rules, finish_reason, start_answer
from corral.serving.models import ServedModel
from corral.serving.protocol import (
    DEFAULT_LIMITS,
    NO_FORMS,
    ConsensusResult,
    ConversationRequest,
    GenerationRequest,
    Length,
    Refused,
    Usage,
    json_list,
    json_with,
)
from corral.serving.request_fields import StrictModel
from corral.serving.streams import DONE, Event, error_event
from corral.template import Template

_FIRST_DELTA = {"role": "assistant", "content": ""}
_CHARACTERS_PER_LOGPROB = 50  # rough cost of encoding one, to decide whether to use a thread


class TextPart(StrictModel):
    """A part of a message; text is the only supported type."""

    type: Literal["text", "input_text", "output_text"]
    text: str
    ignored = frozenset({"cache_control"})


class ChatMessage(StrictModel):
    """One message. `developer` is another name for `system`. Parts are joined without a separator."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=DEFAULT_LIMITS.parts, fail_fast=True)] | None = None
    """May be left out, or null, in an assistant's message."""

    # Fields of a response's message, for clients that send it back; some add a type, or say that an answer is a prefix.
    only: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "tool_calls": ([],),
        "annotations": ([],),
        "refusal": ("",),
        "audio": (),
        "function_call": (),
        "type": ("text", "message"),
        "prefix": (True, False),
    }
    ignored = frozenset({"name", "reasoning_content", "reasoning", "cache_control"})

    @property
    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())


def _check_parts(value: Any) -> Any:
    """Refuse many parts before each one is looked at."""
    if isinstance(value, list) and len(cast(list[Any], value)) <= DEFAULT_LIMITS.messages:
        contents: Iterator[Any] = (m.get("content") for m in cast(list[Any], value) if isinstance(m, dict))
        if sum(len(content) for content in contents if isinstance(content, list)) > DEFAULT_LIMITS.all_parts:
            context = {"most": DEFAULT_LIMITS.all_parts}
            raise PydanticCustomError("too_long", "has more than {most} parts in all its messages", context)
    return cast(Any, value)


Messages: TypeAlias = Annotated[
    list[ChatMessage],
    Field(min_length=1, max_length=DEFAULT_LIMITS.messages, fail_fast=True),
    BeforeValidator(_check_parts),
]


class ChatRequest(ConversationRequest):
    """`POST /v1/chat/completions`."""

    messages: Messages
    max_tokens: Length = Field(None, ge=1)
    max_completion_tokens: Length = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_ALTERNATIVES)
    continue_final_message: bool | None = None
    """False refuses a conversation that ends with the assistant's message."""
    add_generation_prompt: bool | None = None
    """The opposite of `continue_final_message`, for such a conversation; vLLM has both."""

    only: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **GenerationRequest.only,
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"], []),
        "audio": (),
        "web_search_options": (),
        "ignore_eos": (False,),
        "skip_special_tokens": (True,),
        "best_of": (1,),
        "echo": (False,),
        "return_tokens_as_token_ids": (False,),
    }
    why: ClassVar[Mapping[str, str]] = {
        **GenerationRequest.why,
        "response_format": NO_FORMS,
        "ignore_eos": "`/v1/completions` has it",
    }
    # They concern the account, how an answer is computed, or models of other kinds.
    ignored = GenerationRequest.ignored | {
        *("metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "moderation", "prediction"),
        *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "reasoning_effort", "verbosity"),
    }

    @classmethod
    def spread(cls, sent: dict[str, Any]) -> dict[str, Any]:
        """Tools that may not be called change nothing."""
        sent = super().spread(sent)
        if sent.get("tool_choice") == "none":
            sent = {**sent, "tools": None}
        return sent

    @property
    def length(self) -> int | None:
        """Most tokens of an answer: the smaller one of the two fields."""
        return min((each for each in (self.max_tokens, self.max_completion_tokens) if each is not None), default=None)

    @property
    def top_logprob_count(self) -> int:  # noqa: D102 (see GenerationRequest)
        return self.top_logprobs or 0

    @property
    def wants_logprobs(self) -> bool:  # noqa: D102
        return bool(self.logprobs)


class Message(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class TopLogprob(BaseModel):
    """A token. `bytes` are what it adds to the text; null for a special token, which adds nothing."""

    token: str
    bytes: list[int] | None
    logprob: float


class TokenLogprob(TopLogprob):
    """A generated token, with the most likely ones at its place."""

    top_logprobs: list[TopLogprob] = []


def token_logprob(template: Template, token: Token) -> TokenLogprob:
    """A generated token by its text, with the most likely ones."""
    own = _named(template, token.id, token.logprob)
    tops = [_named(template, id_, logprob) for id_, logprob in token.top]
    return TokenLogprob(token=own.token, bytes=own.bytes, logprob=own.logprob, top_logprobs=tops)


def _named(template: Template, id_: int, logprob: float) -> TopLogprob:
    data = template.token_bytes[id_]
    name = data.decode("utf-8", "replace") or str(template.tokenizer.convert_ids_to_tokens(id_))
    return TopLogprob(token=name, bytes=[*data] or None, logprob=max(logprob, IMPOSSIBLE_LOGPROB))


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
    conversation = build_conversation(request.messages, request.continue_final_message, request.add_generation_prompt)
    answer = await start_answer(served, conversation, request, reserve, max_tokens=request.length, param="messages")
    return ChatHandler(served, request, answer)


class ChatHandler:
    """A chat request that is being answered, from `start_chat`; see `RequestHandler`."""

    def __init__(self, served: ServedModel, request: ChatRequest, answer: RunningAnswer) -> None:
        self._served = served
        self._request = request
        self._answer = answer
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())

    async def result(self) -> str:
        """The complete response as JSON; with consensus, its only choice is the chosen answer.

        Raises: Refused (the engine failed).
        """
        answer = await self._answer.result()
        entries = sum(map(len, answer.tokens)) * (1 + self._request.top_logprob_count)
        characters = sum(map(len, answer.texts)) + entries * _CHARACTERS_PER_LOGPROB
        return await self._served.answerer.run_in_thread_if_long(characters, self._encode, answer)

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

    def _encode(self, answer: Answer) -> str:
        indices = range(len(answer.texts)) if answer.vote is None else [answer.winner]
        completion = ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._served.name,
            system_fingerprint=self._served.fingerprint,
            choices=[],
            usage=self.usage,
            consensus=self._answer.consensus_result,
        )
        choices = [self._encode_choice(answer, source, index) for index, source in enumerate(indices)]
        return json_with(completion, choices=json_list(choices))

    def _encode_choice(self, answer: Answer, source: int, index: int) -> str:
        choice = Choice(
            index=index,
            message=Message(content=answer.texts[source]),
            logprobs=None,
            finish_reason=finish_reason(answer.completions[source].finish),
        )
        if not (answer.tokens and self._request.logprobs):
            return choice.model_dump_json()
        content = json_list(
            token_logprob(self._served.answerer.template, token).model_dump_json() for token in answer.tokens[source]
        )
        return json_with(choice, logprobs=json_with(Logprobs(content=[]), content=content))

    def _choices(self, delta: TextDelta) -> list[ChunkChoice]:
        choices: list[ChunkChoice] = []
        if delta.text or delta.tokens:
            logprobs = None
            if self._request.logprobs:
                logprobs = Logprobs(
                    content=[token_logprob(self._served.answerer.template, token) for token in delta.tokens]
                )
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


def build_conversation(
    messages: Sequence[ChatMessage], continue_final_message: bool | None, add_generation_prompt: bool | None
) -> Conversation:
    """Raises: Refused (a message without content, or the last message is not what the flags say)."""
    turns: list[tuple[Role, str]] = []
    for i, message in enumerate(messages):
        role: Role = "system" if message.role == "developer" else message.role
        is_missing = message.content is None and role != "assistant"
        check_rules(((is_missing, f"messages[{i}].content", "only an assistant's message may have none"),))
        turns.append((role, message.text))
    is_answered = turns[-1][0] == "assistant"
    name = "add_generation_prompt" if continue_final_message is None else "continue_final_message"
    continues = add_generation_prompt is False if continue_final_message is None else continue_final_message
    begins = add_generation_prompt is True if continue_final_message is None else not continue_final_message
    rules = (
        (continues and not is_answered, name, "the last message is not the assistant's, so none can be continued"),
        (begins and is_answered, name, "the last message is the assistant's: it is continued, or must be left out"),
    )
    check_rules(rules)
    return Conversation.from_turns(*turns)
