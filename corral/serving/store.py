"""What a server stores, conversations, responses and their items: the tables, their limits, pages of lists.

A text is stored once, as an item of a conversation, of a response, or of both. Every query is limited to an owner: another
owner's conversations are not found. The owner is a key; without keys all clients are one owner and share its room, which
`make_room` divides among them. `conversation_store` and `response_store` use all this. Calls block.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    ColumnElement,
    Double,
    ForeignKey,
    Index,
    Integer,
    Select,
    String,
    delete,
    func,
    literal,
    or_,
    select,
)
from sqlalchemy.orm import Mapped, Session, mapped_column

from corral.serving.database import AutoNumber, Base
from corral.serving.errors import Refused

Role: TypeAlias = Literal["system", "developer", "user", "assistant"]
ItemStatus: TypeAlias = Literal["completed", "incomplete"]

ROW_BYTES = 256
"""Counted for each row in addition to its text, so that empty texts take space too."""
PART_BYTES = 64
"""Counted for each part of a message after the first."""
HOUR = 3600
"""Seconds."""
PAGE_BYTES = 2**18
"""Bytes of text after which a page ends early."""
_FETCH_ROWS = 10
_SPARE = (
    100  # the part of a limit, 1/100, that is freed besides what is needed, so that not every request has to free some
)


class StoredConversation(Base):
    """A conversation. `items` and `bytes` are sums over its items."""

    __tablename__ = "conversations"
    # Covers the list of a client, and the sums over an owner's conversations.
    __table_args__ = (Index(None, "owner", "client", "number", "created_at", "items", "bytes"),)
    noun: ClassVar = "conversation"

    number: Mapped[int] = mapped_column(AutoNumber, primary_key=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    owner: Mapped[str] = mapped_column(String(64))
    client: Mapped[str] = mapped_column(String(64), default="")
    """Which of the owner's clients created it, and sees it in its list; see `corral.serving.conversations.Client`."""
    created_at: Mapped[int] = mapped_column(BigInteger)
    """Seconds since 1970."""
    labels: Mapped[dict[str, str]] = mapped_column("metadata", JSON)  # SQLAlchemy reserves the name `metadata`
    items: Mapped[int] = mapped_column(Integer, default=0)
    bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    lease_owner: Mapped[str | None] = mapped_column(String(64), index=True)
    """The id of the pending response, which locks the conversation until it is finished, or until `lease_until`."""
    lease_until: Mapped[float | None] = mapped_column(Double)

    @classmethod
    def total_bytes(cls) -> ColumnElement[int]:
        """What it takes of its owner's room."""
        return cls.bytes + (cls.items + 1) * ROW_BYTES

    def check_unlocked(self) -> None:
        """Raises: Refused (409: a response is pending in it)."""
        if self.lease_owner is not None and (self.lease_until or 0) > time.time():
            raise self.locked()

    def locked(self) -> Refused:
        """A 409 while another response holds it, with `Retry-After`: its lease ends by then if its server died."""
        what = f"an answer is being generated in the conversation {self.id!r}: wait for it, or cancel it"
        seconds = (self.lease_until or 0) - time.time()
        return Refused(409, what, param="conversation", code="conversation_locked", retry_seconds=seconds)


class StoredResponse(Base):
    """A response. `body` is its JSON without the items."""

    __tablename__ = "responses"
    __table_args__ = (Index(None, "owner", "client", "number", "created_at", "bytes"),)
    noun: ClassVar = "response"

    number: Mapped[int] = mapped_column(AutoNumber, primary_key=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    owner: Mapped[str] = mapped_column(String(64))
    client: Mapped[str] = mapped_column(String(64), default="")
    """Which of the owner's clients began its conversation, or it."""
    conversation: Mapped[int | None] = mapped_column(
        AutoNumber, ForeignKey("conversations.number", ondelete="CASCADE"), index=True
    )
    previous: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[int] = mapped_column(BigInteger, index=True)
    lease_until: Mapped[float | None] = mapped_column(Double)
    """The end of the lease while the response is pending, in seconds since 1970: without a heartbeat until then, its server is
    taken for dead."""
    body: Mapped[dict[str, Any]] = mapped_column(JSON)
    bytes: Mapped[int] = mapped_column(BigInteger)
    """Bytes of its body, and of its items that are in no conversation, each with `ROW_BYTES`."""

    @classmethod
    def total_bytes(cls) -> ColumnElement[int]:
        """What it takes of its owner's room."""
        return cls.bytes.expression

    @property
    def is_lost(self) -> bool:
        """Whether its lease ended before it was finished: its server died."""
        return self.lease_until is not None and self.lease_until < time.time()


class Item(Base):
    """A message. It is deleted with its conversation or, if it has none, with its response."""

    __tablename__ = "items"
    noun: ClassVar = "item"

    number: Mapped[int] = mapped_column(AutoNumber, primary_key=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    conversation: Mapped[int | None] = mapped_column(
        AutoNumber, ForeignKey("conversations.number", ondelete="CASCADE"), index=True
    )
    response: Mapped[int | None] = mapped_column(
        AutoNumber, ForeignKey("responses.number", ondelete="SET NULL"), index=True
    )
    is_output: Mapped[bool] = mapped_column(Boolean, default=False)
    role: Mapped[Role] = mapped_column(String(16))
    status: Mapped[ItemStatus] = mapped_column(String(16))
    texts: Mapped[list[str]] = mapped_column(JSON)
    """Its parts, joined without a separator; stored as ASCII JSON, because PostgreSQL's text cannot contain zero bytes."""
    bytes: Mapped[int] = mapped_column(BigInteger)
    """Of the text in UTF-8, with `PART_BYTES` for each further part."""

    @classmethod
    def new(cls, role: Role, texts: Sequence[str], status: ItemStatus = "completed", id_: str | None = None) -> Item:
        """Create an item, by default with a new id."""
        parts = PART_BYTES * max(0, len(texts) - 1)
        size = parts + sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
        return cls(id=id_ or new_id("msg"), role=role, texts=list(texts), status=status, bytes=size)

    @property
    def text(self) -> str:
        """The joined parts."""
        return "".join(self.texts)


@dataclass(frozen=True, slots=True)
class StorageLimits:
    """Limits of what is stored."""

    max_items: int = 2000
    """Items of one conversation, or of one chain of responses."""
    max_bytes: int = 2**22
    """Bytes of their texts in UTF-8, with `PART_BYTES` for each further part. An answer that exceeds it is still stored."""
    max_conversations: int = 10_000
    """Conversations of one owner."""
    max_total_bytes: int = 2**30
    """Bytes of all conversations of one owner, with `ROW_BYTES` for each conversation and item."""
    max_responses: int = 10_000
    """Responses of one owner; the oldest are deleted for new ones."""
    max_responses_bytes: int = 2**28
    """Bytes of all responses of one owner, with their bodies; the oldest are deleted for new ones."""
    response_days: int = 30
    """Age at which a response that is in no conversation is deleted."""

    def check_conversation(self, items: int, size: int, new: Sequence[Item]) -> None:
        """Raises: Refused (with the new items, a conversation would have too many items or bytes)."""
        if items + len(new) > self.max_items or size + sum(item.bytes for item in new) > self.max_bytes:
            most = f"{self.max_items} items and {self.max_bytes} bytes of text"
            raise Refused(400, f"a conversation holds at most {most}: start another", code="conversation_full")


def storage_bytes(items: Sequence[Item]) -> int:
    """Bytes that items take of an owner's room."""
    return sum(item.bytes + ROW_BYTES for item in items)


def new_id(kind: Literal["conv", "resp", "msg"]) -> str:
    """A new random id."""
    return f"{kind}_{secrets.token_hex(16)}"


def is_valid_id(text: str) -> bool:
    """Whether this has the form of an id; if not, the database is not asked."""
    return re.fullmatch(r"[a-z]+_[0-9a-f]{32}", text) is not None


Row = TypeVar("Row", StoredConversation, StoredResponse, Item)


def get_row(
    session: Session,
    kind: type[Row],
    id_: str,
    condition: ColumnElement[bool],
    *,
    to_write: bool = False,
    param: str | None = None,
) -> Row:
    """A row by its id, if it meets the condition; `to_write` locks it until the transaction ends.

    Raises: Refused (404: the same whether or not the id belongs to somebody else).
    """
    query = select(kind).where(kind.id == id_, condition)
    row = session.scalar(query.with_for_update() if to_write else query) if is_valid_id(id_) else None
    if row is None:
        raise not_found(kind.noun, id_, param)
    return row


def get_conversation(
    session: Session, owner: str, id_: str, *, to_write: bool = False, param: str | None = None
) -> StoredConversation:
    """An owner's conversation; as `get_row`."""
    is_owned = StoredConversation.owner == owner
    return get_row(session, StoredConversation, id_, is_owned, to_write=to_write, param=param)


def not_found(noun: str, id_: str, param: str | None = None) -> Refused:
    """A 404."""
    return Refused(404, f"there is no {noun} with the id {id_!r}", param=param, code="not_found")


@dataclass(frozen=True, slots=True)
class Page:
    """Which part of a list to read: after an id, newest first unless `ascending`."""

    after: str | None = None
    limit: int = 20
    ascending: bool = False


def read_page(session: Session, kind: type[Row], condition: ColumnElement[bool], page: Page) -> tuple[list[Row], bool]:
    """Return (rows that meet the condition, whether there are more). A page of long rows has fewer than `limit`.

    Raises: Refused (an id that is not in the list).
    """
    query = select(kind).where(condition)
    if page.after is not None:
        find = select(kind.number).where(condition, kind.id == page.after)
        number = session.scalar(find) if is_valid_id(page.after) else None
        if number is None:
            raise Refused(400, f"'after': nothing in this list has the id {page.after!r}", param="after")
        query = query.where(kind.number > number if page.ascending else kind.number < number)
    order = kind.number.asc() if page.ascending else kind.number.desc()
    rows, has_more = read_rows(session, query.order_by(order).limit(page.limit + 1), PAGE_BYTES)
    return rows[: page.limit], has_more or len(rows) > page.limit


def read_rows(session: Session, query: Select[Row], most_bytes: int) -> tuple[list[Row], bool]:
    """Return (the first rows of a query, until they exceed `most_bytes`, whether there are more). No others are read."""
    selected: list[Row] = []
    size = 0
    rows = session.scalars(query.execution_options(yield_per=_FETCH_ROWS))
    for row in rows:
        if size > most_bytes:
            rows.close()
            return selected, True
        selected.append(row)
        size += ROW_BYTES + (row.bytes if isinstance(row, Item) else 0)
    return selected, False


def add_items(
    session: Session, items: Sequence[Item], conversation: StoredConversation | None, response: int | None = None
) -> None:
    """Store items in their order, in a conversation, a response, or both."""
    for item in items:
        item.response = response
        if conversation is not None:
            item.conversation = conversation.number
            conversation.items += 1
            conversation.bytes += item.bytes
    session.add_all(items)


def delete_responses(session: Session, numbers: Select[int] | Sequence[int]) -> None:
    """Delete responses; their items stay in their conversations."""
    session.execute(delete(Item).where(Item.response.in_(numbers), Item.conversation.is_(None)))
    session.execute(delete(StoredResponse).where(StoredResponse.number.in_(numbers)))


def delete_conversations(session: Session, numbers: Sequence[int]) -> None:
    """Delete conversations with their items and responses."""
    # The responses first: items that only they hold would be left behind.
    responses = select(StoredResponse.number).where(StoredResponse.conversation.in_(numbers))
    delete_responses(session, responses)
    session.execute(delete(StoredConversation).where(StoredConversation.number.in_(numbers)))


def make_room(
    session: Session,
    kind: type[StoredConversation | StoredResponse],
    owner: str,
    *,
    rows: tuple[int, int],
    size: tuple[int, int],
    asks: str | None = None,
) -> None:
    """Delete the oldest of the client of an owner that holds the most, until there is room.

    Args:
        rows: (new ones, the most that the owner may have)
        size: the same of bytes
        asks: a client that deletes its own itself: if it is the one that holds the most, it is refused. With keys an owner has
            one client, so nothing of it is deleted for anybody.

    Raises: Refused (there is no room).
    """
    sums = select(func.count(), func.sum(kind.total_bytes())).where(kind.owner == owner)
    held_rows, held_bytes = session.execute(sums).one()
    excess_rows, excess_bytes = held_rows + rows[0] - rows[1], (held_bytes or 0) + size[0] - size[1]
    if excess_rows <= 0 and excess_bytes <= 0:
        return
    wanted_rows = excess_rows + rows[1] // _SPARE if excess_rows > 0 else 0
    wanted_bytes = excess_bytes + size[1] // _SPARE if excess_bytes > 0 else 0
    found: list[int] = []
    freed = 0
    for number, client, weight in session.execute(_largest_shares(kind, owner, by_bytes=excess_bytes > 0)):
        if client == asks or (len(found) >= wanted_rows and freed >= wanted_bytes):
            break
        found.append(number)
        freed += weight
    if len(found) < excess_rows:
        what = f"at most {rows[1]} {kind.noun}s are kept: delete some"
        raise Refused(400, what, code=f"too_many_{kind.noun}s")
    if freed < excess_bytes:
        what = f"{kind.noun}s hold at most {size[1]} bytes together: delete some"
        raise Refused(400, what, code="storage_full")
    # What another transaction holds is passed over: that one deletes it, or changes it, so that it is in use.
    free = select(kind.number).where(kind.number.in_(found)).with_for_update(skip_locked=True)
    if kind is StoredResponse:
        delete_responses(session, session.scalars(free).all())
    else:
        until = StoredConversation.lease_until
        is_unlocked = or_(until.is_(None), until < time.time())
        delete_conversations(session, session.scalars(free.where(is_unlocked)).all())


def make_room_in(
    session: Session,
    conversation: StoredConversation,
    new: Sequence[Item],
    limits: StorageLimits,
    *,
    is_new: bool = False,
) -> None:
    """Make room for items in a conversation, which may be new itself. Raises: Refused (a storage limit)."""
    limits.check_conversation(conversation.items, conversation.bytes, new)
    make_room(
        session,
        StoredConversation,
        conversation.owner,
        rows=(int(is_new), limits.max_conversations),
        size=(storage_bytes(new) + is_new * ROW_BYTES, limits.max_total_bytes),
        asks=conversation.client,
    )


def _largest_shares(
    kind: type[StoredConversation | StoredResponse], owner: str, *, by_bytes: bool
) -> Select[int, str, int]:
    """(number, client, rows or bytes) of all that an owner holds, in the order in which it has to make room.

    Clients share alike with those that came in the same hour, that is, whose oldest that is kept is of that hour; the hours of
    a day share alike, and the days. What most exceeds the shares of others goes first, of one client the oldest. So a flood
    costs those who came with it, also if each request is of a new client, as without a token: together they are one share.
    """
    weight = kind.total_bytes() if by_bytes else literal(1)
    arrived = func.min(kind.created_at).over(partition_by=kind.client)
    height = func.sum(weight).over(partition_by=kind.client, order_by=kind.number.desc())
    periods = {"hour": arrived // HOUR, "day": arrived // (24 * HOUR)}
    columns = kind.number, kind.client, weight.label("weight"), *(each.label(name) for name, each in periods.items())
    shares = select(*columns, height.label("height")).where(kind.owner == owner).subquery().c
    for period in periods:
        height = func.sum(shares.weight).over(
            partition_by=shares[period], order_by=(shares.height, shares.number.desc())
        )
        columns = *(shares[name] for name in ("number", "client", "weight", *periods)), height.label("height")
        shares = select(*columns).subquery().c
    return select(shares.number, shares.client, shares.weight).order_by(shares.height.desc(), shares.number)
