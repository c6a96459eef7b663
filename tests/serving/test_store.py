"""Who has to make room for others where all clients share what a server stores: floods of real rows on small limits."""

from __future__ import annotations

import pytest
from sqlalchemy import func, select

from corral.serving.database import Database
from corral.serving.errors import Refused
from corral.serving.store import HOUR, Page, StorageLimits, StoredConversation, StoredResponse
from tests.serving.test_conversation_store import items_of, items_saying
from tests.serving.test_response_store import Stores, run_turn, turn

LIMITS = StorageLimits(max_conversations=20, max_responses=20)


def held(database: Database, kind: type[StoredConversation | StoredResponse]) -> dict[str, int]:
    """How much each client has."""
    with database.read_session() as session:
        query = select(kind.client, func.count()).where(kind.owner == "").group_by(kind.client)
        return dict(session.execute(query).tuples().all())


def make_older(database: Database, client: str, hours: int = 1) -> None:
    """Let a client have come so many hours ago."""
    with database.write_session() as session:
        for kind in (StoredConversation, StoredResponse):
            for row in session.scalars(select(kind).where(kind.client == client)):
                row.created_at -= hours * HOUR


def create(store: Stores, client: str, size: int = 0) -> str:
    return store.create("", {}, items_saying("x" * size) if size else (), client).id


def respond(store: Stores, client: str) -> str:
    each = turn("x", owner="", client=client)
    run_turn(store, each)
    return each.id


def test_a_flood_of_conversations_costs_the_client_that_sends_it(database: Database) -> None:
    store = Stores(database, LIMITS)
    hers = [create(store, "alice") for _ in range(3)]
    for _ in range(17):
        create(store, "flood")
    for _ in range(30):
        with pytest.raises(Refused, match="at most 20 conversations are kept: delete some"):
            create(store, "flood")
    assert held(database, StoredConversation) == {"alice": 3, "flood": 17}, (
        "nothing is deleted while nobody else needs room"
    )
    hers += [create(store, "alice") for _ in range(6)]
    create(store, "bob")
    assert held(database, StoredConversation) == {"alice": 9, "bob": 1, "flood": 10}
    assert {each.id for each in store.list_page("", Page(limit=100), "alice")[0]} == set(hers)


def test_a_flood_from_ever_new_clients_costs_those_who_came_with_it(database: Database) -> None:
    store = Stores(database, LIMITS)
    hers = [create(store, "alice") for _ in range(3)]
    make_older(database, "alice")
    for number in range(100):
        create(store, f"flood-{number}")
    assert {each.id for each in store.list_page("", Page(limit=100), "alice")[0]} == set(hers)
    assert sum(held(database, StoredConversation).values()) == 20
    for _ in range(7):
        create(store, "alice")
        create(store, "one more of the flood")
    assert held(database, StoredConversation)["alice"] >= 9, "half of the room, as much as all of the flood"
    assert create(store, "newcomer"), "even during a flood"


@pytest.mark.parametrize("each", ["of one client", "of ever new clients"])
def test_a_flood_of_responses_leaves_those_of_other_clients(each: str, database: Database) -> None:
    store = Stores(database, LIMITS)
    hers = [respond(store, "alice") for _ in range(5)]
    make_older(database, "alice")
    flood = [respond(store, "flood" if each == "of one client" else f"flood-{number}") for number in range(60)]
    assert [store.responses.get("", id_)[0].client for id_ in hers] == ["alice"] * 5
    assert store.responses.get("", flood[-1])[1], "the newest of the flood"
    assert sum(held(database, StoredResponse).values()) == 20


def test_a_flood_of_bytes_costs_the_client_that_sends_it(database: Database) -> None:
    store = Stores(database, StorageLimits(max_total_bytes=100_000, max_responses_bytes=100_000))
    hers = [create(store, "alice", 3000) for _ in range(5)]
    make_older(database, "alice")
    for _ in range(14):
        create(store, "flood", 5000)
    with pytest.raises(Refused) as caught:
        create(store, "flood", 5000)
    assert caught.value.code == "storage_full"
    for number in range(50):
        create(store, f"flood-{number}", 100)
    assert {each.id for each in store.list_page("", Page(limit=100), "alice")[0]} == set(hers)
    store.add_items("", hers[0], items_saying("y" * 20_000))
    assert len(items_of(store, hers[0], "")) == 2, "she has room, and the flood has less"


def test_a_conversation_that_is_being_answered_makes_no_room(database: Database) -> None:
    store = Stores(database, StorageLimits(max_conversations=3))
    pending = turn("x", owner="", conversation=create(store, "flood"))
    store.responses.begin(pending, {})
    later = [create(store, "flood") for _ in range(2)]
    with pytest.raises(Refused):
        create(store, "flood")
    for client in ("alice", "bob"):
        create(store, client)
    assert held(database, StoredConversation) == {"alice": 1, "bob": 1, "flood": 2}, (
        "one more than the limit, for a moment"
    )
    assert store.get("", later[1])
    store.responses.finish(pending, {}, None, is_kept=True)
    assert store.get("", str(pending.conversation)).items == 1


def test_what_is_kept_with_a_key_is_never_deleted_for_others(database: Database) -> None:
    store = Stores(database, LIMITS)
    mine = store.create("a", {}).id
    for number in range(50):
        create(store, f"flood-{number}")
    assert store.get("a", mine)
    for _ in range(19):
        store.create("a", {})
    with pytest.raises(Refused, match="at most 20 conversations are kept: delete some"):
        store.create("a", {})
