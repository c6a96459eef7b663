"""OpenAI's protocol for responses and stored conversations as types, and conversions to and from stored values.

Text is the only supported content, and messages are the only supported items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from corral.engines.base import Sampling
from corral.messages import Conversation
from corral.messages import Role as PlainRole
from corral.serving.errors import Refused
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
from corral.serving.response_store import StoredResponse
from corral.serving.store import Item, Page, Role, StoredConversation

_MAX_PAIRS = 16


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
ResponseStatus: TypeAlias = Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]

_MAX_ITEMS = 20


class InputText(StrictModel):
    """A part of a message. The types are equivalent."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    # Fields of a response's part, for clients that send it back unchanged.
    annotations: MustBeEmpty = None
    logprobs: MustBeEmpty = None


class InputMessage(StrictModel):
    """A message to answer or to store. It gets a new id."""

    type: Literal["message"] = "message"
    role: Role
    content: str | Annotated[list[InputText], Field(max_length=DEFAULT_LIMITS.parts, fail_fast=True)]
    # Fields of an item, for clients that send it back unchanged.
    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: MustBeNull = None

    @property
    def item(self) -> Item:
        """The item to store."""
        texts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        return Item.new(self.role, texts)


class ConversationId(StrictModel):
    """A conversation by its id."""

    id: str


class ResponsesRequest(ConversationRequest):
    """`POST /v1/responses`. `consensus`, `stop`, `seed` and `top_k` are extensions."""

    input: str | Annotated[list[InputMessage], Field(max_length=DEFAULT_LIMITS.messages, fail_fast=True)] | None = None
    """May be left out if the conversation ends with the user's message."""
    instructions: str | None = None
    conversation: str | ConversationId | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    truncation: Literal["auto", "disabled"] | None = None
    metadata: Metadata | None = None
    user: str | None = None
    n: Annotated[Any, unsupported_except(None, 1)] = None

    # Accepted without effect.
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: IgnoredObject = None
    service_tier: str | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = None

    # Unsupported, except for values that change nothing.
    background: Annotated[Any, unsupported_except(None, False)] = None
    include: MustBeEmpty = None
    tools: MustBeEmpty = None
    tool_choice: Annotated[Any, unsupported_except(None, "none", "auto")] = None
    text: Annotated[Any, unsupported_except(None, {}, {"format": {"type": "text"}})] = None
    reasoning: Annotated[Any, unsupported_except(None, {}, {"effort": "none"}, {"effort": None})] = None
    top_logprobs: MustBeZero = None
    prompt: MustBeNull = None
    moderation: MustBeNull = None
    context_management: MustBeEmpty = None
    access_programs: MustBeNull = None
    image: MustBeNull = None

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
        """The id of the conversation, if one is given."""
        return self.conversation.id if isinstance(self.conversation, ConversationId) else self.conversation


class CreateConversation(StrictModel):
    """`POST /v1/conversations`."""

    metadata: Metadata | None = None
    items: Annotated[list[InputMessage], Field(max_length=_MAX_ITEMS, fail_fast=True)] | None = None


class UpdateConversation(StrictModel):
    """`POST /v1/conversations/{id}`: replaces the metadata, of which `title` is for people."""

    metadata: Metadata | None


class CreateItems(StrictModel):
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
    logprobs: list[Any] = []


class ItemObject(BaseModel):
    """A message."""

    id: str
    type: Literal["message"] = "message"
    role: Role
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[InputTextPart | OutputTextPart]

    @classmethod
    def from_item(cls, item: Item) -> ItemObject:
        """Convert an item."""
        part = OutputTextPart if item.role == "assistant" else InputTextPart
        return cls(id=item.id, role=item.role, status=item.status, content=[part(text=text) for text in item.texts])


class ConversationObject(BaseModel):
    """A conversation without its items."""

    id: str
    object: Literal["conversation"] = "conversation"
    created_at: int
    metadata: dict[str, str]

    @classmethod
    def from_stored(cls, stored: StoredConversation) -> ConversationObject:
        """Convert a stored conversation."""
        return cls(id=stored.id, created_at=stored.created_at, metadata=stored.metadata)


class ListObject(BaseModel):
    """A page of a list."""

    object: Literal["list"] = "list"
    data: Sequence[ItemObject | ConversationObject]
    first_id: str | None
    last_id: str | None
    has_more: bool

    @classmethod
    def from_objects(cls, data: Sequence[ItemObject | ConversationObject], *, has_more: bool = False) -> ListObject:
        """Build a page of objects."""
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return cls(data=data, first_id=first, last_id=last, has_more=has_more)

    @classmethod
    def from_conversations(cls, stored: Sequence[StoredConversation], has_more: bool) -> ListObject:
        """Build a page of conversations."""
        return cls.from_objects([ConversationObject.from_stored(each) for each in stored], has_more=has_more)

    @classmethod
    def from_items(cls, items: Sequence[Item], has_more: bool = False) -> ListObject:
        """Build a page of items."""
        return cls.from_objects([ItemObject.from_item(item) for item in items], has_more=has_more)


class DeletedObject(BaseModel):
    """The response to a deletion."""

    id: str
    object: Literal["conversation.deleted", "response.deleted"]
    deleted: Literal[True] = True


class InputDetails(BaseModel):
    """Details of the prompt tokens; cached tokens are not reported."""

    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputDetails(BaseModel):
    """Details of the answer tokens."""

    reasoning_tokens: int = 0


class ResponseUsage(BaseModel):
    """Token counts, as the Responses protocol names them."""

    input_tokens: int
    input_tokens_details: InputDetails = InputDetails()
    output_tokens: int
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int

    @classmethod
    def from_usage(cls, usage: Usage) -> ResponseUsage:
        """Convert from the chat protocol's names."""
        return cls(
            input_tokens=usage.prompt_tokens, output_tokens=usage.completion_tokens, total_tokens=usage.total_tokens
        )


class ResponseError(BaseModel):
    """Why a response failed."""

    code: Literal["server_error"] = "server_error"
    message: str


class IncompleteDetails(BaseModel):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseObject(BaseModel):
    """A response, with the request's settings."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: ResponseStatus = "in_progress"
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    model: str
    output: list[ItemObject] = []
    usage: ResponseUsage | None = None
    consensus: ConsensusResult | None = None
    """How the answer was chosen, if from several; an extension."""
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
    def from_request(
        cls, id_: str, created: int, model: str, request: ResponsesRequest, sampling: Sampling
    ) -> ResponseObject:
        """Create a response in progress."""
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
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            truncation=request.truncation or "disabled",
            store=request.store is not False,
            user=request.user,
        )

    @classmethod
    def from_stored(cls, stored: StoredResponse) -> ResponseObject:
        """Convert a stored response; a lost one has failed."""
        response = cls.model_validate(
            {**stored.body, "output": [ItemObject.from_item(item) for item in stored.outputs]}
        )
        if not stored.is_lost:
            return response
        error = ResponseError(message="the server ended before this answer was complete")
        return response.model_copy(update={"status": "failed", "error": error})

    @property
    def stored_body(self) -> dict[str, Any]:
        """The JSON to store; items are stored separately."""
        return self.model_dump(exclude={"output"})


def build_conversation(instructions: str | None, items: Sequence[Item]) -> Conversation:
    """Build the conversation to answer. Raises: Refused (the last message is not the user's; a late system message)."""
    turns: list[tuple[PlainRole, str]] = []
    if instructions:
        turns.append(("system", instructions))
    for item in items:
        role = _plain_role(item.role)
        if role == "system" and turns:
            what = "only the first message may be a system message; 'instructions' count as one"
            raise Refused(400, f"'input': {what}", param="input")
        turns.append((role, item.text))
    if not turns or turns[-1][0] != "user":
        raise Refused(400, "'input': the last message must be the user's", param="input")
    return Conversation.from_turns(*turns)


def plain_message(item: Item) -> dict[str, str]:
    """An item as a message of training data."""
    return {"role": _plain_role(item.role), "content": item.text}


def _plain_role(role: Role) -> PlainRole:
    return "system" if role == "developer" else role
