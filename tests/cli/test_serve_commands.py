"""`corral keys`, and the arguments of `corral serve`, in this process."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from corral.cli import main
from corral.serving import server
from corral.serving.admission import ServerLimits
from corral.serving.conversation_store import ConversationStore
from corral.serving.database import Database
from corral.serving.keys import KeyStore, KeyUsage, hash_key, today
from corral.serving.model_loading import ModelOptions
from corral.serving.protocol import RequestLimits
from corral.serving.store import Item, Page
from tests.answering.test_settings import write_run


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'a.db'}"


def test_a_key_is_added_shown_once_listed_and_revoked(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    database = ["--database", url]
    assert main(["keys", "add", "alice", "--tokens-per-day", "1000", "--at-once", "2", "--days", "7", *database]) == 0
    out, message = capsys.readouterr()
    secret = out.strip()
    assert secret.startswith("corral_")
    assert "shown only once" in message
    with contextlib.closing(Database(url)) as opened:
        (key,) = KeyStore(opened).all()
        assert key.digest == hash_key(secret)
        assert (key.quota.tokens_per_day, key.quota.at_once) == (1000, 2)
        assert key.expires == key.created + 7 * 86400
        KeyStore(opened).add_usage(today(), {key.id: KeyUsage(1, 700, 34)})
    assert main(["keys", *database]) == 0
    listed, _ = capsys.readouterr()
    for part in ("alice", key.id, "works", "1,000", "734"):
        assert part in listed
    assert secret not in listed
    assert main(["keys", "revoke", "alice", *database]) == 0
    assert key.id in capsys.readouterr().out
    assert main(["keys", "list", "--json", *database]) == 0
    (row,) = json.loads(capsys.readouterr().out)["keys"]
    assert (row["name"], row["works"], row["tokens_today"]) == ("alice", False, 734)
    assert row["revoked"]


def test_a_revoked_key_is_deleted_with_its_usage_and_conversations(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    database = ["--database", url]
    for name in ("alice", "bob"):
        assert main(["keys", "add", name, "--admin", *database]) == 0
    with contextlib.closing(Database(url)) as opened:
        alice, bob = sorted(KeyStore(opened).all(), key=lambda key: key.name)
        assert alice.is_admin
        store = ConversationStore(opened)
        for number in range(120):
            store.create(alice.id, {}, [Item.new("user", ["Hello"])] * (number == 7))
        store.create(bob.id, {})
        KeyStore(opened).add_usage(today(), {alice.id: KeyUsage(1, 700, 34)})
        assert main(["keys", "delete", "alice", *database]) == 2
        assert "still works" in capsys.readouterr().err
        assert main(["keys", "revoke", "alice", *database]) == 0
        capsys.readouterr()
        assert main(["keys", "delete", "alice", *database]) == 0
        assert "120 conversations and 0 other responses" in capsys.readouterr().out
        assert [key.name for key in KeyStore(opened).all()] == ["bob"]
        assert KeyStore(opened).usage_on(today()) == {}
        assert store.list_page(alice.id, Page()) == ([], False)
        assert len(store.list_page(bob.id, Page())[0]) == 1
        with opened.read_session() as session:
            assert session.scalar(select(func.count()).select_from(Item)) == 0
        assert main(["keys", "revoke", "bob", *database]) == 0
        assert main(["keys", "delete", "bob", *database]) == 0
    assert "needs none" in capsys.readouterr().err


def test_adding_the_first_key_warns_that_requests_without_a_key_end(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    received: list[str] = []
    for args in (["add", "alice"], ["add", "bob"], ["revoke", "bob"], ["add", "bob"]):
        assert main(["keys", *args, "--database", url]) == 0
        received.append(capsys.readouterr().err)
    assert ["begun without a key" in words for words in received] == [True, False, False, False]


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["add"], "no key is named"),
        (["delete"], "no key is named"),
        (["delete", "bob"], "there is no key named 'bob'"),
        (["revoke", "bob", "--admin"], "when it is added"),
        (["revoke"], "no key is named"),
        (["revoke", "bob"], "there is no key named 'bob'"),
        (["list", "bob"], "takes no name"),
        (["add", "a b"], "cannot be the name"),
        (["revoke", "bob", "--at-once", "2"], "when it is added"),
    ],
)
def test_a_keys_command_that_makes_no_sense_is_one_clear_error(
    args: list[str], part: str, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", *args, "--database", url]) == 2
    out, error = capsys.readouterr()
    assert part in error
    assert "next:" in error
    assert not out


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the server is started with."""
    arguments: list[Any] = []
    monkeypatch.setattr(server, "serve", lambda *args: arguments.extend(args))
    return arguments


def test_the_arguments_of_serve_reach_the_server(received: list[Any]) -> None:
    command = "serve a b=runs/c --host ::1 --port 1 --engine remote --url http://x/v1 --url http://y/v1 --embeddings"
    command += (
        " --keys-file k --insecure --cors https://a.example --at-once 3 --waiting 0 --max-seconds 1.5 --database none"
    )
    command += " --strict --allowed-host * --root-path /llm --log-level error --keep-alive 80"
    assert main(command.split()) == 0
    urls = ("http://x/v1", "http://y/v1")
    assert received == [
        ModelOptions(["a", "b=runs/c"], "remote", urls, embeddings=True, limits=RequestLimits(strict=True)),
        server.ListenOptions("::1", 1, True, ("https://a.example",), ("*",), "/llm", "error", Path("k")),
        ServerLimits(at_once=3, waiting=0, max_seconds=1.5, keep_alive_seconds=80),
        None,
    ]


def test_without_flags_the_server_has_the_defaults_of_its_own_classes(received: list[Any]) -> None:
    assert main(["serve", "a"]) == 0
    assert received[:3] == [
        ModelOptions(["a"]),
        replace(server.ListenOptions(), cors=()),
        ServerLimits(),
    ]


SERVE = """
[serve]
port = 9000
name = "cook"
cors = ["https://a.example", "https://b.example"]
insecure = true
"""


def test_a_run_is_served_as_its_recipe_says_and_a_flag_comes_first(
    tmp_path: Path, received: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path, SERVE)
    assert main(["serve", run]) == 0
    models, listen = received[:2]
    assert (models.name, listen.port, listen.insecure) == ("cook", 9000, True)
    assert listen.cors == ("https://a.example", "https://b.example")
    assert "insecure = True" in capsys.readouterr().err, "who serves a run of somebody else sees what it sets"
    received.clear()
    assert main(["serve", f"x={run}", "--port", "1", "--no-insecure", "--cors", "https://c.example"]) == 0
    models, listen = received[:2]
    assert (models.specs, listen.port, listen.insecure, listen.cors) == ([f"x={run}"], 1, False, ("https://c.example",))
    received.clear()
    assert main(["serve", run, "other"]) == 0
    assert received[1].port == 8000, "two models have no recipe in common"


def test_the_default_database_of_serve_is_a_file_in_the_users_data_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, received: list[Any]
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    main(["serve", "a"])
    main(["serve", "a", "--database", "postgresql://u@h/d"])
    monkeypatch.setenv("CORRAL_DATABASE", "postgresql://u:secret@h/e")
    main(["serve", "a"])
    expected = [f"sqlite:///{tmp_path / 'corral' / 'server.db'}", "postgresql://u@h/d", "postgresql://u:secret@h/e"]
    assert received[3::4] == expected


@pytest.mark.parametrize(
    "wrong",
    [
        "--waiting -1",
        "--at-once 0",
        "--port 65536",
        "--max-seconds 0",
        "--max-seconds nan",
        "--max-seconds -2",
        "--cors *",
        "--database x",
        "--root-path llm/",
        "--alias =m",
    ],
)
def test_an_impossible_setting_is_refused_by_name(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    flag, value = wrong.split()
    assert main(["serve", "a", f"{flag}={value}"]) == 2
    error = capsys.readouterr().err
    assert f"where: {flag}\n" in error
    assert value in error


def test_a_password_is_refused_and_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    for url in ("postgresql://u:hush@h/d", "postgresql://h/d?user=u&password=hush"):
        assert main(["serve", "a", "--database", url]) == 2
        error = capsys.readouterr().err
        assert "CORRAL_DATABASE" in error
        assert "hush" not in error
