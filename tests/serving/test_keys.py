"""Keys in a database: shown once, kept as a hash, taken back, counted."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

import pytest

from corral.errors import InputError
from corral.serving.database import Database
from corral.serving.keys import KeyStore, KeyUsage, Quota, hash_key, parse_key_id


@pytest.fixture
def keys(database: Database) -> KeyStore:
    return KeyStore(database)


def test_only_a_stored_key_authenticates(keys: KeyStore) -> None:
    key, secret = keys.add("alice")
    (kept,) = keys.all()
    assert kept == key
    assert kept.is_active
    assert parse_key_id(secret) == kept.id
    assert kept.matches(secret)
    other = keys.add("bob")[1]
    for wrong in (other, secret[:-1], f"{secret}a", secret.swapcase(), "", f"corral_{kept.id}_{'A' * 43}"):
        assert not kept.matches(wrong)


def test_the_database_contains_no_secret(tmp_path: Path) -> None:
    with contextlib.closing(Database(f"sqlite:///{tmp_path / 'a.db'}")) as database:
        key, secret = KeyStore(database).add("alice")
    random_part = secret.rpartition(f"{key.id}_")[2]
    assert len(random_part) == 43, "256 bits in base64"
    files = [file.read_bytes() for file in tmp_path.iterdir()]
    assert any(key.digest.encode() in data for data in files)
    assert not any(random_part.encode() in data for data in files)
    assert hash_key(secret) == key.digest


def test_malformed_keys_have_no_id() -> None:
    good = f"corral_{'a' * 12}_{'B' * 43}"
    assert parse_key_id(good) == "a" * 12
    for text in ("", "none", "corral_", good[:-1], good + "=", good.replace("corral", "Corral"), f"{good}\n", "ä" * 63):
        assert parse_key_id(text) is None


def test_each_key_keeps_its_own_quota_and_expiry(keys: KeyStore) -> None:
    quota = Quota(requests_per_minute=5, tokens_per_day=1000, at_once=2)
    keys.add("alice", quota, expires=int(time.time()) + 1000)
    keys.add("bob")
    alice, bob = sorted(keys.all(), key=lambda key: key.name)
    assert (alice.name, alice.quota, alice.is_active) == ("alice", quota, True)
    assert (bob.name, bob.quota, bob.expires) == ("bob", Quota(), None)


def test_a_revoked_key_stays_in_the_list_and_its_name_is_free_again(keys: KeyStore) -> None:
    first, secret = keys.add("alice")
    with pytest.raises(InputError, match="there is a key named 'alice'"):
        keys.add("alice")
    assert keys.revoke("alice").id == first.id
    second, _ = keys.add("alice")
    assert [(key.id, key.is_active) for key in sorted(keys.all(), key=lambda key: key.is_active)] == [
        (first.id, False),
        (second.id, True),
    ]
    assert next(key for key in keys.all() if not key.is_active).matches(secret)
    assert keys.revoke(second.id).name == "alice", "its id does as well"
    with pytest.raises(InputError, match="no key named 'alice'"):
        keys.revoke("alice")


@pytest.mark.parametrize("name", ["", " ", "a b", "-a", "_a", "a" * 65, "a\n", "a/b", "<b>", "0123456789ab"])
def test_an_invalid_key_name_is_refused(name: str, keys: KeyStore) -> None:
    with pytest.raises(InputError, match="cannot be the name"):
        keys.add(name)


def test_names_that_look_like_ids_are_names(keys: KeyStore) -> None:
    for name in ("0123456789a", "0123456789abc", "0123456789aB", "0123456789ag", "Ärzte"):
        assert keys.add(name)[0].name == name


def test_usage_is_summed_by_key_and_day(keys: KeyStore) -> None:
    alice, bob = keys.add("alice")[0].id, keys.add("bob")[0].id
    keys.add_usage("2026-01-01", {alice: KeyUsage(1, 10, 5)})
    keys.add_usage("2026-01-01", {bob: KeyUsage(1, 1, 1), alice: KeyUsage(2, 20, 7)})
    keys.add_usage("2026-01-02", {bob: KeyUsage(1, 3, 4)})
    assert keys.usage_on("2026-01-01") == {alice: KeyUsage(3, 30, 12), bob: KeyUsage(1, 1, 1)}
    assert keys.usage_on("2026-01-02")[bob].tokens == 7
    assert keys.usage_on("2026-01-03") == {}


def test_usage_counted_by_two_servers_at_once_is_not_lost(database_url: str) -> None:
    with contextlib.closing(Database(database_url)) as one, contextlib.closing(Database(database_url)) as other:
        ids = [KeyStore(one).add(name)[0].id for name in ("alice", "bob")]

        def count(database: Database) -> None:
            for _ in range(20):
                KeyStore(database).add_usage("2026-01-01", {id_: KeyUsage(1, 2, 3) for id_ in ids})

        threads = [threading.Thread(target=count, args=(each,)) for each in (one, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert KeyStore(one).usage_on("2026-01-01") == {id_: KeyUsage(40, 80, 120) for id_ in ids}
