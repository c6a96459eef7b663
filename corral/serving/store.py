"""Stores conversations and their items: the tables, their limits, pages of lists; `response_store` adds responses.

A text is stored once, as an item of a conversation, of a response, or of both. Every query is limited to an owner: another
owner's conversations are not found. Calls block.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Double,
    ForeignKey,
    Index,
    Integer,
    Select,
    String,
    delete,
    func,
    select,
)
from sqlalchemy.orm import Mapped, Session, mapped_column

from corral.serving.database import AutoNumber, Base, Database
from corral.serving.errors import Refused

Role: TypeAlias = Literal["system", "developer", "user", "assistant"]
ItemStatus: TypeAlias = Literal["completed", "incomplete"]

ROW_BYTES = 256
"""Counted for each row in addition to its text, so that empty texts take space too."""
PART_BYTES = 64
"""Counted for each part of a message after the first."""
_PAGE_BYTES = 2**18
"""Bytes of text after which a page ends early."""
_FETCH_ROWS = 10
_DELETE_ROWS = 50


class ConversationRow(Base):
    """A conversation. `items` and `bytes` are sums over its items."""

    __tablename__ = "conversations"
    __table_args__ = (
        Index(None, "owner", "client", "number"),
        Index(None, "owner", "items", "bytes"),  # covers the sums over an owner's conversations
    )

    number: Mapped[int] = mapped_column(AutoNumber, primary_key=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    owner: Mapped[str] = mapped_column(String(64))
    client: Mapped[str] = mapped_column(String(64), default="")
    """Which of the owner's clients created it, and sees it in its list; see `corral.serving.clients`."""
    created_at: Mapped[int] = mapped_column(BigInteger)
    labels: Mapped[dict[str, str]] = mapped_column("metadata", JSON)  # SQLAlchemy reserves the name `metadata`
    items: Mapped[int] = mapped_column(Integer, default=0)
    bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    lease_owner: Mapped[str | None] = mapped_column(String(64), index=True)
    """The id of the pending response, which locks the conversation until it is finished, or until `lease_until`."""
    lease_until: Mapped[float | None] = mapped_column(Double)


class ResponseRow(Base):
    """A response. `body` is its JSON without the items."""

    __tablename__ = "responses"
    __table_args__ = (Index(None, "owner", "number", "bytes"),)

    number: Mapped[int] = mapped_column(AutoNumber, primary_key=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    owner: Mapped[str] = mapped_column(String(64))
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


class ItemRow(Base):
    """A message. It is deleted with its conversation or, if it has none, with its response."""

    __tablename__ = "items"

    number: Mapped[int] = mapped_column(AutoNumber, primary_key=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    conversation: Mapped[int | None] = mapped_column(
        AutoNumber, ForeignKey("conversations.number", ondelete="CASCADE"), index=True
    )
    response: Mapped[int | None] = mapped_column(
        AutoNumber, ForeignKey("responses.number", ondelete="SET NULL"), index=True
    )
    is_output: Mapped[bool] = mapped_column(Boolean)
    role: Mapped[str] = mapped_column(String(16))
    status: Mapped[str] = mapped_column(String(16))
    texts: Mapped[list[str]] = mapped_column(JSON)
    """Its parts, as ASCII JSON, because PostgreSQL's text cannot contain zero bytes."""
    bytes: Mapped[int] = mapped_column(BigInteger)


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


@dataclass(frozen=True, slots=True)
class Item:
    """A message."""

    id: str
    role: Role
    texts: tuple[str, ...]
    """Its parts, which are joined without a separator."""
    status: ItemStatus = "completed"

    @classmethod
    def new(cls, role: Role, texts: Sequence[str], status: ItemStatus = "completed") -> Item:
        """Create an item with a new id."""
        return cls(new_id("msg"), role, tuple(texts), status)

    @classmethod
    def from_row(cls, row: ItemRow) -> Item:
        """Read an item from its row."""
        return cls(row.id, row.role, tuple(row.texts), row.status)  # pyright: ignore[reportArgumentType]

    @property
    def text(self) -> str:
        """The joined parts."""
        return "".join(self.texts)

    @property
    def bytes(self) -> int:
        """Bytes of the text in UTF-8, with `PART_BYTES` for each further part."""
        parts = PART_BYTES * (len(self.texts) - 1) if self.texts else 0
        return parts + sum(len(text.encode("utf-8", "surrogatepass")) for text in self.texts)

    def to_row(self, *, conversation: int | None, response: int | None, is_output: bool) -> ItemRow:
        """Create the row of this item."""
        return ItemRow(
            id=self.id,
            conversation=conversation,
            response=response,
            is_output=is_output,
            role=self.role,
            status=self.status,
            texts=list(self.texts),
            bytes=self.bytes,
        )


def storage_bytes(items: Sequence[Item]) -> int:
    """Bytes that items take of an owner's share."""
    return sum(item.bytes + ROW_BYTES for item in items)


@dataclass(frozen=True, slots=True)
class Page:
    """Which part of a list to read: after an id, newest first unless `ascending`."""

    after: str | None = None
    limit: int = 20
    ascending: bool = False


Row = TypeVar("Row", ConversationRow, ItemRow)


def read_page(session: Session, query: Select[Row], kind: type[Row], page: Page) -> tuple[list[Row], bool]:
    """Return (rows, whether there are more). A page of long rows has fewer than `limit`.

    Raises: Refused (an id that is not in the list).
    """
    if page.after is not None:
        find = query.where(kind.id == page.after).with_only_columns(kind.number)
        number = session.scalar(find) if is_valid_id(page.after) else None
        if number is None:
            raise Refused(400, f"'after': nothing in this list has the id {page.after!r}", param="after")
        query = query.where(kind.number > number if page.ascending else kind.number < number)
    order = kind.number.asc() if page.ascending else kind.number.desc()
    rows, has_more = read_rows(session, query.order_by(order).limit(page.limit + 1), _PAGE_BYTES)
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
        size += ROW_BYTES + (row.bytes if isinstance(row, ItemRow) else 0)
    return selected, False


def new_id(kind: Literal["conv", "resp", "msg"]) -> str:
    """A new random id."""
    return f"{kind}_{secrets.token_hex(16)}"


def is_valid_id(text: str) -> bool:
    """Whether this has the form of an id; if not, the database is not asked."""
    return re.fullmatch(r"[a-z]+_[0-9a-f]{32}", text) is not None


def not_found(kind: str, id_: str, param: str | None = None) -> Refused:
    """A 404 for an id that the caller does not own: the same whether or not it belongs to somebody else."""
    return Refused(404, f"there is no {kind} with the id {id_!r}", param=param, code="not_found")


def get_conversation_row(
    session: Session, owner: str, id_: str, *, to_write: bool = False, param: str | None = None
) -> ConversationRow:
    """The row of an owner's conversation; `to_write` locks it until the transaction ends. Raises: Refused (404)."""
    query = select(ConversationRow).where(ConversationRow.id == id_, ConversationRow.owner == owner)
    row = session.scalar(query.with_for_update() if to_write else query) if is_valid_id(id_) else None
    if row is None:
        raise not_found("conversation", id_, param)
    return row


def check_unlocked(row: ConversationRow) -> None:
    """Raises: Refused (409: a response is pending in the conversation)."""
    if row.lease_owner is not None and (row.lease_until or 0) > time.time():
        raise locked(row)


def locked(row: ConversationRow) -> Refused:
    """A 409 for a conversation that another response holds, with `Retry-After`: its lease ends by then if its server died."""
    what = f"an answer is being generated in the conversation {row.id!r}: wait for it, or cancel it"
    seconds = (row.lease_until or 0) - time.time()
    return Refused(409, what, param="conversation", code="conversation_locked", retry_seconds=seconds)


def check_conversation_size(items: int, size: int, new: Sequence[Item], limits: StorageLimits) -> None:
    """Raises: Refused (with the new items, a conversation would have too many items or bytes)."""
    if items + len(new) > limits.max_items or size + sum(item.bytes for item in new) > limits.max_bytes:
        what = (
            f"a conversation holds at most {limits.max_items} items and {limits.max_bytes} bytes of text: start another"
        )
        raise Refused(400, what, code="conversation_full")


def check_total_size(session: Session, owner: str, new: Sequence[Item], limits: StorageLimits) -> None:
    """Raises: Refused (with the new items, all conversations of the owner would be too large)."""
    sums = select(func.count(), func.sum(ConversationRow.items), func.sum(ConversationRow.bytes))
    count, items, size = session.execute(sums.where(ConversationRow.owner == owner)).one()
    if (size or 0) + (count + (items or 0)) * ROW_BYTES + storage_bytes(new) > limits.max_total_bytes:
        what = f"conversations hold at most {limits.max_total_bytes} bytes together: delete some"
        raise Refused(400, what, code="storage_full")


def add_items(session: Session, row: ConversationRow, items: Sequence[Item], limits: StorageLimits) -> None:
    """Add items to a conversation. Raises: Refused (a storage limit)."""
    check_conversation_size(row.items, row.bytes, items, limits)
    check_total_size(session, row.owner, items, limits)
    for item in items:
        add_item(session, item, row, response=None, is_output=False)


def delete_responses(session: Session, responses: Select[int]) -> None:
    """Delete responses by their numbers; their items stay in their conversations."""
    session.execute(delete(ItemRow).where(ItemRow.response.in_(responses), ItemRow.conversation.is_(None)))
    session.execute(delete(ResponseRow).where(ResponseRow.number.in_(responses)))


def add_item(
    session: Session, item: Item, conversation: ConversationRow | None, *, response: int | None, is_output: bool
) -> None:
    """Store an item, in a conversation, a response, or both."""
    number = None
    if conversation is not None:
        number = conversation.number
        conversation.items += 1
        conversation.bytes += item.bytes
    session.add(item.to_row(conversation=number, response=response, is_output=is_output))
    session.flush()  # one by one, because their numbers are their order


@dataclass(frozen=True, slots=True)
class StoredConversation:
    """A conversation without its items."""

    id: str
    created_at: int
    """Seconds since 1970."""
    metadata: dict[str, str]

    @classmethod
    def from_row(cls, row: ConversationRow) -> StoredConversation:
        """Read a conversation from its row."""
        return cls(row.id, row.created_at, row.labels)


class ConversationStore:
    """All conversations of a database."""

    def __init__(self, database: Database, limits: StorageLimits | None = None) -> None:
        self.limits = limits or StorageLimits()
        self._database = database

    def create(
        self, owner: str, metadata: dict[str, str], items: Sequence[Item] = (), client: str = ""
    ) -> StoredConversation:
        """Create a conversation. Raises: Refused (a storage limit)."""
        with self._database.write_session() as session:
            mine = select(func.count()).select_from(ConversationRow).where(ConversationRow.owner == owner)
            if (session.scalar(mine) or 0) >= self.limits.max_conversations:
                what = f"at most {self.limits.max_conversations} conversations are kept: delete some"
                raise Refused(400, what, code="too_many_conversations")
            now = int(time.time())
            row = ConversationRow(id=new_id("conv"), owner=owner, client=client, created_at=now, labels=metadata)
            session.add(row)
            session.flush()
            add_items(session, row, items, self.limits)
            return StoredConversation.from_row(row)

    def get(self, owner: str, id_: str) -> StoredConversation:
        """One conversation. Raises: Refused (404)."""
        with self._database.read_session() as session:
            return StoredConversation.from_row(get_conversation_row(session, owner, id_))

    def list_page(self, owner: str, page: Page, client: str = "") -> tuple[list[StoredConversation], bool]:
        """Return (a client's conversations, whether there are more). Raises: Refused (an id that is not in the list)."""
        query = select(ConversationRow).where(ConversationRow.owner == owner, ConversationRow.client == client)
        with self._database.read_session() as session:
            rows, has_more = read_page(session, query, ConversationRow, page)
            return [StoredConversation.from_row(row) for row in rows], has_more

    def update(self, owner: str, id_: str, metadata: dict[str, str]) -> StoredConversation:
        """Replace the metadata, which holds the title. Raises: Refused (404)."""
        with self._database.write_session() as session:
            row = get_conversation_row(session, owner, id_, to_write=True)
            row.labels = metadata
            return StoredConversation.from_row(row)

    def delete(self, owner: str, id_: str) -> None:
        """Delete a conversation with its items and responses. Raises: Refused (404)."""
        with self._database.write_session() as session:
            row = get_conversation_row(session, owner, id_, to_write=True)
            # The responses first: items that only they hold would be left behind.
            delete_responses(session, select(ResponseRow.number).where(ResponseRow.conversation == row.number))
            session.delete(row)

    def delete_all(self, owner: str) -> tuple[int, int]:
        """Delete all that an owner has, in short transactions, so that a running server waits for none.

        Returns: (conversations, responses outside of them).
        """
        counts = [0, 0]
        for index, (kind, number) in enumerate(
            ((ConversationRow, ConversationRow.number), (ResponseRow, ResponseRow.number))
        ):
            while True:
                with self._database.write_session() as session:
                    some = session.scalars(select(number).where(kind.owner == owner).limit(_DELETE_ROWS)).all()
                    if index == 0:
                        delete_responses(session, select(ResponseRow.number).where(ResponseRow.conversation.in_(some)))
                        session.execute(delete(ConversationRow).where(number.in_(some)))
                    else:
                        delete_responses(session, select(number).where(number.in_(some)))
                counts[index] += len(some)
                if len(some) < _DELETE_ROWS:
                    break
        return counts[0], counts[1]

    def iterate_items(self, owner: str, id_: str) -> Iterator[list[Item]]:
        """All items of a conversation in order, page by page; those added meanwhile are left out.

        Between pages nothing is held, so the reader may take its time. Raises: Refused (404, also if it is deleted meanwhile).
        """
        with self._database.read_session() as session:
            query = _items_query(get_conversation_row(session, owner, id_)).with_only_columns(func.max(ItemRow.number))
            last = session.scalar(query) or 0
        number, has_more = 0, True
        while has_more:
            with self._database.read_session() as session:
                query = _items_query(get_conversation_row(session, owner, id_))
                query = query.where(ItemRow.number > number, ItemRow.number <= last).order_by(ItemRow.number)
                rows, has_more = read_rows(session, query, _PAGE_BYTES)
                number = rows[-1].number if rows else last
                items = [Item.from_row(row) for row in rows]
            yield items

    def add_items(self, owner: str, id_: str, items: Sequence[Item]) -> None:
        """Append items. Raises: Refused (404; 409: a response is pending; 400: a storage limit)."""
        with self._database.write_session() as session:
            row = get_conversation_row(session, owner, id_, to_write=True)
            check_unlocked(row)
            add_items(session, row, items, self.limits)

    def list_items(self, owner: str, id_: str, page: Page) -> tuple[list[Item], bool]:
        """Return (items, whether there are more). Raises: Refused (404, or an id that is not in the list)."""
        with self._database.read_session() as session:
            rows, has_more = read_page(session, _items_query(get_conversation_row(session, owner, id_)), ItemRow, page)
            return [Item.from_row(row) for row in rows], has_more

    def get_item(self, owner: str, id_: str, item: str) -> Item:
        """One item. Raises: Refused (404)."""
        with self._database.read_session() as session:
            return Item.from_row(_get_item_row(session, get_conversation_row(session, owner, id_), item))

    def delete_item(self, owner: str, id_: str, item: str) -> StoredConversation:
        """Delete an item. Returns: its conversation. Raises: Refused (404; 409: a response is pending)."""
        with self._database.write_session() as session:
            row = get_conversation_row(session, owner, id_, to_write=True)
            check_unlocked(row)
            found = _get_item_row(session, row, item)
            row.items -= 1
            row.bytes -= found.bytes
            session.delete(found)
            return StoredConversation.from_row(row)


def _items_query(row: ConversationRow) -> Select[ItemRow]:
    return select(ItemRow).where(ItemRow.conversation == row.number)


def _get_item_row(session: Session, row: ConversationRow, id_: str) -> ItemRow:
    found = session.scalar(_items_query(row).where(ItemRow.id == id_)) if is_valid_id(id_) else None
    if found is None:
        raise not_found("item", id_)
    return found
