"""What stands in front of every route: keys, names, room."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from fastapi.routing import APIRoute
from starlette.routing import Route

from corral.serving import responses_routes
from corral.serving.admission import Admission, ServerLimits
from corral.serving.api_keys import KeyStore, Quota
from corral.serving.app import build_app
from corral.serving.conversation_store import ConversationStore
from corral.serving.database import Database
from corral.serving.generation import ServedModel
from corral.serving.served_models import ServedModels
from tests.serving.conftest import openai_client, serve_in_thread, serve_with_handle
from tests.serving.test_app import ASKED, CHAT, JSON, call, wait_for


def routes_of(app: Any) -> list[tuple[str, str]]:
    """(method, path) of each route, those of routers too."""
    found: list[tuple[str, str]] = []

    def walk(routes: Any) -> None:
        for route in routes:
            if isinstance(route, APIRoute | Route):
                found.extend((method, route.path) for method in route.methods or ())
            else:
                inner = getattr(route, "original_router", None)
                assert inner is not None, route
                walk(inner.routes)

    walk(app.routes)
    return found


def test_every_route_but_health_needs_a_key_even_unknown_ones(
    scripted_model: Callable[..., ServedModel], database: Database
) -> None:
    keys = KeyStore(database)
    _, secret = keys.add("alice")
    models, admission = ServedModels([scripted_model("Hello")]), Admission(keys=keys)
    routers = [responses_routes.build_router(models, ConversationStore(database), admission)]
    routes = routes_of(build_app(models, admission, routers=routers))
    assert len(routes) > 15
    assert {"/metrics", "/openapi.json", CHAT, "/v1/responses", "/v1/conversations"} <= {path for _, path in routes}
    open_ones = {path for _, path in routes if path.startswith("/health")}
    assert open_ones == {"/health", "/health/ready"}
    unknown = [("GET", "/"), ("GET", "/nowhere"), ("POST", "/v1/chat"), ("GET", "/healthy"), ("OPTIONS", CHAT)]
    unknown += [("GET", "/health%2F..%2Fmetrics"), ("GET", "//health"), ("TRACE", "/metrics"), ("GET", "/HEALTH")]
    with serve_with_handle(models, admission, routers=routers) as (url, _):
        for method, path in [*routes, *unknown]:
            for headers in ({}, {"authorization": f"Bearer {secret[:-1]}x"}):
                connection = http.client.HTTPConnection(urlsplit(url).netloc)
                connection.request(method, path, headers=headers)
                answer = connection.getresponse()
                text = answer.read()
                connection.close()
                if path in open_ones:
                    assert answer.status == 200, path
                elif path == "/health%2F..%2Fmetrics":
                    assert answer.status == 404, "it counts as under /health, where there is no such thing"
                else:
                    assert answer.status == 401, (method, path)
                    assert answer.headers["www-authenticate"] == "Bearer"
                    assert answer.headers["x-request-id"]
                    assert method == "HEAD" or json.loads(text)["error"]["code"] == "invalid_api_key"
        good = {**JSON, "authorization": f"Bearer {secret}"}
        assert call(url, "GET", "/v1/models", headers=good)[0] == 200
        assert call(url, "GET", "/nowhere", headers=good)[0] == 404
        asked = json.dumps({"model": "scripted", "messages": ASKED})
        assert call(url, "POST", CHAT, asked, good)[0] == 200


def test_openais_client_is_accepted_with_its_key_until_it_is_revoked(
    scripted_model: Callable[..., ServedModel], database: Database
) -> None:
    keys = KeyStore(database)
    _, secret = keys.add("alice")
    with serve_in_thread(scripted_model("Hello"), admission=Admission(keys=keys)) as url:
        with openai_client(url, api_key=secret) as client:
            answer = client.chat.completions.create(model="scripted", messages=ASKED)
            assert answer.choices[0].message.content == "Hello"
        keys.revoke("alice")
        assert wait_for(
            lambda: call(url, "GET", "/v1/models", headers={"authorization": f"Bearer {secret}"})[0] == 401, 5
        )


def test_a_request_without_a_key_is_refused_before_its_body_is_read(
    scripted_model: Callable[..., ServedModel], database: Database
) -> None:
    keys = KeyStore(database)
    keys.add("alice")
    with serve_in_thread(scripted_model("Hello"), admission=Admission(keys=keys)) as url:
        place = urlsplit(url)
        with socket.create_connection((str(place.hostname), place.port or 0), timeout=30) as raw:
            raw.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n".encode())
            assert raw.recv(12) == b"HTTP/1.1 401"


def test_all_requests_are_bounded_before_their_bodies_are_read(
    scripted_model: Callable[..., ServedModel],
) -> None:
    admission = Admission(ServerLimits(at_once=1, waiting=0))
    most = admission.limits.max_open
    with serve_in_thread(scripted_model("Hello"), admission=admission) as url:
        place = (str(urlsplit(url).hostname), urlsplit(url).port or 0)
        with contextlib.ExitStack() as stack:
            head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{{"
            for _ in range(most):
                stack.enter_context(socket.create_connection(place)).sendall(head.encode())
            assert wait_for(lambda: call(url, "GET", "/v1/models")[0] == 503)
            status, answer, headers = call(url, "GET", "/v1/models")
            assert (status, answer["error"]["code"]) == (503, "server_full")
            assert int(headers["retry-after"]) >= 1
            assert call(url, "GET", "/health")[0] == 200
        assert wait_for(lambda: call(url, "GET", "/v1/models")[0] == 200)


def test_every_request_counts_once_towards_the_quota_per_minute(
    scripted_model: Callable[..., ServedModel], database: Database
) -> None:
    """Also those that are refused: whatever is sent costs something."""
    keys = KeyStore(database)
    models, admission = ServedModels([scripted_model("Hello")]), Admission(keys=keys)
    asked = json.dumps({"model": "scripted", "messages": ASKED})
    kinds: list[tuple[str, str, str | None, int]] = [
        ("POST", CHAT, asked, 200),
        ("POST", CHAT, "{", 400),
        ("POST", "/v1/conversations", "{}", 200),
        ("GET", "/v1/conversations", None, 200),
        ("GET", "/v1/models", None, 200),
        ("GET", "/v1/nowhere", None, 404),
    ]
    secrets = [keys.add(f"key-{i}", Quota(requests_per_minute=3))[1] for i in range(len(kinds))]
    with serve_in_thread(
        models,
        admission=admission,
        routers=[responses_routes.build_router(models, ConversationStore(database), admission)],
    ) as url:
        for secret, (method, path, body, status) in zip(secrets, kinds, strict=True):
            headers = {**JSON, "authorization": f"Bearer {secret}"}
            for _ in range(3):
                assert call(url, method, path, body, headers)[0] == status
            for again in (path, "/v1/conversations"):
                got, answer, sent = call(url, method, again, body, headers)
                assert (got, answer["error"]["code"]) == (429, "rate_limit_exceeded")
                assert 1 <= int(sent["retry-after"]) <= 60
            assert call(url, "GET", "/openapi.json", headers=headers)[0] == 200


def test_a_key_whose_bodies_do_not_arrive_does_not_block_others(
    scripted_model: Callable[..., ServedModel], database: Database
) -> None:
    keys = KeyStore(database)
    slow, other = ({**JSON, "authorization": f"Bearer {keys.add(name)[1]}"} for name in ("slow", "other"))
    admission = Admission(ServerLimits(at_once=2, waiting=3), keys)
    with serve_in_thread(scripted_model("Hello"), admission=admission) as url:
        place = (str(urlsplit(url).hostname), urlsplit(url).port or 0)
        with contextlib.ExitStack() as stack:
            head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9\r\n"
            head += f"authorization: {slow['authorization']}\r\n\r\n{{"
            for _ in range(admission.limits.max_open):
                stack.enter_context(socket.create_connection(place)).sendall(head.encode())
            assert wait_for(lambda: call(url, "GET", "/v1/models", headers=slow)[0] == 503)
            assert call(url, "GET", "/v1/models", headers=other)[0] == 200
