"""Keys in a database: shown once, kept as a hash, taken back, counted."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

import pytest

from corral.errors import InputError
from corral.serving.database import Database
from corral.serving.keys import KeyStore, KeyUsage, Quota, SecretKeys, hash_key, open_keys


@pytest.fixture
def keys(database: Database) -> KeyStore:
    return KeyStore(database)


def test_a_key_is_stored_with_the_hash_of_its_secret(keys: KeyStore) -> None:
    key, secret = keys.add("alice")
    (kept,) = keys.all()
    assert kept == key
    assert kept.is_active
    assert kept.digest == hash_key(secret)
    other = keys.add("bob")[1]
    for wrong in (other, secret[:-1], f"{secret}a", secret.swapcase(), "", f"corral_{kept.id}_{'A' * 43}"):
        assert hash_key(wrong) != kept.digest


def test_the_database_contains_no_secret(tmp_path: Path) -> None:
    with contextlib.closing(Database(f"sqlite:///{tmp_path / 'a.db'}")) as database:
        key, secret = KeyStore(database).add("alice")
    random_part = secret.rpartition(f"{key.id}_")[2]
    assert len(random_part) == 43, "256 bits in base64"
    files = [file.read_bytes() for file in tmp_path.iterdir()]
    assert any(key.digest.encode() in data for data in files)
    assert not any(random_part.encode() in data for data in files)
    assert hash_key(secret) == key.digest


def test_each_key_keeps_its_own_quota_and_expiry(keys: KeyStore) -> None:
    quota = Quota(requests_per_minute=5, tokens_per_day=1000, at_once=2)
    keys.add("alice", quota, expires=int(time.time()) + 1000, is_admin=True)
    keys.add("bob")
    alice, bob = sorted(keys.all(), key=lambda key: key.name)
    assert (alice.name, alice.quota, alice.is_active) == ("alice", quota, True)
    assert (bob.name, bob.quota, bob.expires) == ("bob", Quota(), None)
    assert (alice.is_admin, bob.is_admin) == (True, False)


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
    assert next(key for key in keys.all() if not key.is_active).digest == hash_key(secret)
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


def test_a_revoked_or_expired_key_is_deleted_with_its_usage(keys: KeyStore) -> None:
    alice, bob = keys.add("alice")[0], keys.add("bob")[0]
    keys.add("carol", expires=int(time.time()) - 1)
    keys.add_usage("2026-01-01", {alice.id: KeyUsage(1, 10, 5), bob.id: KeyUsage(1, 1, 1)})
    with pytest.raises(InputError, match="the key 'alice' still works"):
        keys.find_inactive("alice")
    with pytest.raises(InputError, match="there is no key named 'dave'"):
        keys.find_inactive("dave")
    keys.revoke("alice")
    keys.delete(keys.find_inactive("alice"))
    keys.delete(keys.find_inactive("carol"))
    assert [key.name for key in keys.all()] == ["bob"]
    assert keys.usage_on("2026-01-01") == {bob.id: KeyUsage(1, 1, 1)}
    keys.add_usage("2026-01-01", {alice.id: KeyUsage(1, 2, 3), bob.id: KeyUsage(1, 1, 1)})
    assert keys.usage_on("2026-01-01") == {bob.id: KeyUsage(2, 2, 2)}, "what a running request of hers used is dropped"


def test_of_several_revoked_keys_of_one_name_one_is_named_by_its_id(keys: KeyStore) -> None:
    ids: list[str] = []
    for _ in range(2):
        ids.append(keys.add("alice")[0].id)
        keys.revoke("alice")
    with pytest.raises(InputError, match="2 revoked keys are named 'alice'"):
        keys.find_inactive("alice")
    assert keys.find_inactive(ids[1]).id == ids[1]


SECRET = "a-secret-of-an-operator"


def test_keys_are_read_from_a_file_again_and_again(tmp_path: Path, keys: KeyStore) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# for programs\n\nalice={SECRET}\nprometheus={SECRET}-of-its-own admin\n")
    secrets = SecretKeys(file, store=keys)
    alice, prometheus = secrets.all()
    assert (alice.name, alice.digest, alice.is_active, alice.is_admin) == ("alice", hash_key(SECRET), True, False)
    assert (prometheus.name, prometheus.is_admin) == ("prometheus", True)
    bob = keys.add("bob")[0]
    file.write_text(f"alice={SECRET}2\n")
    assert [key.name for key in secrets.all()] == ["alice", "bob"]
    assert secrets.all()[0].digest == hash_key(f"{SECRET}2")
    assert secrets.all()[0].id == alice.id, "what is hers stays hers"
    secrets.add_usage("2026-01-01", {alice.id: KeyUsage(1, 2, 3), bob.id: KeyUsage(1, 1, 1)})
    assert secrets.usage_on("2026-01-01") == {bob.id: KeyUsage(1, 1, 1)}


def test_the_environment_and_a_file_add_to_the_keys_of_a_database(
    tmp_path: Path, sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CORRAL_API_KEYS", raising=False)
    assert open_keys(None) is None
    KeyStore(sqlite).add("carol")
    (tmp_path / "keys").write_text(f"alice={SECRET}")
    monkeypatch.setenv("CORRAL_API_KEYS", f"bob={SECRET}2")
    for database, file, names in (
        (None, None, ["bob"]),
        (sqlite, None, ["bob", "carol"]),
        (sqlite, tmp_path / "keys", ["bob", "alice", "carol"]),
    ):
        source = open_keys(database, file)
        assert source is not None
        assert [key.name for key in source.all()] == names


def test_keys_are_read_from_lines_without_a_file_or_a_database() -> None:
    secrets = SecretKeys(lines=f"alice={SECRET}\nbob={SECRET}2")
    assert [key.name for key in secrets.all()] == ["alice", "bob"]
    secrets.add_usage("2026-01-01", {secrets.all()[0].id: KeyUsage(1, 2, 3)})
    assert secrets.usage_on("2026-01-01") == {}


def test_a_bad_line_leaves_the_last_good_keys_and_is_logged_once_for_each_change(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"alice={SECRET}\n")
    secrets = SecretKeys(file)
    assert [key.name for key in secrets.all()] == ["alice"]
    for number, bad in enumerate((f"bob={SECRET}2\nalice=short\n", f"bob={SECRET}2\n\nalice=too-short\n", None), 1):
        file.unlink() if bad is None else file.write_text(bad)
        for _ in range(3):
            assert [key.name for key in secrets.all()] == ["alice"], "not half of a file"
        assert len(caplog.messages) == number
    assert f"this line holds no key ({file}, line 2); the keys read before stay valid: write NAME=SECRET" in caplog.text
    assert f"({file}, line 3)" in caplog.text
    assert "No such file" in caplog.text
    assert SECRET not in caplog.text
    file.write_text(f"bob={SECRET}2\n")
    assert [key.name for key in secrets.all()] == ["bob"], "a good file takes keys back"
    file.write_text("")
    assert secrets.all() == []
    assert len(caplog.messages) == 3


def test_a_bad_line_in_the_environment_is_refused_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORRAL_API_KEYS", f"alice={SECRET}\nbob")
    with pytest.raises(InputError, match="holds no key") as caught:
        open_keys(None)
    assert caught.value.where == "environment variable CORRAL_API_KEYS, line 2"


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (SECRET, "holds no key"),
        ("bob=short", "holds no key"),
        (f"bob={SECRET} {SECRET}", "holds no key"),
        (f"bob={SECRET} root", "holds no key"),
        (f"b/b={SECRET}", "cannot be the name"),
        (f"alice={SECRET}3", "'alice' has two keys"),
        (f"bob={SECRET}\u00e9", "holds no key"),
    ],
)
def test_a_bad_line_is_named_and_never_quoted(line: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"alice={SECRET}\n{line}\n")
    with pytest.raises(InputError, match=what) as caught:
        SecretKeys(tmp_path / "keys").all()
    assert "line 2" in str(caught.value.where)
    assert SECRET not in str(caught.value)


def test_a_file_of_keys_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        SecretKeys(tmp_path / "none").all()
    (tmp_path / "binary").write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match="not text"):
        SecretKeys(tmp_path / "binary").all()
    (tmp_path / "large").write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(InputError, match="at most 1048576 bytes"):
        SecretKeys(tmp_path / "large").all()
