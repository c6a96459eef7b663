"""Stored responses: their chains, their lease on a conversation, what becomes of them, and how much of them is kept."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import text

from corral.serving.conversation_store import ConversationStore
from corral.serving.database import Database
from corral.serving.errors import Refused
from corral.serving.response_store import PendingResponse, ResponseStore
from corral.serving.store import Item, Page, StorageLimits, StoredResponse, new_id
from tests.serving.test_conversation_store import items_of, items_saying, status_of, texts


class Stores(ConversationStore):
    """The conversations of a database and its responses, with the same limits."""

    def __init__(self, database: Database, limits: StorageLimits | None = None, **lease: float) -> None:
        super().__init__(database, limits)
        self.responses = ResponseStore(database, limits, **lease)


@pytest.fixture
def store(database: Database) -> Stores:
    return Stores(database)


def turn(text: str, *, owner: str = "a", stored: bool = True, **place: Any) -> PendingResponse:
    return PendingResponse(new_id("resp"), owner, (Item.new("user", [text]),), stored, **place)


def run_turn(store: Stores, question: PendingResponse, text: str = "Yes.") -> list[str]:
    """Go through a whole turn. Returns: what was said before."""
    before = store.responses.begin(question, {"status": "in_progress"})
    store.responses.finish(question, {"status": "completed"}, Item.new("assistant", [text]), is_kept=True)
    return texts(before)


def texts_of(store: Stores, id_: str, owner: str = "a") -> list[str]:
    return texts(items_of(store, id_, owner))


def rows(database: Database) -> list[int]:
    """How many conversations, responses and items there are."""
    with database.read_session() as session:
        tables = ("conversations", "responses", "items")
        return [session.execute(text(f"SELECT COUNT(*) FROM {table}")).scalar() or 0 for table in tables]


def test_other_owners_cannot_find_read_change_or_continue_a_conversation(store: Stores) -> None:
    conversation = store.create("a", {"title": "mine"}, items_saying("secret"))
    item = items_of(store, conversation.id)[0].id
    mine = turn("more", conversation=conversation.id)
    run_turn(store, mine)
    before = store.get("a", conversation.id).labels, texts_of(store, conversation.id)
    turns = store.responses
    for who, id_, response in (
        ("b", conversation.id, mine.id),
        ("", conversation.id, mine.id),
        ("a", new_id("conv"), new_id("resp")),
    ):
        calls: list[Callable[[], object]] = [
            lambda who=who, id_=id_: store.get(who, id_),
            lambda who=who, id_=id_: store.update(who, id_, {}),
            lambda who=who, id_=id_: store.delete(who, id_),
            lambda who=who, id_=id_: list(store.iterate_items(who, id_)),
            lambda who=who, id_=id_: store.add_items(who, id_, items_saying("x")),
            lambda who=who, id_=id_: store.list_items(who, id_, Page()),
            lambda who=who, id_=id_: store.get_item(who, id_, item),
            lambda who=who, id_=id_: store.delete_item(who, id_, item),
            lambda who=who, id_=id_: turns.begin(turn("x", owner=who, conversation=id_), {}),
            lambda who=who, id_=response: turns.begin(turn("x", owner=who, previous=id_), {}),
            lambda who=who, id_=response: turns.get(who, id_),
            lambda who=who, id_=response: turns.list_inputs(who, id_, Page()),
            lambda who=who, id_=response: turns.delete(who, id_),
        ]
        assert [status_of(call) for call in calls] == [404] * len(calls)
    assert (store.get("a", conversation.id).labels, texts_of(store, conversation.id)) == before


def test_a_turn_is_given_all_of_a_conversation_that_is_nearly_full(database: Database) -> None:
    store = Stores(database, StorageLimits(max_items=50, max_bytes=5000))
    said = [f"{n:03} {'x' * 96}" for n in range(49)]
    conversation = store.create("a", {}, items_saying(*said))
    before = store.responses.begin(turn("and now?", conversation=conversation.id), {})
    assert texts(before) == said, "the newest too"


def test_storage_limits_are_enforced_and_deleting_frees_space(database: Database) -> None:
    store = Stores(database, StorageLimits(max_items=3, max_bytes=20, max_conversations=2))
    conversation = store.create("a", {}, items_saying("1", "2", "3"))
    assert status_of(lambda: store.add_items("a", conversation.id, items_saying("4"))) == 400
    assert status_of(lambda: store.responses.begin(turn("4", conversation=conversation.id), {})) == 400
    store.delete_item("a", conversation.id, items_of(store, conversation.id)[0].id)
    store.add_items("a", conversation.id, items_saying("4"))
    assert texts_of(store, conversation.id) == ["2", "3", "4"]
    big = store.create("a", {}, items_saying("ä" * 10))
    assert status_of(lambda: store.add_items("a", big.id, items_saying("x"))) == 400
    assert status_of(lambda: store.create("a", {})) == 400
    assert store.create("b", {})
    store.delete("a", big.id)
    assert store.create("a", {}, items_saying("x" * 20))
    assert status_of(lambda: store.create("b", {}, items_saying("x" * 21))) == 400
    assert len(store.list_page("b", Page())[0]) == 1, "what is refused leaves nothing behind"


def test_the_oldest_responses_of_an_owner_are_deleted_for_new_ones(database: Database) -> None:
    store = Stores(database, StorageLimits(max_responses=5))
    theirs = turn("theirs", owner="b")
    run_turn(store, theirs)
    mine = [turn(str(i)) for i in range(12)]
    for each in mine:
        run_turn(store, each)
    assert rows(database) == [0, 6, 12]
    for each in mine[:7]:
        assert status_of(lambda each=each: store.responses.get("a", each.id)) == 404
    for each in mine[7:]:
        assert [*texts(store.responses.list_inputs("a", each.id, Page())[0]), "Yes."] == [
            *texts(each.inputs),
            *texts(store.responses.get("a", each.id)[1]),
        ]
    assert store.responses.get("b", theirs.id)[1]


@pytest.mark.parametrize("place", ["alone", "in a conversation"])
def test_stored_response_bytes_are_bounded_including_instructions_and_metadata(place: str, database: Database) -> None:
    store = Stores(database, StorageLimits(max_responses_bytes=50_000))
    where: dict[str, Any] = {} if place == "alone" else {"conversation": store.create("a", {}).id}
    body = {"instructions": "é" * 1000, "metadata": {"a": "b" * 500}}
    last = ""
    for _ in range(30):
        each = turn("x" * 1000, **where)
        store.responses.begin(each, body)
        store.responses.finish(each, body, Item.new("assistant", ["y" * 1000]), is_kept=True)
        last = each.id
    with database.read_session() as session:
        held = session.query(StoredResponse).all()
        items = session.query(Item).where(Item.conversation.is_(None)).all()
        kept = sum(len(json.dumps(row.body)) for row in held) + sum(item.bytes for item in items)
    assert 20_000 < kept < 50_000 + 2000, "the answer that crosses it is still stored"
    assert texts(store.responses.get("a", last)[1]) == ["y" * 1000]
    if where:
        assert len(texts_of(store, where["conversation"])) == 60, "what they say stays in their conversation"
    before = rows(database)
    assert status_of(lambda: store.responses.begin(turn("x"), {"instructions": "x" * 60_000})) == 400
    assert rows(database) == before, "what is refused makes no room"


def test_a_response_without_a_conversation_is_bounded_too(database: Database) -> None:
    store = Stores(database, StorageLimits(max_items=2, max_bytes=20))
    for inputs in (items_saying("1", "2", "3"), items_saying("x" * 21)):
        question = PendingResponse(new_id("resp"), "a", tuple(inputs), stored=True)
        assert status_of(lambda question=question: store.responses.begin(question, {})) == 400
    assert rows(database) == [0, 0, 0]


def test_total_bytes_of_an_owner_are_bounded_and_empty_messages_count(database: Database) -> None:
    store = Stores(database, StorageLimits(max_total_bytes=10_000))
    first = store.create("a", {}, items_saying(*["x" * 1000] * 3))
    second = store.create("a", {}, items_saying(*[""] * 15))
    assert status_of(lambda: store.create("a", {}, items_saying("x" * 2000))) == 400
    assert status_of(lambda: store.add_items("a", second.id, items_saying("x" * 2000))) == 400
    assert status_of(lambda: store.responses.begin(turn("x" * 2000, conversation=first.id), {})) == 400
    assert status_of(lambda: store.add_items("a", second.id, items_saying(*[""] * 10))) == 400
    assert store.create("b", {}, items_saying("x" * 2000))
    store.delete("a", first.id)
    assert run_turn(store, turn("x" * 2000, conversation=second.id)) == [""] * 15


def test_storage_limits_apply_to_response_chains(database: Database) -> None:
    store = Stores(database, StorageLimits(max_items=4))
    first = turn("1")
    run_turn(store, first, "2")
    second = turn("3", previous=first.id)
    run_turn(store, second, "4")
    assert status_of(lambda: store.responses.begin(turn("5", previous=second.id), {})) == 400


def test_deleting_a_conversation_deletes_its_items_and_responses(store: Stores, database: Database) -> None:
    conversation = store.create("a", {}, items_saying("Hi", "Hello"))
    mine = turn("more", conversation=conversation.id)
    run_turn(store, mine)
    failed = turn("failed", conversation=conversation.id)
    store.responses.begin(failed, {})
    store.responses.finish(failed, {}, None, is_kept=False)
    store.delete("a", conversation.id)
    assert status_of(lambda: store.get("a", conversation.id)) == 404
    assert status_of(lambda: store.responses.get("a", mine.id)) == 404
    assert rows(database) == [0, 0, 0]


def test_deleting_a_response_deletes_its_text_unless_a_conversation_holds_it(store: Stores) -> None:
    conversation = store.create("a", {})
    inside, alone = turn("in", conversation=conversation.id), turn("alone")
    for each in (inside, alone):
        run_turn(store, each)
        store.responses.delete("a", each.id)
        assert status_of(lambda each=each: store.responses.get("a", each.id)) == 404
    assert texts_of(store, conversation.id) == ["in", "Yes."]
    assert status_of(lambda: store.responses.begin(turn("x", previous=alone.id), {})) == 404


def test_a_chain_may_start_from_an_earlier_state_of_a_conversation(store: Stores) -> None:
    conversation = store.create("a", {}, items_saying("0", "zero"))
    first = turn("1", conversation=conversation.id)
    run_turn(store, first, "one")
    run_turn(store, turn("2", conversation=conversation.id), "two")
    aside = turn("aside", previous=first.id)
    assert run_turn(store, aside, "A") == ["0", "zero", "1", "one"]
    assert run_turn(store, turn("x", previous=aside.id)) == ["0", "zero", "1", "one", "aside", "A"]
    assert texts_of(store, conversation.id) == ["0", "zero", "1", "one", "2", "two"]


def test_a_chain_with_a_missing_response_is_refused(store: Stores) -> None:
    first = turn("1")
    run_turn(store, first)
    second = turn("2", previous=first.id)
    run_turn(store, second)
    store.responses.delete("a", first.id)
    assert status_of(lambda: store.responses.begin(turn("3", previous=second.id), {})) == 404


def test_a_conversation_is_locked_during_an_answer_and_unlocked_after_it(store: Stores) -> None:
    conversation = store.create("a", {}, items_saying("Hi", "Hello"))
    item = items_of(store, conversation.id)[0].id
    first = turn("first", conversation=conversation.id)
    store.responses.begin(first, {"status": "in_progress"})
    assert status_of(lambda: store.responses.begin(turn("second", conversation=conversation.id), {})) == 409
    assert status_of(lambda: store.add_items("a", conversation.id, items_saying("x"))) == 409
    assert status_of(lambda: store.delete_item("a", conversation.id, item)) == 409
    assert texts_of(store, conversation.id) == ["Hi", "Hello"], "a question without an answer is not there yet"
    assert status_of(lambda: store.responses.begin(turn("x", previous=first.id), {})) == 409
    store.update("a", conversation.id, {"title": "renamed meanwhile"})
    store.responses.finish(first, {"status": "completed"}, Item.new("assistant", ["done"]), is_kept=True)
    assert run_turn(store, turn("second", conversation=conversation.id)) == ["Hi", "Hello", "first", "done"]


def test_a_refusal_of_a_locked_conversation_says_when_its_lease_ends(database: Database) -> None:
    store = Stores(database, lease_seconds=7)
    conversation = store.create("a", {})
    first = turn("first", conversation=conversation.id)
    store.responses.begin(first, {})
    for call, code in (
        (lambda: store.responses.begin(turn("second", conversation=conversation.id), {}), "conversation_locked"),
        (lambda: store.add_items("a", conversation.id, items_saying("x")), "conversation_locked"),
        (lambda: store.responses.begin(turn("x", previous=first.id), {}), "response_pending"),
    ):
        with pytest.raises(Refused) as caught:
            call()
        assert (caught.value.status, caught.value.code) == (409, code)
        assert 1 <= int(caught.value.headers["retry-after"]) <= 7


def test_only_one_of_several_simultaneous_turns_is_accepted(store: Stores) -> None:
    conversation = store.create("a", {})
    outcomes: list[int] = []
    barrier = threading.Barrier(6)

    def begin() -> None:
        barrier.wait()
        try:
            store.responses.begin(turn("me", conversation=conversation.id), {})
            outcomes.append(200)
        except Refused as refused:
            outcomes.append(refused.status)

    threads = [threading.Thread(target=begin) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [200, *[409] * 5]


def test_a_discarded_turn_leaves_nothing_behind(store: Stores) -> None:
    conversation = store.create("a", {})
    dropped = turn("no", conversation=conversation.id)
    store.responses.begin(dropped, {})
    store.responses.discard(dropped)
    assert status_of(lambda: store.responses.get("a", dropped.id)) == 404
    assert run_turn(store, turn("yes", conversation=conversation.id)) == []


def test_an_expired_lease_frees_the_conversation_and_marks_the_response_lost(database: Database) -> None:
    store = Stores(database, lease_seconds=1)
    conversation = store.create("a", {})
    dead = turn("dead", conversation=conversation.id)
    store.responses.begin(dead, {"status": "in_progress"})
    for _ in range(3):
        time.sleep(0.4)
        store.responses.renew_leases([dead.id])
    assert status_of(lambda: store.responses.begin(turn("early", conversation=conversation.id), {})) == 409
    assert not store.responses.get("a", dead.id)[0].is_lost
    time.sleep(1.1)
    assert store.responses.get("a", dead.id)[0].is_lost
    next_ = turn("next", conversation=conversation.id)
    assert store.responses.begin(next_, {}) == []
    # It was not dead, only late: the conversation belongs to the other turn now.
    late = Item.new("assistant", ["late"])
    assert status_of(lambda: store.responses.finish(dead, {}, late, is_kept=True)) == 409
    store.responses.finish(next_, {}, Item.new("assistant", ["next one"]), is_kept=True)
    assert texts_of(store, conversation.id) == ["next", "next one"]


def test_responses_without_a_conversation_are_deleted_after_response_days(database: Database) -> None:
    store = Stores(database, StorageLimits(response_days=30))
    conversation = store.create("a", {})
    old, in_conversation, new = turn("old"), turn("kept", conversation=conversation.id), turn("new")
    for each in (old, in_conversation, new):
        run_turn(store, each)
    with database.write_session() as session:
        for row in session.query(StoredResponse).where(StoredResponse.id.in_([old.id, in_conversation.id])):
            row.created_at -= 31 * 86400
    run_turn(Stores(database, StorageLimits(response_days=30)), turn("today"))
    assert status_of(lambda: store.responses.get("a", old.id)) == 404
    assert texts(store.responses.get("a", in_conversation.id)[1]) == ["Yes."]
    assert texts(store.responses.get("a", new.id)[1]) == ["Yes."]
    with database.read_session() as session:
        count = (
            session.connection()
            .exec_driver_sql("SELECT COUNT(*) FROM items WHERE CAST(texts AS TEXT) LIKE '%%old%%'")
            .scalar()
        )
    assert count == 0
