"""Stored conversations: whose they are, in what order their items come, and how much of them is kept and read at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest

from corral.serving.conversation_store import ConversationStore
from corral.serving.database import Database
from corral.serving.errors import Refused
from corral.serving.store import Item, Page, StorageLimits


@pytest.fixture
def store(database: Database) -> ConversationStore:
    return ConversationStore(database)


def items_saying(*texts: str) -> list[Item]:
    """A user's and an assistant's items, by turns."""
    return [Item.new("assistant" if i % 2 else "user", [text]) for i, text in enumerate(texts)]


def texts(items: Sequence[Item]) -> list[str]:
    return [item.text for item in items]


def items_of(store: ConversationStore, id_: str, owner: str = "a") -> list[Item]:
    """All items of a conversation, in order."""
    return list(itertools.chain.from_iterable(store.iterate_items(owner, id_)))


def status_of(call: Callable[[], object]) -> int:
    with pytest.raises(Refused) as caught:
        call()
    return caught.value.status


def test_stored_conversations_survive_reopening_the_database(database_url: str) -> None:
    odd = "a zero byte \0, a 漢, and half a character \ud800"
    first = Database(database_url)
    conversation = ConversationStore(first).create("a", {"title": "Böse"}, [Item.new("user", ["one", odd])])
    first.close()
    second = Database(database_url)
    reopened = ConversationStore(second)
    stored, items = reopened.get("a", conversation.id), items_of(reopened, conversation.id)
    second.close()
    assert (stored.id, stored.created_at, stored.labels) == (
        conversation.id,
        conversation.created_at,
        {"title": "Böse"},
    )
    assert items[0].texts == ["one", odd]
    assert items[0].text == "one" + odd


def test_paging_visits_every_item_once_in_both_orders(store: ConversationStore) -> None:
    conversation = store.create("a", {}, items_saying(*map(str, range(7))))
    for ascending in (False, True):
        order = [str(i) for i in range(7)][:: 1 if ascending else -1]
        seen: list[Item] = []
        mores: list[bool] = []
        while not mores or mores[-1]:
            after = seen[-1].id if seen else None
            items, has_more = store.list_items("a", conversation.id, Page(after, 3, ascending))
            seen += items
            mores.append(has_more)
        assert texts(seen) == order
        assert mores == [True, True, False]


def test_a_page_cursor_that_is_not_in_the_list_gives_400(store: ConversationStore) -> None:
    conversation, other = (store.create("a", {}, items_saying("Hi")) for _ in range(2))
    foreign = items_of(store, other.id)[0].id
    for id_ in (foreign, "msg_" + "0" * 32, "", "\0", "'; DROP TABLE items"):
        assert status_of(lambda id_=id_: store.list_items("a", conversation.id, Page(after=id_))) == 400
        assert status_of(lambda id_=id_: store.list_page("a", Page(after=id_))) == 400


def test_an_item_of_one_conversation_is_not_found_in_another(store: ConversationStore) -> None:
    conversation, other = (store.create("a", {}, items_saying("Hi")) for _ in range(2))
    item = items_of(store, conversation.id)[0]
    assert store.get_item("a", conversation.id, item.id).text == "Hi"
    assert status_of(lambda: store.get_item("a", other.id, item.id)) == 404
    assert status_of(lambda: store.delete_item("a", other.id, item.id)) == 404


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
        whole = ids(items_of(store, conversation.id))[:: 1 if ascending else -1]
        seen: list[str] = []
        has_more = True
        while has_more:
            items, has_more = store.list_items("a", conversation.id, Page(seen[-1] if seen else None, 100, ascending))
            assert sum(item.bytes for item in items) <= 2**18 + 300_000
            seen += ids(items)
        assert seen == whole


def test_all_items_are_read_in_bounded_pages_without_those_added_meanwhile(store: ConversationStore) -> None:
    long = [Item.new("user", ["x" * 100_000]) for _ in range(9)]
    conversation = store.create("a", {}, long)
    pages = store.iterate_items("a", conversation.id)
    read = [next(pages)]
    store.add_items("a", conversation.id, items_saying("added"))
    store.delete_item("a", conversation.id, long[4].id)
    read += pages
    assert [item.id for page in read for item in page] == ids(long[:4] + long[5:])
    assert max(sum(item.bytes for item in page) for page in read) < 2**18 + 100_000
    empty = store.create("a", {})
    assert items_of(store, empty.id) == []


def test_reading_all_items_of_a_deleted_conversation_fails(store: ConversationStore) -> None:
    conversation = store.create("a", {}, [Item.new("user", ["x" * 300_000]) for _ in range(2)])
    pages = store.iterate_items("a", conversation.id)
    assert len(next(pages)) == 1
    store.delete("a", conversation.id)
    assert status_of(lambda: next(pages)) == 404
