"""The process around the routes: addresses that cannot be used, and an end in bounded time."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time

import pytest

from corral.answerer import Answerer
from corral.errors import InputError
from corral.serving.completions import Served
from corral.serving.server import http_server, serve
from corral.template import Template
from tests.serving.conftest import Endless


def refused(host: str = "127.0.0.1", port: int = 0, *, insecure: bool = False) -> InputError:
    """The address is tried before the model: a name that is no model shows that nothing was loaded."""
    with pytest.raises(InputError) as caught:
        serve("nowhere", host=host, port=port, engine=None, name=None, insecure=insecure)
    return caught.value


def test_a_port_in_use_and_one_that_is_none_are_said_before_a_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "in use" in refused(port=port).what
        assert str(port) in str(refused(port=port).where)
    for port in (-1, 65536):
        assert "is not a port" in refused(port=port).what


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_an_address_that_others_reach_needs_insecure(host: str) -> None:
    error = refused(host)
    assert "keys" in error.what
    assert "--insecure" in str(error.hint)


def test_insecure_takes_it() -> None:
    assert "nowhere" in refused("0.0.0.0", insecure=True).what, "the address was taken: the model is what is missing"


def test_a_host_that_is_not_this_machines_is_said() -> None:
    assert "no-such-host.invalid" in refused("no-such-host.invalid").what
    assert "address" in refused("192.0.2.1", insecure=True).what
    assert "''" in refused("").what


def test_loopback_addresses_are_taken() -> None:
    for host in ("127.0.0.1", "localhost", "127.8.8.8"):
        assert "nowhere" in refused(host).what


def test_answers_that_do_not_end_are_cancelled_after_the_grace(tiny_template: Template) -> None:
    endless = Endless()
    server = http_server(Served(Answerer(endless.engine, tiny_template), "m"))
    assert server.config.timeout_graceful_shutdown
    server.config.timeout_graceful_shutdown = 1
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    connection = http.client.HTTPConnection("127.0.0.1", listener.getsockname()[1])
    body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "count"}]}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    assert endless.began.wait(30)
    server.should_exit = True
    thread.join(30)
    connection.close()
    assert not thread.is_alive()
    then = endless.drawn
    time.sleep(0.1)
    assert endless.drawn == then
