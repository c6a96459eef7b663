"""Who lists which conversations on a server without keys, over real sockets, with two clients."""

from __future__ import annotations

from http.cookies import SimpleCookie
from typing import Any

import pytest
from sqlalchemy import select

from corral.serving.admission import Admission
from corral.serving.database import Database
from corral.serving.keys import KeyStore
from corral.serving.store import StoredResponse
from tests.serving.conftest import JSON, RunningServer, Serve, bearer, openai_client

PATH = "/v1/conversations"


@pytest.fixture
def server(serve: Serve, sqlite: Database) -> RunningServer:
    return serve.with_store("Hello", sqlite)


def new_conversation(server: RunningServer, headers: Any = JSON) -> tuple[str, Any]:
    """(the id of a new conversation, the headers of the response)"""
    status, body, received = server.call("POST", PATH, {}, {**JSON, **headers})
    assert status == 200, body
    return body["id"], received


def listed(server: RunningServer, headers: Any) -> list[str]:
    status, body, _ = server.call("GET", PATH, headers=headers)
    assert status == 200, body
    return [each["id"] for each in body["data"]]


def test_each_client_lists_its_own_conversations(server: RunningServer) -> None:
    first, headers = new_conversation(server)
    one = {"x-corral-client": headers["x-corral-client"]}
    other_first, headers = new_conversation(server)
    other = {"x-corral-client": headers["x-corral-client"]}
    assert one != other
    second, headers = new_conversation(server, one)
    assert "x-corral-client" not in headers, "it has one"
    assert listed(server, one) == [second, first]
    assert listed(server, other) == [other_first]
    assert listed(server, {}) == [], "a new client has none"
    status, body, _ = server.call("GET", f"{PATH}?after={other_first}", headers=one)
    assert (status, body["error"]["param"]) == (400, "after")


def test_a_browser_keeps_its_token_as_a_cookie_that_scripts_cannot_read(server: RunningServer) -> None:
    id_, headers = new_conversation(server)
    cookie = SimpleCookie(headers["set-cookie"])["corral_client"]
    assert cookie.value == headers["x-corral-client"]
    assert len(cookie.value) == 32, "128 bits"
    assert cookie["httponly"]
    assert (cookie["samesite"], cookie["path"]) == ("lax", "/v1")
    assert listed(server, {"cookie": f"a=b; corral_client={cookie.value}"}) == [id_]
    for bad in ("", "x" * 32, cookie.value * 2, cookie.value.upper() + "A"):
        assert listed(server, {"cookie": f"corral_client={bad}"}) == []


def test_the_id_of_a_conversation_is_the_key_to_it(server: RunningServer) -> None:
    """OpenAI's client sends no token, and goes on with ids."""
    with openai_client(server.url) as one, openai_client(server.url) as other:
        conversation = one.conversations.create()
        response = one.responses.create(model="m", input="Hi", conversation=conversation.id)
        chained = other.responses.create(model="m", input="Hi")
        assert other.responses.create(model="m", input="And?", previous_response_id=chained.id).output_text
        assert one.responses.retrieve(response.id).output_text == "Hello"
        assert len(one.conversations.items.list(conversation.id).data) == 2
        other.conversations.delete(conversation.id)
    assert server.call("GET", f"{PATH}/{conversation.id}")[0] == 404


def test_responses_are_counted_by_client_too(server: RunningServer, sqlite: Database) -> None:
    def respond(headers: Any = JSON, **place: str) -> Any:
        status, body, received = server.call(
            "POST", "/v1/responses", {"model": "m", "input": "Hi", **place}, {**JSON, **headers}
        )
        assert status == 200, body
        return received

    conversation, headers = new_conversation(server)
    theirs = {"x-corral-client": headers["x-corral-client"]}
    respond(conversation=conversation)
    respond(theirs)
    new = respond()["x-corral-client"]
    respond({"cookie": f"corral_client={new}"})
    with sqlite.read_session() as session:
        ids = list(session.scalars(select(StoredResponse.client).order_by(StoredResponse.number)))
    assert ids[0] == ids[1], "in a conversation it belongs to who began that"
    assert ids[2] == ids[3]
    assert len({*ids}) == 2


def test_with_keys_the_key_says_who_asks(serve: Serve, sqlite: Database) -> None:
    keys = KeyStore(sqlite)
    alice, bob = bearer(keys.add("alice")[1]), bearer(keys.add("bob")[1])
    server = serve.with_store("Hello", sqlite, Admission(keys=keys))
    id_, headers = new_conversation(server, alice)
    assert "set-cookie" not in headers
    assert "x-corral-client" not in headers
    assert listed(server, {**alice, "x-corral-client": "0" * 32}) == [id_]
    assert listed(server, bob) == []
    assert server.call("GET", f"{PATH}/{id_}", headers=bob)[0] == 404
