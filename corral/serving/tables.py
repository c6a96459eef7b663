"""What is stored of conversations: three tables, the values that come out of them, and pages of a list.

A text is stored once, as an item: of a conversation, of a response, or of both. It does not know when anything is written, and
whose something is it only holds: `conversations` and `turns` ask for it.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

from sqlalchemy import JSON, BigInteger, Boolean, Double, ForeignKey, Index, Integer, Select, String
from sqlalchemy.orm import Mapped, Session, mapped_column

from corral.serving.database import Base, Number
from corral.serving.protocol import Refused

Role: TypeAlias = Literal["system", "developer", "user", "assistant"]
ItemStatus: TypeAlias = Literal["completed", "incomplete"]

ROW_BYTES = 256
"""What a row is taken to need besides what it says: many empty texts are not nothing."""
PART_BYTES = 64
"""The same for each part of a message after the first."""
_PAGE_BYTES = 2**20
_ROWS_AT_A_TIME = 10


class ConversationRow(Base):
    """A conversation. `items` and `bytes` count what it holds."""

    __tablename__ = "conversations"
    __table_args__ = (
        Index(None, "owner", "number"),
        Index(None, "owner", "items", "bytes"),  # all that is summed up of an owner, without reading the rows
    )

    number: Mapped[int] = mapped_column(Number, primary_key=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    owner: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[int] = mapped_column(BigInteger)
    labels: Mapped[dict[str, str]] = mapped_column("metadata", JSON)  # `metadata` is SQLAlchemy's
    items: Mapped[int] = mapped_column(Integer, default=0)
    bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    turn: Mapped[str | None] = mapped_column(String(64))
    """The response that is being made for it; nothing else may be added until that has ended, or until `turn_until`."""
    turn_until: Mapped[float | None] = mapped_column(Double)


class ResponseRow(Base):
    """A response without its items. `body` is as it is shown, save for what its items say."""

    __tablename__ = "responses"
    __table_args__ = (Index(None, "owner", "number", "bytes"),)

    number: Mapped[int] = mapped_column(Number, primary_key=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    owner: Mapped[str] = mapped_column(String(64))
    conversation: Mapped[int | None] = mapped_column(
        Number, ForeignKey("conversations.number", ondelete="CASCADE"), index=True
    )
    previous: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[int] = mapped_column(BigInteger, index=True)
    until: Mapped[float | None] = mapped_column(Double)
    """While it is being made: when its maker, if it has not said that it lives, is taken for dead. In seconds since 1970."""
    body: Mapped[dict[str, Any]] = mapped_column(JSON)
    bytes: Mapped[int] = mapped_column(BigInteger)
    """Of its body, and of the items that it alone holds, each with `ROW_BYTES`."""


class ItemRow(Base):
    """A message. It is gone with its conversation; without one, with its response."""

    __tablename__ = "items"

    number: Mapped[int] = mapped_column(Number, primary_key=True)
    id: Mapped[str] = mapped_column(String(64), unique=True)
    conversation: Mapped[int | None] = mapped_column(
        Number, ForeignKey("conversations.number", ondelete="CASCADE"), index=True
    )
    response: Mapped[int | None] = mapped_column(
        Number, ForeignKey("responses.number", ondelete="SET NULL"), index=True
    )
    is_output: Mapped[bool] = mapped_column(Boolean)
    role: Mapped[str] = mapped_column(String(16))
    status: Mapped[str] = mapped_column(String(16))
    texts: Mapped[list[str]] = mapped_column(JSON)
    """Its parts. As JSON, in ASCII, since PostgreSQL's texts hold no zero byte."""
    bytes: Mapped[int] = mapped_column(BigInteger)


@dataclass(frozen=True, slots=True)
class Caps:
    """How much is stored."""

    items: int = 2000
    """Of one conversation, or of the responses that one goes back to."""
    bytes: int = 2**22
    """Of their texts in UTF-8, each part of a message after its first with `PART_BYTES`. The answer that crosses it is still
    stored."""
    conversations: int = 10_000
    """Of one owner."""
    total: int = 2**30
    """Bytes of all conversations of one owner, each and each of its items with `ROW_BYTES`."""
    responses: int = 10_000
    """Of one owner; the oldest give way to new ones."""
    responses_bytes: int = 2**28
    """Of all responses of one owner, with what their bodies say; the oldest give way."""
    days: int = 30
    """After which a response that is in no conversation is deleted."""


@dataclass(frozen=True, slots=True)
class Item:
    """A message, as stored or to be stored."""

    id: str
    role: Role
    texts: tuple[str, ...]
    """Its parts, which are read with nothing between them."""
    status: ItemStatus = "completed"

    @classmethod
    def new(cls, role: Role, texts: Sequence[str], status: ItemStatus = "completed") -> Item:
        """One with a new id."""
        return cls(new_id("msg"), role, tuple(texts), status)

    @classmethod
    def of(cls, row: ItemRow) -> Item:
        """The one in a row."""
        return cls(row.id, row.role, tuple(row.texts), row.status)  # pyright: ignore[reportArgumentType]

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.texts)

    @property
    def bytes(self) -> int:
        """Of its text in UTF-8, with what its parts are taken to need."""
        parts = PART_BYTES * (len(self.texts) - 1) if self.texts else 0
        return parts + sum(len(text.encode("utf-8", "surrogatepass")) for text in self.texts)

    def row(self, *, conversation: int | None, response: int | None, is_output: bool) -> ItemRow:
        """A row for it."""
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


def bytes_of(items: Sequence[Item]) -> int:
    """What items take of an owner's share."""
    return sum(item.bytes + ROW_BYTES for item in items)


@dataclass(frozen=True, slots=True)
class Page:
    """Which part of a list is asked for: the one behind or before an id, newest first unless `ascending`."""

    after: str | None = None
    before: str | None = None
    limit: int = 20
    ascending: bool = False


Row = TypeVar("Row", ConversationRow, ItemRow)


def page_of(session: Session, query: Select[Row], kind: type[Row], page: Page) -> tuple[list[Row], bool]:
    """(rows, whether there are more in that direction). Long ones fill a page before there are as many as were asked for.

    Raises: Refused (an id that is not in the list).
    """
    for param, at in (("after", page.after), ("before", page.before)):
        if at is None:
            continue
        number = session.scalar(query.where(kind.id == at).with_only_columns(kind.number)) if is_id(at) else None
        if number is None:
            raise Refused(400, f"{param!r}: nothing in this list has the id {at!r}", param=param)
        is_later = page.ascending == (param == "after")
        query = query.where(kind.number > number if is_later else kind.number < number)
    is_backwards = page.before is not None and page.after is None
    order = kind.number.asc() if page.ascending != is_backwards else kind.number.desc()
    shown, has_more = some_of(session, query.order_by(order).limit(page.limit + 1), _PAGE_BYTES)
    if len(shown) > page.limit:
        shown, has_more = shown[: page.limit], True
    return shown[::-1] if is_backwards else shown, has_more


def some_of(session: Session, query: Select[Row], most_bytes: int) -> tuple[list[Row], bool]:
    """(the first rows of a query, up to so many bytes and the one that crosses them, whether there are more).

    What is read is counted, and not what was counted when it was stored: the rest is not read.
    """
    found: list[Row] = []
    size = 0
    rows = session.scalars(query.execution_options(yield_per=_ROWS_AT_A_TIME))
    for row in rows:
        if size > most_bytes:
            rows.close()
            return found, True
        found.append(row)
        size += Item.of(row).bytes if isinstance(row, ItemRow) else ROW_BYTES
    return found, False


def new_id(kind: Literal["conv", "resp", "msg"]) -> str:
    """An id that nobody guesses."""
    return f"{kind}_{secrets.token_hex(16)}"


def is_id(text: str) -> bool:
    """Whether this may be an id of something stored: what is none is not looked for."""
    return re.fullmatch(r"[a-z]+_[0-9a-f]{32}", text) is not None


def missing(kind: str, id_: str, param: str | None = None) -> Refused:
    """There is nothing of this id that belongs to the one who asks: the same words whether or not it is somebody else's."""
    return Refused(404, f"there is no {kind} with the id {id_!r}", param=param, code="not_found")
