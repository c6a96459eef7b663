"""Stores conversations: creates, lists, changes and deletes them and their items, within an owner's limits. Calls block."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from sqlalchemy import func, select

from corral.serving.database import Database
from corral.serving.store import (
    PAGE_BYTES,
    Item,
    Page,
    StorageLimits,
    StoredConversation,
    StoredResponse,
    add_items,
    delete_conversations,
    delete_responses,
    get_conversation,
    get_row,
    make_room_in,
    new_id,
    read_page,
    read_rows,
)

_DELETE_ROWS = 50


class ConversationStore:
    """All conversations of a database."""

    def __init__(self, database: Database, limits: StorageLimits | None = None) -> None:
        self.limits = limits or StorageLimits()
        self._database = database

    def create(
        self, owner: str, metadata: dict[str, str], items: Sequence[Item] = (), client: str = ""
    ) -> StoredConversation:
        """Create a conversation. Raises: Refused (a storage limit)."""
        row = StoredConversation(
            id=new_id("conv"),
            owner=owner,
            client=client,
            created_at=int(time.time()),
            labels=metadata,
            items=0,
            bytes=0,
        )
        with self._database.write_session() as session:
            make_room_in(session, row, items, self.limits, is_new=True)
            session.add(row)
            session.flush()
            add_items(session, items, row)
        return row

    def get(self, owner: str, id_: str) -> StoredConversation:
        """One conversation. Raises: Refused (404)."""
        with self._database.read_session() as session:
            return get_conversation(session, owner, id_)

    def list_page(self, owner: str, page: Page, client: str = "") -> tuple[list[StoredConversation], bool]:
        """Return (a client's conversations, whether there are more). Raises: Refused (an id that is not in the list)."""
        is_hers = (StoredConversation.owner == owner) & (StoredConversation.client == client)
        with self._database.read_session() as session:
            return read_page(session, StoredConversation, is_hers, page)

    def update(self, owner: str, id_: str, metadata: dict[str, str]) -> StoredConversation:
        """Replace the metadata, which holds the title. Raises: Refused (404)."""
        with self._database.write_session() as session:
            row = get_conversation(session, owner, id_, to_write=True)
            row.labels = metadata
            return row

    def delete(self, owner: str, id_: str) -> None:
        """Delete a conversation with its items and responses. Raises: Refused (404)."""
        with self._database.write_session() as session:
            delete_conversations(session, [get_conversation(session, owner, id_, to_write=True).number])

    def delete_all(self, owner: str) -> tuple[int, int]:
        """Delete all that an owner has, in short transactions, so that a running server waits for none.

        Returns: (conversations, responses outside of them).
        """
        return (
            self._delete_all(StoredConversation, owner),
            self._delete_all(StoredResponse, owner),
        )

    def _delete_all(self, kind: type[StoredConversation | StoredResponse], owner: str) -> int:
        count = 0
        while True:
            with self._database.write_session() as session:
                some = session.scalars(select(kind.number).where(kind.owner == owner).limit(_DELETE_ROWS)).all()
                (delete_conversations if kind is StoredConversation else delete_responses)(session, some)
            count += len(some)
            if len(some) < _DELETE_ROWS:
                return count

    def add_items(self, owner: str, id_: str, items: Sequence[Item]) -> None:
        """Append items. Raises: Refused (404; 409: a response is pending; 400: a storage limit)."""
        with self._database.write_session() as session:
            row = get_conversation(session, owner, id_, to_write=True)
            row.check_unlocked()
            make_room_in(session, row, items, self.limits)
            add_items(session, items, row)

    def iterate_items(self, owner: str, id_: str) -> Iterator[list[Item]]:
        """All items of a conversation in order, page by page; those added meanwhile are left out.

        Between pages nothing is held, so the reader may take its time. Raises: Refused (404, also if it is deleted meanwhile).
        """
        number, last, has_more = 0, None, True
        while has_more:
            with self._database.read_session() as session:
                is_in = Item.conversation == get_conversation(session, owner, id_).number
                if last is None:
                    last = session.scalar(select(func.max(Item.number)).where(is_in)) or 0
                query = select(Item).where(is_in, Item.number > number, Item.number <= last).order_by(Item.number)
                items, has_more = read_rows(session, query, PAGE_BYTES)
            number = items[-1].number if items else last
            yield items

    def list_items(self, owner: str, id_: str, page: Page) -> tuple[list[Item], bool]:
        """Return (items, whether there are more). Raises: Refused (404, or an id that is not in the list)."""
        with self._database.read_session() as session:
            number = get_conversation(session, owner, id_).number
            return read_page(session, Item, Item.conversation == number, page)

    def get_item(self, owner: str, id_: str, item: str) -> Item:
        """One item. Raises: Refused (404)."""
        with self._database.read_session() as session:
            number = get_conversation(session, owner, id_).number
            return get_row(session, Item, item, Item.conversation == number)

    def delete_item(self, owner: str, id_: str, item: str) -> StoredConversation:
        """Delete an item. Returns: its conversation. Raises: Refused (404; 409: a response is pending)."""
        with self._database.write_session() as session:
            row = get_conversation(session, owner, id_, to_write=True)
            row.check_unlocked()
            found = get_row(session, Item, item, Item.conversation == row.number)
            row.items -= 1
            row.bytes -= found.bytes
            session.delete(found)
            return row
