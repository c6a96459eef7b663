"""OpenAI's protocol for stored conversations and responses as types: what may be asked, and what is shown of what is stored.

Text is the only kind of content, and messages the only kind of item. As in `protocol`, what would change the answer and is not
supported is refused by name. It does not know the store, the model, or the limits of a server that has others than the usual.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from corral.engines.base import Sampling
from corral.messages import Conversation
from corral.messages import Role as PlainRole
from corral.serving.conversation_store import Stored
from corral.serving.protocol import (
    USUAL,
    AskConversation,
    Body,
    Empty,
    Ignored,
    Nothing,
    Refused,
    Usage,
    VoteShown,
    Zero,
    only,
)
from corral.serving.response_store import StoredResponse
from corral.serving.tables import Item, Page, Role

_MOST_PAIRS = 16


def _few_pairs(value: Any) -> Any:
    """pydantic would look at all of them first, and list each that is wrong."""
    if isinstance(value, dict) and len(cast(dict[str, Any], value)) > _MOST_PAIRS:
        raise PydanticCustomError("too_long", "has more than {most} pairs", {"most": _MOST_PAIRS})
    return cast(Any, value)


Metadata: TypeAlias = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=_MOST_PAIRS),
    BeforeValidator(_few_pairs),
]
ResponseStatus: TypeAlias = Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]

_MOST_ITEMS = 20


class InputText(Body):
    """A part of a message. The kinds differ in name only."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    # What an answer's part holds, for those who send it back as they got it.
    annotations: Empty = None
    logprobs: Empty = None


class InputMessage(Body):
    """A message to be asked about or to be stored. It gets an id of its own."""

    type: Literal["message"] = "message"
    role: Role
    content: str | Annotated[list[InputText], Field(max_length=USUAL.parts, fail_fast=True)]
    # What an item holds, for those who send it back as they got it.
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: Nothing = None

    @property
    def item(self) -> Item:
        """To be stored."""
        texts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        return Item.new(self.role, texts)


class ConversationId(Body):
    """A conversation, by name."""

    id: str


class ResponsesRequest(AskConversation):
    """`POST /v1/responses`. `consensus`, `stop`, `seed` and `top_k` are extensions."""

    input: str | Annotated[list[InputMessage], Field(max_length=USUAL.messages, fail_fast=True)] | None = None
    """May be left out where the conversation ends with the user."""
    instructions: str | None = None
    conversation: str | ConversationId | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    truncation: Literal["auto", "disabled"] | None = None
    metadata: Metadata | None = None
    n: Annotated[Any, only(None, 1)] = None

    # Sent by habit.
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: Ignored = None
    service_tier: str | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = None

    # Would change the answer, save for the values that do not.
    background: Annotated[Any, only(None, False)] = None
    include: Empty = None
    tools: Empty = None
    tool_choice: Annotated[Any, only(None, "none", "auto")] = None
    text: Annotated[Any, only(None, {}, {"format": {"type": "text"}})] = None
    reasoning: Annotated[Any, only(None, {}, {"effort": "none"}, {"effort": None})] = None
    top_logprobs: Zero = None
    prompt: Nothing = None
    moderation: Nothing = None
    context_management: Empty = None
    access_programs: Nothing = None
    image: Nothing = None

    @property
    def items(self) -> tuple[Item, ...]:
        """The input, as items with new ids."""
        if self.input is None:
            return ()
        if isinstance(self.input, str):
            return (Item.new("user", [self.input]),)
        return tuple(message.item for message in self.input)

    @property
    def conversation_id(self) -> str | None:
        """The conversation this is part of."""
        return self.conversation.id if isinstance(self.conversation, ConversationId) else self.conversation


class CreateConversation(Body):
    """`POST /v1/conversations`."""

    metadata: Metadata | None = None
    items: Annotated[list[InputMessage], Field(max_length=_MOST_ITEMS, fail_fast=True)] | None = None


class UpdateConversation(Body):
    """`POST /v1/conversations/{id}`: the metadata takes the place of what was there. Its `title` is what people see."""

    metadata: Metadata | None


class CreateItems(Body):
    """`POST /v1/conversations/{id}/items`."""

    items: list[InputMessage] = Field(min_length=1, max_length=_MOST_ITEMS, fail_fast=True)


class PageQuery(Body):
    """The part of a list that is asked for, in the address; `before` is an extension."""

    model_config = ConfigDict(strict=False)  # all that an address holds is text

    after: str | None = None
    before: str | None = None
    limit: int = Field(20, ge=1, le=100)
    order: Literal["asc", "desc"] = "desc"

    @property
    def page(self) -> Page:
        """The same for the store."""
        return Page(self.after, self.before, self.limit, self.order == "asc")


class InputPartShown(BaseModel):
    """A part of what people say."""

    type: Literal["input_text"] = "input_text"
    text: str


class OutputPartShown(BaseModel):
    """A part of what a model says."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class ItemShown(BaseModel):
    """A message."""

    id: str
    type: Literal["message"] = "message"
    role: Role
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[InputPartShown | OutputPartShown]

    @classmethod
    def of(cls, item: Item) -> ItemShown:
        """What is stored."""
        part = OutputPartShown if item.role == "assistant" else InputPartShown
        return cls(id=item.id, role=item.role, status=item.status, content=[part(text=text) for text in item.texts])


class ConversationShown(BaseModel):
    """A conversation without its items."""

    id: str
    object: Literal["conversation"] = "conversation"
    created_at: int
    metadata: dict[str, str]

    @classmethod
    def of(cls, stored: Stored) -> ConversationShown:
        """What is stored."""
        return cls(id=stored.id, created_at=stored.created_at, metadata=stored.metadata)


class ListShown(BaseModel):
    """A page of a list."""

    object: Literal["list"] = "list"
    data: Sequence[ItemShown | ConversationShown]
    first_id: str | None
    last_id: str | None
    has_more: bool

    @classmethod
    def of(cls, data: Sequence[ItemShown | ConversationShown], *, has_more: bool = False) -> ListShown:
        """A page of these."""
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return cls(data=data, first_id=first, last_id=last, has_more=has_more)

    @classmethod
    def of_items(cls, items: Sequence[Item], has_more: bool = False) -> ListShown:
        """A page of these."""
        return cls.of([ItemShown.of(item) for item in items], has_more=has_more)


class DeletedShown(BaseModel):
    """That something is gone."""

    id: str
    object: Literal["conversation.deleted", "response.deleted"]
    deleted: Literal[True] = True


class ExportShown(BaseModel):
    """All of a conversation; an extension. `messages` is the same in the form that training data has."""

    id: str
    object: Literal["conversation.export"] = "conversation.export"
    created_at: int
    metadata: dict[str, str]
    items: list[ItemShown]
    messages: list[dict[str, str]]

    @classmethod
    def of(cls, stored: Stored, items: Sequence[Item]) -> ExportShown:
        """What is stored."""
        return cls(
            id=stored.id,
            created_at=stored.created_at,
            metadata=stored.metadata,
            items=[ItemShown.of(item) for item in items],
            messages=[{"role": _plain(item.role), "content": item.text} for item in items],
        )


class InputDetails(BaseModel):
    """Of what the prompt's tokens were; which of them were cached is not told."""

    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputDetails(BaseModel):
    """Of what the answer's tokens were."""

    reasoning_tokens: int = 0


class ResponseUsage(BaseModel):
    """Tokens, as the Responses protocol names them."""

    input_tokens: int
    input_tokens_details: InputDetails = InputDetails()
    output_tokens: int
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int

    @classmethod
    def of(cls, usage: Usage) -> ResponseUsage:
        """The same, as the chat protocol names them."""
        return cls(
            input_tokens=usage.prompt_tokens, output_tokens=usage.completion_tokens, total_tokens=usage.total_tokens
        )


class Fault(BaseModel):
    """Why a response failed."""

    code: Literal["server_error"] = "server_error"
    message: str


class Incomplete(BaseModel):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseShown(BaseModel):
    """A response: what was asked for, and what came of it."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: ResponseStatus = "in_progress"
    error: Fault | None = None
    incomplete_details: Incomplete | None = None
    model: str
    output: list[ItemShown] = []
    usage: ResponseUsage | None = None
    consensus: VoteShown | None = None
    """How the answer was chosen from several, where it was; an extension."""
    conversation: ConversationId | None = None
    previous_response_id: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str]
    temperature: float
    top_p: float
    truncation: Literal["auto", "disabled"] = "disabled"
    store: bool = True
    user: str | None = None
    background: Literal[False] = False
    parallel_tool_calls: bool = True
    reasoning: dict[str, None] = {"effort": None, "summary": None}
    text: dict[str, dict[str, str]] = {"format": {"type": "text"}}
    tool_choice: Literal["auto"] = "auto"
    tools: list[Any] = []
    top_logprobs: Literal[0] = 0

    @classmethod
    def begun(cls, id_: str, created: int, model: str, request: ResponsesRequest, drawn: Sampling) -> ResponseShown:
        """One that is being made, of tokens drawn so."""
        conversation = request.conversation_id
        return cls(
            id=id_,
            created_at=created,
            model=model,
            conversation=None if conversation is None else ConversationId(id=conversation),
            previous_response_id=request.previous_response_id,
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            metadata=request.metadata or {},
            temperature=drawn.temperature,
            top_p=drawn.top_p,
            truncation=request.truncation or "disabled",
            store=request.store is not False,
            user=request.user,
        )

    @classmethod
    def of(cls, stored: StoredResponse) -> ResponseShown:
        """What is stored."""
        shown = cls.model_validate({**stored.body, "output": [ItemShown.of(item) for item in stored.outputs]})
        if not stored.is_lost:
            return shown
        fault = Fault(message="the server ended before this answer was whole")
        return shown.model_copy(update={"status": "failed", "error": fault})

    @property
    def body(self) -> dict[str, Any]:
        """What is stored of it beside its items."""
        return self.model_dump(exclude={"output"})


def conversation_of(instructions: str | None, items: Sequence[Item]) -> Conversation:
    """What a model is asked with. Raises: Refused (it does not end with the user, or a system message is not the first)."""
    turns: list[tuple[PlainRole, str]] = []
    if instructions:
        turns.append(("system", instructions))
    for item in items:
        role = _plain(item.role)
        if role == "system" and turns:
            what = "there is one system message at most, and it comes first; 'instructions' are one too"
            raise Refused(400, f"'input': {what}", param="input")
        turns.append((role, item.text))
    if not turns or turns[-1][0] != "user":
        raise Refused(400, "'input': the last message must be the user's", param="input")
    return Conversation.from_turns(*turns)


def _plain(role: Role) -> PlainRole:
    return "system" if role == "developer" else role
