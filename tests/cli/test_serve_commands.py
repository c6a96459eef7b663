"""`corral keys`, and the arguments of `corral serve`, in this process."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from corral.cli import main
from corral.serving import server
from corral.serving.admission import ServerLimits
from corral.serving.api_keys import KeyStore, KeyUsage, today
from corral.serving.database import Database


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
        assert key.matches(secret)
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


def test_the_arguments_of_serve_reach_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[Any] = []
    monkeypatch.setattr(server, "serve", lambda *args: received.extend(args))
    command = "serve a b=runs/c --host ::1 --port 1 --engine remote --url http://x/v1 --url http://y/v1 --embeddings"
    command += " --insecure --cors https://a.example --at-once 3 --waiting 0 --max-seconds 1.5 --database none"
    assert main(command.split()) == 0
    urls = ["http://x/v1", "http://y/v1"]
    assert received == [
        server.ModelOptions(["a", "b=runs/c"], "remote", urls, None, True),
        server.ListenOptions("::1", 1, True, ["https://a.example"]),
        ServerLimits(at_once=3, waiting=0, max_seconds=1.5),
        None,
    ]


def test_the_default_database_of_serve_is_a_file_in_the_users_data_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    received: list[Any] = []
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(server, "serve", lambda *args: received.append(args[3]))
    main(["serve", "a"])
    main(["serve", "a", "--database", "postgresql://u@h/d"])
    assert received == [f"sqlite:///{tmp_path / 'corral' / 'server.db'}", "postgresql://u@h/d"]


@pytest.mark.parametrize("wrong", ["--waiting -1", "--max-seconds 0", "--max-seconds nan", "--max-seconds -2"])
def test_impossible_limits_are_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "a", *wrong.split()]) == 2
    assert wrong.split()[0] in capsys.readouterr().err
