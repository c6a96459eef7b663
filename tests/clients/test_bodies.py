"""What real clients and tools send is answered, in the form that OpenAI's types describe."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from tests.clients import shapes
from tests.clients.documented import ANSWERED, REFUSED
from tests.clients.programs_run import CLIENTS
from tests.serving.conftest import RunningServer

RECORDED = Path(__file__).with_name("recorded")


@pytest.mark.parametrize("name", ANSWERED)
def test_what_a_tool_sends_is_answered(name: str, server: RunningServer) -> None:
    path, body = ANSWERED[name]
    status, content, _ = server.call("POST", path, body)
    assert status == 200, content
    shapes.check(path, content)


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_the_meaning_of_the_answer_is_refused_by_name(name: str, server: RunningServer) -> None:
    path, body, param = REFUSED[name]
    status, content, _ = server.call("POST", path, body)
    assert status == 400, content
    assert content["error"]["type"] == "invalid_request_error"
    assert str(content["error"]["param"]).startswith(param), content
    assert content["error"]["param"].split("[")[0] in content["error"]["message"]


def scenarios(client: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """The recorded requests of a client, by scenario."""
    entries = json.loads((RECORDED / f"{client}.json").read_text("utf-8"))
    return [(name, [*group]) for name, group in groupby(entries, key=lambda entry: entry["scenario"])]


CASES = [
    pytest.param(name, entries, id=f"{client} {name}") for client in CLIENTS for name, entries in scenarios(client)
]


def test_every_client_is_recorded() -> None:
    assert {path.stem for path in RECORDED.iterdir()} == set(CLIENTS)
    assert len(CASES) > 70


@pytest.mark.parametrize(("name", "entries"), CASES)
def test_what_a_client_sent_is_answered(name: str, entries: list[dict[str, Any]], server: RunningServer) -> None:
    ids: dict[str, str] = {}
    for entry in entries:
        text = json.dumps(entry)
        for placeholder, id_ in ids.items():
            text = text.replace(placeholder, id_)
        sent: dict[str, Any] = json.loads(text)
        status, content, _ = server.call(sent["method"], sent["path"], sent.get("body"), sent["headers"])
        if name.startswith("errors"):
            assert status in (400, 404)
            assert set(content["error"]) == {"message", "type", "param", "code"}
            continue
        assert status == 200, (sent, content)
        shapes.check(sent["path"], content)
        if "id" in entry:
            first = content[0] if isinstance(content, list) else content
            ids[entry["id"]] = (first.get("response") or first)["id"]
