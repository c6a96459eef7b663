"""A server whose engine hangs, is killed or cannot be restarted: what running and new requests get, and how it comes back."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from corral.engines.openvino import OpenVinoEngine
from corral.engines.transformers import TransformersEngine
from corral.errors import InputError
from corral.model.loading import load_model
from tests.engines.conformance import wait_for
from tests.serving.conftest import ASKED, Serve


@pytest.fixture
def engine(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenVinoEngine]:
    monkeypatch.setattr("corral.engines.child_process._IDLE_SECONDS", 1.0)
    engine = OpenVinoEngine(tiny_folder)
    yield engine
    asyncio.run(engine.close())


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_process_that_hangs_or_is_killed_ends_its_requests_and_the_server_is_ready_again_with_the_next(
    number: signal.Signals, engine: OpenVinoEngine, serve: Serve
) -> None:
    server = serve(engine)
    stream = server.client.chat.completions.create(model="m", messages=ASKED, stream=True, max_tokens=400, seed=1)
    next(stream)
    os.kill(engine._child.pid, number)
    with pytest.raises(openai.APIError) as caught:
        list(stream)
    assert caught.value.code == "engine_unavailable"
    status, readiness, headers = server.call("GET", "/health/ready")
    assert (status, readiness["status"]) == (503, "not ready")
    assert int(headers["retry-after"]) >= 1
    (state,) = readiness["engines"]
    reason = "computed nothing" if number == signal.SIGSTOP else "signal 9"
    assert reason in state.pop("reason")
    assert state == {"engine": "openvino", "ready": False, "restarts": engine.restarts}
    assert server.call("GET", "/health")[0] == 200
    status, answer, headers = server.chat()
    assert (status, answer["error"]["code"]) == (503, "engine_unavailable")
    assert int(headers["retry-after"]) >= 1
    wait_for(lambda: server.call("GET", "/health/ready")[0] == 200)
    expected: Any = {"engine": "openvino", "ready": True, "reason": None, "restarts": 1}
    assert server.call("GET", "/health/ready")[1] == {"status": "ready", "engines": [expected]}
    assert server.chat(max_tokens=5)[0] == 200


def test_a_step_of_an_engine_in_the_servers_own_process_that_does_not_end_is_said_to_need_a_restart(
    tiny_folder: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORRAL_STEP_SECONDS", "0.5")
    model: Any = load_model(tiny_folder)
    engine = TransformersEngine(model)
    server = serve(engine)
    assert server.chat(max_tokens=3)[0] == 200
    may_go_on = threading.Event()
    hook = model.register_forward_pre_hook(lambda *_: may_go_on.wait())
    stuck = threading.Thread(target=lambda: server.chat(max_tokens=3))
    stuck.start()
    wait_for(lambda: server.call("GET", "/health/ready")[0] == 503)
    (state,) = server.call("GET", "/health/ready")[1]["engines"]
    assert "restart of this program" in state["reason"]
    assert server.chat()[0] == 503
    may_go_on.set()
    stuck.join()
    hook.remove()
    wait_for(lambda: server.call("GET", "/health/ready")[0] == 200)
    assert server.chat(max_tokens=3)[0] == 200
    asyncio.run(engine.close())


@pytest.mark.parametrize("seconds", ["0", "-1", "a minute", "inf", "nan"])
def test_a_limit_of_steps_that_is_no_number_of_seconds_is_refused(
    seconds: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORRAL_STEP_SECONDS", seconds)
    with pytest.raises(InputError) as caught:
        TransformersEngine(load_model(tiny_folder))
    assert repr(seconds) in caught.value.what
    assert caught.value.where == "CORRAL_STEP_SECONDS"
