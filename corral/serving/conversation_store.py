"""Stored conversations: made, read, added to, renamed, deleted, exported. Each belongs to an owner, and nobody else finds it.

Every query asks for the owner; what is not theirs is missing, as if it had never been. Calls block. It does not know models,
HTTP, or how an answer comes to be; what an answer does to a conversation is in `turns`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from corral.serving.database import Database
from corral.serving.protocol import Refused
from corral.serving.response_store import Turns, add, check_free, forget, owned
from corral.serving.tables import (
    Caps,
    ConversationRow,
    Item,
    ItemRow,
    Page,
    ResponseRow,
    is_id,
    missing,
    new_id,
    page_of,
    some_of,
)


@dataclass(frozen=True, slots=True)
class Stored:
    """A conversation without its items."""

    id: str
    created_at: int
    """Seconds since 1970."""
    metadata: dict[str, str]

    @classmethod
    def of(cls, row: ConversationRow) -> Stored:
        """The one in a row."""
        return cls(row.id, row.created_at, row.labels)


class Conversations:
    """All conversations of a server.

    Args:
        caps: how much is stored.
        lease_seconds: how long a conversation stays held by an answer whose maker has died.
    """

    def __init__(self, database: Database, caps: Caps | None = None, *, lease_seconds: float = 20) -> None:
        self.caps = caps or Caps()
        self.turns = Turns(database, self.caps, lease_seconds=lease_seconds)
        self._database = database

    def create(self, owner: str, metadata: dict[str, str], items: Sequence[Item] = ()) -> Stored:
        """Begin a conversation. Raises: Refused (over a cap)."""
        with self._database.session() as session:
            mine = select(func.count()).select_from(ConversationRow).where(ConversationRow.owner == owner)
            if (session.scalar(mine) or 0) >= self.caps.conversations:
                what = f"at most {self.caps.conversations} conversations are kept: delete some"
                raise Refused(400, what, code="too_many_conversations")
            row = ConversationRow(id=new_id("conv"), owner=owner, created_at=int(time.time()), labels=metadata)
            session.add(row)
            session.flush()
            add(session, row, items, self.caps)
            return Stored.of(row)

    def get(self, owner: str, id_: str) -> Stored:
        """One conversation. Raises: Refused (404)."""
        with self._database.reading() as session:
            return Stored.of(owned(session, owner, id_))

    def all(self, owner: str, page: Page) -> tuple[list[Stored], bool]:
        """(conversations, whether there are more). Raises: Refused (an id that is in no list)."""
        query = select(ConversationRow).where(ConversationRow.owner == owner)
        with self._database.reading() as session:
            rows, has_more = page_of(session, query, ConversationRow, page)
            return [Stored.of(row) for row in rows], has_more

    def update(self, owner: str, id_: str, metadata: dict[str, str]) -> Stored:
        """Give it other metadata, which is where its title is. Raises: Refused (404)."""
        with self._database.session() as session:
            row = owned(session, owner, id_, to_write=True)
            row.labels = metadata
            return Stored.of(row)

    def delete(self, owner: str, id_: str) -> None:
        """Delete it with its items and the responses made for it. Raises: Refused (404)."""
        with self._database.session() as session:
            row = owned(session, owner, id_, to_write=True)
            # First the responses: what they alone hold would be left without a place.
            forget(session, select(ResponseRow.number).where(ResponseRow.conversation == row.number))
            session.delete(row)

    def export(self, owner: str, id_: str) -> tuple[Stored, list[Item]]:
        """(a conversation, all its items in order). Raises: Refused (404; 400: it has far more than is stored nowadays)."""
        with self._database.reading() as session:
            row = owned(session, owner, id_)
            # Twice, since the answer that crosses the cap is still stored.
            items, has_more = some_of(session, _of(row).order_by(ItemRow.number), 2 * self.caps.bytes)
            if has_more:
                what = "this conversation is too large to be given at once: read its items page by page"
                raise Refused(400, what, code="conversation_too_large")
            return Stored.of(row), [Item.of(item) for item in items]

    def add(self, owner: str, id_: str, items: Sequence[Item]) -> None:
        """Add items at the end. Raises: Refused (404; 409 while an answer is being made; over a cap)."""
        with self._database.session() as session:
            row = owned(session, owner, id_, to_write=True)
            check_free(row)
            add(session, row, items, self.caps)

    def items(self, owner: str, id_: str, page: Page) -> tuple[list[Item], bool]:
        """(items, whether there are more). Raises: Refused (404, or an id that is not in the list)."""
        with self._database.reading() as session:
            rows, has_more = page_of(session, _of(owned(session, owner, id_)), ItemRow, page)
            return [Item.of(row) for row in rows], has_more

    def item(self, owner: str, id_: str, item: str) -> Item:
        """One item. Raises: Refused (404)."""
        with self._database.reading() as session:
            return Item.of(_item(session, owned(session, owner, id_), item))

    def delete_item(self, owner: str, id_: str, item: str) -> Stored:
        """Delete an item. Returns: its conversation. Raises: Refused (404; 409 while an answer is being made)."""
        with self._database.session() as session:
            row = owned(session, owner, id_, to_write=True)
            check_free(row)
            found = _item(session, row, item)
            row.items -= 1
            row.bytes -= found.bytes
            session.delete(found)
            return Stored.of(row)


def _of(row: ConversationRow) -> Select[ItemRow]:
    return select(ItemRow).where(ItemRow.conversation == row.number)


def _item(session: Session, row: ConversationRow, id_: str) -> ItemRow:
    found = session.scalar(_of(row).where(ItemRow.id == id_)) if is_id(id_) else None
    if found is None:
        raise missing("item", id_)
    return found
