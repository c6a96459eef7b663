"""The tables of conversations, responses and items, their values, and reading of pages.

A text is stored once, as an item of a conversation, of a response, or of both.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

from sqlalchemy import JSON, BigInteger, Boolean, Double, ForeignKey, Index, Integer, Select, String
from sqlalchemy.orm import Mapped, Session, mapped_column

from corral.serving.database import AutoNumber, Base
from corral.serving.protocol import Refused

Role: TypeAlias = Literal["system", "developer", "user", "assistant"]
ItemStatus: TypeAlias = Literal["completed", "incomplete"]

ROW_BYTES = 256
"""Counted for each row in addition to its text, so that empty texts take space too."""
PART_BYTES = 64
"""Counted for each part of a message after the first."""
_PAGE_BYTES = 2**20
_FETCH_ROWS = 10


class ConversationRow(Base):
    """A conversation. `items` and `bytes` are sums over its items."""

    __tablename__ = "conversations"
    __table_args__ = (
        Index(None, "owner", "number"),
        Index(None, "owner", "items", "bytes"),  # covers the sums over an owner's conversations
    )

    number: Mapped[int] = mapped_column(AutoNumber, primary_key=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    owner: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[int] = mapped_column(BigInteger)
    labels: Mapped[dict[str, str]] = mapped_column("metadata", JSON)  # SQLAlchemy reserves the name `metadata`
    items: Mapped[int] = mapped_column(Integer, default=0)
    bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    turn: Mapped[str | None] = mapped_column(String(64))
    """The id of the pending response, which locks the conversation until it is finished, or until `turn_until`."""
    turn_until: Mapped[float | None] = mapped_column(Double)


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
    until: Mapped[float | None] = mapped_column(Double)
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
    """Which part of a list to read: after or before an id, newest first unless `ascending`."""

    after: str | None = None
    before: str | None = None
    limit: int = 20
    ascending: bool = False


Row = TypeVar("Row", ConversationRow, ItemRow)


def read_page(session: Session, query: Select[Row], kind: type[Row], page: Page) -> tuple[list[Row], bool]:
    """Return (rows, whether there are more in that direction). A page of long rows has fewer than `limit`.

    Raises: Refused (an id that is not in the list).
    """
    for param, id_ in (("after", page.after), ("before", page.before)):
        if id_ is None:
            continue
        number = (
            session.scalar(query.where(kind.id == id_).with_only_columns(kind.number)) if is_valid_id(id_) else None
        )
        if number is None:
            raise Refused(400, f"{param!r}: nothing in this list has the id {id_!r}", param=param)
        is_later = page.ascending == (param == "after")
        query = query.where(kind.number > number if is_later else kind.number < number)
    is_backwards = page.before is not None and page.after is None
    order = kind.number.asc() if page.ascending != is_backwards else kind.number.desc()
    rows, has_more = read_rows(session, query.order_by(order).limit(page.limit + 1), _PAGE_BYTES)
    if len(rows) > page.limit:
        rows, has_more = rows[: page.limit], True
    return rows[::-1] if is_backwards else rows, has_more


def read_rows(session: Session, query: Select[Row], most_bytes: int) -> tuple[list[Row], bool]:
    """Return (the first rows of a query, until they exceed `most_bytes`, whether there are more).

    Sizes are computed from the rows that were read, as stored sizes may be wrong in old databases; further rows are not read.
    """
    selected: list[Row] = []
    size = 0
    rows = session.scalars(query.execution_options(yield_per=_FETCH_ROWS))
    for row in rows:
        if size > most_bytes:
            rows.close()
            return selected, True
        selected.append(row)
        size += Item.from_row(row).bytes if isinstance(row, ItemRow) else ROW_BYTES
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
