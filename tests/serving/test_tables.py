"""What stored items take of their owner's share, and how much of them is read at once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from sqlalchemy import update

from corral.serving.conversation_store import ConversationStore
from corral.serving.database import Database
from corral.serving.protocol import Refused
from corral.serving.tables import ConversationRow, Item, ItemRow, Page, StorageLimits


def many_parts(count: int, times: int = 1) -> list[Item]:
    return [Item.new("user", [""] * count) for _ in range(times)]


def ids(items: Sequence[Item]) -> list[str]:
    return [item.id for item in items]


def test_empty_message_parts_count_towards_the_stored_bytes(database: Database) -> None:
    assert [Item.new("user", texts).bytes for texts in ([], [""], ["ü"], ["ü", ""], [""] * 101)] == [0, 0, 2, 66, 6400]
    store = ConversationStore(database, StorageLimits(max_bytes=64_000))
    conversation = store.create("a", {}, many_parts(501))
    for items in (many_parts(502), many_parts(300, times=2)):
        with pytest.raises(Refused) as caught:
            store.add_items("a", conversation.id, items)
        assert caught.value.code == "conversation_full"
    store.add_items("a", conversation.id, many_parts(501))
    item = store.list_items("a", conversation.id, Page())[0][0]
    store.delete_item("a", conversation.id, item.id)
    store.add_items("a", conversation.id, many_parts(501))


def test_a_page_of_long_items_ends_early_and_the_next_continues(database: Database) -> None:
    store = ConversationStore(database)
    long = [Item.new("user", ["x" * 300_000]) for _ in range(10)]
    conversation = store.create("a", {}, [*long, *many_parts(1, times=5)])
    for ascending in (True, False):
        whole = ids(store.export("a", conversation.id)[1])[:: 1 if ascending else -1]
        seen: list[str] = []
        has_more = True
        while has_more:
            items, has_more = store.list_items(
                "a", conversation.id, Page(seen[-1] if seen else None, None, 100, ascending)
            )
            assert sum(item.bytes for item in items) <= 2**20 + 300_000
            seen += ids(items)
        assert seen == whole
        items, has_more = store.list_items("a", conversation.id, Page(None, whole[-1], 100, ascending))
        assert has_more
        assert ids(items) == whole[-1 - len(items) : -1], "those next to the one that was named"


def test_items_stored_before_parts_were_counted_are_read_in_bounded_pages(database: Database) -> None:
    store = ConversationStore(database, StorageLimits(max_bytes=2**40))
    conversation = store.create("a", {}, many_parts(20_000, times=12))
    with database.write_session() as session:  # as it was written then
        session.execute(update(ItemRow).values(bytes=0))
        session.execute(update(ConversationRow).values(bytes=0))
    store = ConversationStore(database)
    items, has_more = store.list_items("a", conversation.id, Page(limit=100))
    assert (len(items), has_more) == (1, True)
    with pytest.raises(Refused) as caught:
        store.export("a", conversation.id)
    assert (caught.value.status, caught.value.code) == (400, "conversation_too_large")
    store.delete("a", conversation.id)
