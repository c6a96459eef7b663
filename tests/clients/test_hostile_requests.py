"""Requests that mean harm get an answer or a clear error, and others are answered meanwhile."""

from __future__ import annotations

import importlib
import threading
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from corral.template import Template
from tests.clients.server import ANSWER, every_route
from tests.serving.conftest import JSON, RunningServer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The requests, which the benchmark of stalls sends too."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("serve_fuzz")


@pytest.fixture
def server(tiny_template: Template) -> Generator[RunningServer]:
    with every_route(tiny_template) as running:
        yield running


def check(name: str, status: int, content: Any, headers: Any) -> None:
    """What every response to them is."""
    if status == 503:
        assert int(headers["retry-after"]) >= 1, name
    else:
        assert 200 <= status < 500, (name, content)
    if status >= 400:
        error = content["error"]
        assert set(error) == {"message", "type", "param", "code"}, name
        assert 0 < len(error["message"]) < 5000, name


@pytest.mark.parametrize("scale", [0.2, pytest.param(1.0, marks=pytest.mark.full)])
def test_hostile_requests_are_answered_and_do_not_stop_others(scale: float, server: RunningServer, fuzz: Any) -> None:
    conversation: str = server.call("POST", fuzz.CONVERSATIONS, {"items": fuzz.prepare(20)})[1]["id"]
    statuses: Counter[int] = Counter()
    others: list[str] = []
    is_over = threading.Event()

    def ask_on() -> None:
        while not is_over.is_set() or not others:
            status, content, _ = server.chat(stream=True)
            assert status == 200
            others.append("".join(each["choices"][0]["delta"].get("content", "") for each in content[:-1]))

    other = threading.Thread(target=ask_on)
    other.start()
    try:
        for each in fuzz.requests("m", scale):
            content = each.content.replace(b"{conversation}", conversation.encode())
            path = each.path.replace("{conversation}", conversation)
            status, answer, headers = server.call(each.method, path, content, JSON)
            check(each.name, status, answer, headers)
            statuses[status] += 1
    finally:
        is_over.set()
        other.join()
    assert set(others) == {ANSWER}
    assert statuses.total() > 150
    assert min(statuses[200], statuses[400]) > 15, statuses
