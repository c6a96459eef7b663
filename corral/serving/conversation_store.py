"""Stores conversations and their items; `response_store` adds those of responses.

Every query is limited to an owner: another owner's conversations are not found. Calls block.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from corral.serving.database import Database
from corral.serving.protocol import Refused
from corral.serving.response_store import (
    ResponseStore,
    add_items,
    check_unlocked,
    delete_responses,
    get_conversation_row,
)
from corral.serving.tables import (
    ConversationRow,
    Item,
    ItemRow,
    Page,
    ResponseRow,
    StorageLimits,
    is_valid_id,
    new_id,
    not_found,
    read_page,
    read_rows,
)


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
    """All conversations of a database.

    Args:
        lease_seconds: how long a conversation stays locked after a server died while it answered.
    """

    def __init__(self, database: Database, limits: StorageLimits | None = None, *, lease_seconds: float = 20) -> None:
        self.limits = limits or StorageLimits()
        self.responses = ResponseStore(database, self.limits, lease_seconds=lease_seconds)
        self._database = database

    def create(self, owner: str, metadata: dict[str, str], items: Sequence[Item] = ()) -> StoredConversation:
        """Create a conversation. Raises: Refused (a storage limit)."""
        with self._database.write_session() as session:
            mine = select(func.count()).select_from(ConversationRow).where(ConversationRow.owner == owner)
            if (session.scalar(mine) or 0) >= self.limits.max_conversations:
                what = f"at most {self.limits.max_conversations} conversations are kept: delete some"
                raise Refused(400, what, code="too_many_conversations")
            row = ConversationRow(id=new_id("conv"), owner=owner, created_at=int(time.time()), labels=metadata)
            session.add(row)
            session.flush()
            add_items(session, row, items, self.limits)
            return StoredConversation.from_row(row)

    def get(self, owner: str, id_: str) -> StoredConversation:
        """One conversation. Raises: Refused (404)."""
        with self._database.read_session() as session:
            return StoredConversation.from_row(get_conversation_row(session, owner, id_))

    def list_page(self, owner: str, page: Page) -> tuple[list[StoredConversation], bool]:
        """Return (conversations, whether there are more). Raises: Refused (an id that is not in the list)."""
        query = select(ConversationRow).where(ConversationRow.owner == owner)
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

    def export(self, owner: str, id_: str) -> tuple[StoredConversation, list[Item]]:
        """Return (a conversation, all its items in order). Raises: Refused (404; 400: far over the storage limit)."""
        with self._database.read_session() as session:
            row = get_conversation_row(session, owner, id_)
            # Twice the limit, because an answer that exceeds it is still stored.
            items, has_more = read_rows(session, _items_query(row).order_by(ItemRow.number), 2 * self.limits.max_bytes)
            if has_more:
                what = "this conversation is too large for one response: read its items page by page"
                raise Refused(400, what, code="conversation_too_large")
            return StoredConversation.from_row(row), [Item.from_row(item) for item in items]

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
