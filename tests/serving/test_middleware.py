"""What stands in front of every route: keys, names, room."""

from __future__ import annotations

import contextlib
import http.client
import json
from typing import Any
from urllib.parse import urlsplit

import httpx2
from fastapi.routing import APIRoute
from starlette.routing import Route

from corral.serving import responses
from corral.serving.admission import Admission, ServerLimits
from corral.serving.app import build_app
from corral.serving.database import Database
from corral.serving.keys import KeyStore, Quota
from corral.serving.models import ServedModels
from tests.serving.conftest import ASKED, CHAT, JSON, Serve, bearer, chat_head, openai_client, wait_for

GOOD = {"model": "m", "messages": ASKED}


def routes_of(app: Any) -> list[tuple[str, str]]:
    """(method, path) of each route, those of routers too."""
    methods_and_paths: list[tuple[str, str]] = []

    def walk(routes: Any) -> None:
        for route in routes:
            if isinstance(route, APIRoute | Route):
                methods_and_paths.extend((method, route.path) for method in route.methods or ())
            else:
                inner = getattr(route, "original_router", None)
                assert inner is not None, route
                walk(inner.routes)

    walk(app.routes)
    return methods_and_paths


def test_every_route_but_health_needs_a_key_even_unknown_ones(serve: Serve, database: Database) -> None:
    keys = KeyStore(database)
    _, secret = keys.add("alice")
    models, admission = ServedModels([serve.model("Hello")]), Admission(keys=keys)
    routers = [responses.build_router(models, database, admission)]
    routes = routes_of(build_app(models, admission, routers=routers))
    assert len(routes) > 15
    assert {"/metrics", "/openapi.json", CHAT, "/v1/responses", "/v1/conversations"} <= {path for _, path in routes}
    open_ones = {path for _, path in routes if path.startswith("/health")}
    assert open_ones == {"/health", "/health/ready"}
    unknown = [("GET", "/"), ("GET", "/nowhere"), ("POST", "/v1/chat"), ("GET", "/healthy"), ("OPTIONS", CHAT)]
    unknown += [("GET", "/health%2F..%2Fmetrics"), ("GET", "//health"), ("TRACE", "/metrics"), ("GET", "/HEALTH")]
    server = serve(models, admission, routers=routers)
    for method, path in [*routes, *unknown]:
        for headers in ({}, {"authorization": f"Bearer {secret[:-1]}x"}):
            connection = http.client.HTTPConnection(urlsplit(server.url).netloc)
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
    assert server.call("GET", "/v1/models", headers=bearer(secret))[0] == 200
    assert server.call("GET", "/nowhere", headers=bearer(secret))[0] == 404
    assert server.chat(bearer(secret))[0] == 200


def test_openais_client_is_accepted_with_its_key_until_it_is_revoked(serve: Serve, database: Database) -> None:
    keys = KeyStore(database)
    _, secret = keys.add("alice")
    server = serve("Hello", Admission(keys=keys))
    with openai_client(server.url, api_key=secret) as client:
        answer = client.chat.completions.create(model="m", messages=ASKED)
        assert answer.choices[0].message.content == "Hello"
    keys.revoke("alice")
    assert wait_for(lambda: server.call("GET", "/v1/models", headers=bearer(secret))[0] == 401, 5)


def test_a_request_without_a_key_is_refused_before_its_body_is_read(serve: Serve, keys: KeyStore) -> None:
    keys.add("alice")
    with serve("Hello", Admission(keys=keys)).connect(chat_head("content-length: 100000")) as raw:
        assert raw.recv(12) == b"HTTP/1.1 401"


def test_all_requests_are_bounded_before_their_bodies_are_read(serve: Serve) -> None:
    admission = Admission(ServerLimits(at_once=1, waiting=0))
    server = serve("Hello", admission)
    with contextlib.ExitStack() as stack:
        for _ in range(admission.limits.max_open):
            stack.enter_context(server.connect(chat_head("content-length: 9") + "{"))
        assert wait_for(lambda: server.call("GET", "/v1/models")[0] == 503)
        status, answer, headers = server.call("GET", "/v1/models")
        assert (status, answer["error"]["code"]) == (503, "server_full")
        assert int(headers["retry-after"]) >= 1
        assert server.call("GET", "/health")[0] == 200
    assert wait_for(lambda: server.call("GET", "/v1/models")[0] == 200)


def test_every_request_counts_once_towards_the_quota_per_minute(serve: Serve, database: Database) -> None:
    """Also those that are refused: whatever is sent costs something."""
    keys = KeyStore(database)
    models, admission = ServedModels([serve.model("Hello")]), Admission(keys=keys)
    kinds: list[tuple[str, str, Any, int]] = [
        ("POST", CHAT, GOOD, 200),
        ("POST", CHAT, "{", 400),
        ("POST", "/v1/conversations", "{}", 200),
        ("GET", "/v1/conversations", None, 200),
        ("GET", "/v1/models", None, 200),
        ("GET", "/v1/nowhere", None, 404),
        ("POST", "/tokenize", '{"prompt": "a"}', 200),
    ]
    secrets = [keys.add(f"key-{i}", Quota(requests_per_minute=3))[1] for i in range(len(kinds))]
    server = serve(models, admission, routers=[responses.build_router(models, database, admission)])
    for secret, (method, path, body, expected) in zip(secrets, kinds, strict=True):
        headers = {**JSON, **bearer(secret)}
        for _ in range(3):
            assert server.call(method, path, body, headers)[0] == expected
        for again in (path, "/v1/conversations"):
            status, answer, sent = server.call(method, again, body, headers)
            assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
            assert 1 <= int(sent["retry-after"]) <= 60
        assert server.call("GET", "/openapi.json", headers=headers)[0] == 200


def test_a_key_whose_bodies_do_not_arrive_does_not_block_others(serve: Serve, keys: KeyStore) -> None:
    slow, other = (bearer(keys.add(name)[1]) for name in ("slow", "other"))
    admission = Admission(ServerLimits(at_once=2, waiting=3), keys)
    server = serve("Hello", admission)
    head = chat_head("content-length: 9", f"authorization: {slow['authorization']}")
    with contextlib.ExitStack() as stack:
        for _ in range(admission.limits.max_open):
            stack.enter_context(server.connect(head + "{"))
        assert wait_for(lambda: server.call("GET", "/v1/models", headers=slow)[0] == 503)
        assert server.call("GET", "/v1/models", headers=other)[0] == 200


def test_only_an_admins_key_reads_the_metrics_of_all_keys(serve: Serve, keys: KeyStore) -> None:
    alice, admin = (bearer(keys.add(name, is_admin=name == "admin")[1]) for name in ("alice", "admin"))
    server = serve("Hello", Admission(keys=keys))
    status, answer, _ = server.call("GET", "/metrics", headers=alice)
    assert (status, answer["error"]["code"]) == (403, "not_admin")
    page = httpx2.get(f"{server.url}/metrics", headers=admin)
    assert page.status_code == 200
    assert "corral_requests_waiting" in page.text


def test_responses_say_what_is_left_of_a_quota(serve: Serve, keys: KeyStore) -> None:
    quota = Quota(requests_per_minute=3, tokens_per_day=1000)
    limited, free = (bearer(keys.add(name, given)[1]) for name, given in (("a", quota), ("b", None)))
    server = serve("Hello", Admission(keys=keys))
    _, answer, headers = server.chat(limited)
    assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("3", "2")
    _, _, headers = server.call("GET", "/v1/models", headers=limited)
    assert headers["x-ratelimit-remaining-requests"] == "1"
    left = 1000 - answer["usage"]["total_tokens"]
    assert (headers["x-ratelimit-limit-tokens"], headers["x-ratelimit-remaining-tokens"]) == ("1000", str(left))
    assert not any(name.startswith("x-ratelimit") for name in server.chat(free)[2])
