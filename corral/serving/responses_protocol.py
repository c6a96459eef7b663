"""OpenAI's protocol for responses and stored conversations as types, and conversions to and from stored values.

Text is the only supported content, and messages are the only supported items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from corral.engines.base import MAX_ALTERNATIVES, Sampling
from corral.messages import Role as PlainRole
from corral.serving.chat import TokenLogprob
from corral.serving.protocol import (
    DEFAULT_LIMITS,
    NO_FORMS,
    ConsensusResult,
    ConversationRequest,
    GenerationRequest,
    Length,
    Usage,
)
from corral.serving.request_fields import RequestBody, StrictModel
from corral.serving.store import Item, Page, Role, StoredConversation, StoredResponse

_MAX_PAIRS = 16
_MAX_ITEMS = 20
_LOGPROBS = "message.output_text.logprobs"


def _limit_pairs(value: Any) -> Any:
    """Refuse many pairs before pydantic looks at them all and lists each one that is wrong."""
    if isinstance(value, dict) and len(cast(dict[str, Any], value)) > _MAX_PAIRS:
        raise PydanticCustomError("too_long", "has more than {most} pairs", {"most": _MAX_PAIRS})
    return cast(Any, value)


Metadata: TypeAlias = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=_MAX_PAIRS),
    BeforeValidator(_limit_pairs),
]
_REPEATED = {
    *("conversation", "previous_response_id", "instructions", "max_output_tokens", "metadata", "truncation", "store"),
    "top_logprobs",
}
ResponseStatus: TypeAlias = Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]


class InputText(StrictModel):
    """A part of a message. The types are equivalent."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    # Fields of a response's part, for clients that send it back.
    only: ClassVar[Mapping[str, tuple[object, ...]]] = {"annotations": ([],)}
    ignored = frozenset({"logprobs", "cache_control"})


class InputMessage(StrictModel):
    """A message to answer or to store. It gets a new id."""

    type: Literal["message"] = "message"
    role: Role
    content: str | Annotated[list[InputText], Field(max_length=DEFAULT_LIMITS.parts, fail_fast=True)]
    # Fields of an item, for clients that send it back.
    ignored = frozenset({"id", "status", "phase", "name"})

    @property
    def item(self) -> Item:
        """The item to store."""
        texts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        return Item.new(self.role, texts)


class ReasoningItem(StrictModel):
    """What another model thought, sent back with its answers; it changes nothing."""

    type: Literal["reasoning"]
    ignored = frozenset({"id", "status", "summary", "content", "encrypted_content"})


class ConversationId(StrictModel):
    """A conversation by its id."""

    id: str


def _read_id(value: Any) -> Any:
    """A conversation's id alone may stand in place of the object."""
    return {"id": value} if isinstance(value, str) else value


class TextOptions(StrictModel):
    """The form of the answer, which is text."""

    only: ClassVar[Mapping[str, tuple[object, ...]]] = {"format": ({"type": "text"}, {})}
    why: ClassVar[Mapping[str, str]] = {"format": NO_FORMS}
    ignored = frozenset({"verbosity"})


class ResponsesRequest(ConversationRequest):
    """`POST /v1/responses`. `consensus`, `stop`, `seed` and what else OpenAI's lacks are extensions."""

    input: (
        str
        | Annotated[list[InputMessage | ReasoningItem], Field(max_length=DEFAULT_LIMITS.messages, fail_fast=True)]
        | None
    ) = None
    """May be left out if the conversation ends with the user's message, or there are instructions alone."""
    instructions: str | None = None
    conversation: Annotated[ConversationId | None, BeforeValidator(_read_id)] = None
    previous_response_id: str | None = None
    n: int | None = Field(None, ge=1, le=1)
    store: bool | None = None
    max_output_tokens: Length = Field(None, ge=1)
    truncation: Literal["auto", "disabled"] | None = None
    metadata: Metadata | None = None
    include: list[str] | None = Field(None, max_length=_MAX_ITEMS, fail_fast=True)
    """Log-probabilities are returned if it names them; anything else that OpenAI adds to a response is not there to add."""
    top_logprobs: int | None = Field(None, ge=0, le=MAX_ALTERNATIVES)
    text: TextOptions | None = None

    only: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **GenerationRequest.only,
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "background": (False,),
        "prompt": (),
        "context_management": ([],),
        "image": (),
    }
    ignored = GenerationRequest.ignored | {
        *("reasoning", "service_tier", "parallel_tool_calls", "max_tool_calls", "safety_identifier", "moderation"),
        *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "access_programs", "prewarm"),
    }
    renamed: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(GenerationRequest.renamed, "max_output_tokens"),
        **dict.fromkeys(("max_tokens", "max_completion_tokens"), "max_output_tokens"),
        "repeat_penalty": "repetition_penalty",
    }

    @classmethod
    def spread(cls, sent: dict[str, Any]) -> dict[str, Any]:
        """Tools that may not be called change nothing."""
        sent = super().spread(sent)
        return {**sent, "tools": None} if sent.get("tool_choice") == "none" else sent

    @property
    def items(self) -> tuple[Item, ...]:
        """The input, as items with new ids."""
        if isinstance(self.input, str):
            return (Item.new("user", [self.input]),)
        return tuple(message.item for message in self.input or () if isinstance(message, InputMessage))

    @property
    def conversation_id(self) -> str | None:
        """The id of the conversation, if one is given."""
        return None if self.conversation is None else self.conversation.id

    @property
    def top_logprob_count(self) -> int:  # noqa: D102 (see GenerationRequest)
        return self.top_logprobs or 0

    @property
    def wants_logprobs(self) -> bool:  # noqa: D102
        return _LOGPROBS in (self.include or ()) or self.top_logprob_count > 0


class CreateConversation(RequestBody):
    """`POST /v1/conversations`."""

    metadata: Metadata | None = None
    items: Annotated[list[InputMessage], Field(max_length=_MAX_ITEMS, fail_fast=True)] | None = None


class UpdateConversation(RequestBody):
    """`POST /v1/conversations/{id}`: replaces the metadata, of which `title` is for people."""

    metadata: Metadata | None


class CreateItems(RequestBody):
    """`POST /v1/conversations/{id}/items`."""

    items: list[InputMessage] = Field(min_length=1, max_length=_MAX_ITEMS, fail_fast=True)


class PageQuery(StrictModel):
    """Query parameters of a list."""

    model_config = ConfigDict(strict=False)  # query parameters are strings

    after: str | None = None
    limit: int = Field(20, ge=1, le=100)
    order: Literal["asc", "desc"] = "desc"

    @property
    def page(self) -> Page:
        """The page to read from the store."""
        return Page(self.after, self.limit, self.order == "asc")


class InputTextPart(BaseModel):
    """A part of a message that is not the model's."""

    type: Literal["input_text"] = "input_text"
    text: str


class OutputTextPart(BaseModel):
    """A part of the model's message."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: list[TokenLogprob] = []
    """Of a new answer; they are not stored."""


class ItemObject(BaseModel):
    """A message."""

    id: str
    type: Literal["message"] = "message"
    role: Role
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[InputTextPart | OutputTextPart]

    @classmethod
    def of(cls, item: Item) -> ItemObject:
        """An item as the protocol shows it."""
        part = OutputTextPart if item.role == "assistant" else InputTextPart
        return cls(id=item.id, role=item.role, status=item.status, content=[part(text=text) for text in item.texts])


class ConversationObject(BaseModel):
    """A conversation without its items; read from a `StoredConversation`."""

    model_config = ConfigDict(from_attributes=True)

    id: str
    object: Literal["conversation"] = "conversation"
    created_at: int
    metadata: dict[str, str] = Field(validation_alias="labels")

    @classmethod
    def of(cls, stored: StoredConversation) -> ConversationObject:
        """A conversation as the protocol shows it."""
        return cls.model_validate(stored)


class ListObject(BaseModel):
    """A page of a list."""

    object: Literal["list"] = "list"
    data: Sequence[ItemObject | ConversationObject]
    first_id: str | None
    last_id: str | None
    has_more: bool

    @classmethod
    def of(cls, rows: Sequence[StoredConversation | Item], has_more: bool = False) -> ListObject:
        """Build a page of conversations or items."""
        data = [ItemObject.of(row) if isinstance(row, Item) else ConversationObject.of(row) for row in rows]
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return cls(data=data, first_id=first, last_id=last, has_more=has_more)


class DeletedObject(BaseModel):
    """The response to a deletion."""

    id: str
    object: Literal["conversation.deleted", "response.deleted"]
    deleted: Literal[True] = True


class ResponseUsage(BaseModel):
    """Token counts, as the Responses protocol names them; cached tokens are not reported."""

    input_tokens: int
    input_tokens_details: dict[str, int] = {"cached_tokens": 0, "cache_write_tokens": 0}
    output_tokens: int
    output_tokens_details: dict[str, int] = {"reasoning_tokens": 0}
    total_tokens: int

    @classmethod
    def of(cls, usage: Usage) -> ResponseUsage:
        """Convert from the chat protocol's names."""
        return cls(
            input_tokens=usage.prompt_tokens, output_tokens=usage.completion_tokens, total_tokens=usage.total_tokens
        )


class ResponseObject(BaseModel):
    """A response, with the request's settings."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: ResponseStatus = "in_progress"
    error: dict[str, str] | None = None
    incomplete_details: dict[str, str] | None = None
    model: str
    output: list[ItemObject] = []
    usage: ResponseUsage | None = None
    consensus: ConsensusResult | None = None
    """How the answer was chosen, if from several; an extension."""
    conversation: ConversationId | None = None
    previous_response_id: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] = {}
    temperature: float
    top_p: float
    truncation: Literal["auto", "disabled"] = "disabled"
    store: bool = True
    background: Literal[False] = False
    parallel_tool_calls: bool = True
    reasoning: dict[str, None] = {"effort": None, "summary": None}
    text: dict[str, dict[str, str]] = {"format": {"type": "text"}}
    tool_choice: Literal["auto"] = "auto"
    tools: list[Any] = []
    top_logprobs: int = 0

    @classmethod
    def from_request(
        cls, id_: str, created: int, model: str, request: ResponsesRequest, sampling: Sampling
    ) -> ResponseObject:
        """Create a response in progress, which repeats the settings of the request."""
        settings = request.model_dump(include=_REPEATED, exclude_none=True)
        sampled = {"temperature": sampling.temperature, "top_p": sampling.top_p}
        return cls.model_validate({"id": id_, "created_at": created, "model": model, **settings, **sampled})

    @classmethod
    def from_stored(cls, stored: StoredResponse, output: Sequence[Item]) -> ResponseObject:
        """Read a stored response; a lost one has failed."""
        response = cls.model_validate({**stored.body, "output": [ItemObject.of(item) for item in output]})
        if not stored.is_lost:
            return response
        return response.model_copy(update=failure("the server ended before this answer was complete"))

    @property
    def stored_body(self) -> dict[str, Any]:
        """The JSON to store; items are stored separately."""
        return self.model_dump(exclude={"output"})


def failure(what: str) -> dict[str, Any]:
    """The fields of a response that failed."""
    return {"status": "failed", "error": {"code": "server_error", "message": what}, "incomplete_details": None}


def plain_message(item: Item) -> dict[str, str]:
    """An item as a message of training data."""
    return {"role": plain_role(item.role), "content": item.text}


def plain_role(role: Role) -> PlainRole:
    """The role of a message in training data, where developers are the system."""
    return "system" if role == "developer" else role
