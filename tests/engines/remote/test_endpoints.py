"""Which endpoint is asked, when it is asked again, and what is said of it: over real sockets, of servers that misbehave."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from corral.engines.remote.engine import RemoteEngine
from corral.engines.remote.protocol import error_message
from corral.errors import EngineError, EngineUnavailableError, InputError, ModelError, RequestError
from tests.conftest import Request, web_server
from tests.engines.conformance import DRAWN, complete
from tests.engines.remote.fake_server import (
    FakeServer,
    answers_well,
    ask,
    fake_server,
    first_then,
    free_port,
    refuses_with,
    remote,
    wait_for,
)


def test_the_key_comes_from_the_argument_or_the_environment_and_is_sent_nowhere_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CORRAL_API_KEY", raising=False)
    answers = fake_server(answers_well)
    with web_server(answers) as url:
        ask(remote(url))
        monkeypatch.setenv("CORRAL_API_KEY", "from the environment")
        ask(remote(url))
        ask(remote(url, key="given"))
    assert answers.keys == [None, "Bearer from the environment", "Bearer given"]


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_key_is_said_at_once_and_not_shown_even_if_the_endpoint_shows_it(status: int) -> None:
    refuses = refuses_with(status, "no such key: sesame-1")
    for answers in (fake_server(refuses), fake_server(refuses, do_GET=refuses)):
        with web_server(answers) as url:
            with pytest.raises((EngineError, ModelError)) as caught:
                ask(remote(url, key="sesame-1"))
            assert "CORRAL_API_KEY" in str(caught.value)
            assert url in str(caught.value)
            assert "sesame" not in repr(caught.value) + str(caught.value)
            assert len(answers.asked) <= 1, "asking again with the same key helps nobody"


def test_the_only_model_is_taken_and_of_several_one_must_be_named() -> None:
    several = [{"id": "a", "max_model_len": 100}, {"id": "b", "max_model_len": 200}]
    with web_server(fake_server(answers_well, models=several)) as url:
        for name in (None, "c"):
            with pytest.raises(ModelError, match="a, b") as caught:
                remote(url, model=name)
            assert url in str(caught.value)
        engine = remote(url, model="b")
        assert (engine.model, engine.features.max_length) == ("b", 200)
        asyncio.run(engine.close())


def test_the_context_is_the_shortest_of_all_endpoints_or_must_be_given() -> None:
    short = fake_server(answers_well, models=[{"id": "m", "max_model_len": 50}])
    untold = fake_server(answers_well, models=[{"id": "m"}])
    with web_server(fake_server(answers_well)) as url, web_server(short) as other, web_server(untold) as silent:
        engine = remote(url, other)
        assert engine.features.max_length == 50
        asyncio.run(engine.close())
        with pytest.raises(InputError, match="context") as caught:
            remote(url, silent)
        assert "max_length" in str(caught.value)
        engine = remote(silent, max_length=77)
        assert engine.features.max_length == 77
        asyncio.run(engine.close())


def test_endpoints_that_serve_different_models_are_refused() -> None:
    with (
        web_server(fake_server(answers_well)) as url,
        web_server(fake_server(answers_well, models=[{"id": "other"}])) as second,
    ):
        with pytest.raises(ModelError, match="no model 'm'; it has: other") as caught:
            remote(url, second)
        assert second in str(caught.value)


def test_an_endpoint_that_is_not_there_is_said_at_once_and_one_that_is_suffices() -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ModelError) as caught:
        remote(nobody)
    assert nobody in str(caught.value)
    assert "running" in str(caught.value)
    with web_server(fake_server(answers_well)) as url:
        assert ask(remote(nobody, url))[0].ids == (7, 8, 9)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x/v1", "http://", "http://me:secret@x/v1", "http://x:y/v1"])
def test_what_is_no_url_is_said_without_a_password_that_is_in_it(url: str) -> None:
    with pytest.raises(InputError) as caught:
        RemoteEngine([url], model="m", vocabulary=9)
    assert "secret" not in str(caught.value) + repr(caught.value)
    with pytest.raises(InputError):
        RemoteEngine([], model="m", vocabulary=9)


def test_a_page_that_is_no_api_is_said_to_be_none() -> None:
    def page(self: Request) -> None:
        self.answer(200, {"content-type": "text/html"}, b"<html>welcome</html>")

    with (
        web_server(fake_server(answers_well, do_GET=page)) as url,
        pytest.raises(ModelError, match="cannot be read") as caught,
    ):
        remote(url)
    assert "/v1" in str(caught.value)


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_what_may_pass_is_asked_again(status: int) -> None:
    answers = fake_server(first_then(refuses_with(status)))
    with web_server(answers) as url:
        assert ask(remote(url))[0].ids == (7, 8, 9)
    assert len(answers.asked) == 2


def test_retry_after_is_honoured() -> None:
    moments: list[float] = []

    def busy(self: FakeServer) -> None:
        moments.append(time.monotonic())
        first_then(refuses_with(429, **{"retry-after": "1"}))(self)

    with web_server(fake_server(busy)) as url:
        assert ask(remote(url))[0].ids == (7, 8, 9)
    assert moments[1] - moments[0] >= 1


def test_an_endpoint_that_is_busy_for_too_long_or_always_is_given_up_with_its_words() -> None:
    answers = fake_server(refuses_with(429, "come back tomorrow", **{"retry-after": "86400"}))
    with web_server(answers) as url, pytest.raises(EngineError, match=r"tomorrow.* for 86400 s") as caught:
        ask(remote(url))
    assert url in str(caught.value)
    assert len(answers.asked) == 1
    answers = fake_server(refuses_with(503, "overloaded", **{"retry-after": "0"}))
    with web_server(answers) as url, pytest.raises(EngineError, match="503: overloaded"):
        ask(remote(url))
    assert len(answers.asked) == 4, "the first and three retries"


@pytest.mark.parametrize(
    ("status", "kind"), [(400, RequestError), (422, RequestError), (404, EngineError), (500, EngineError)]
)
def test_what_will_not_pass_is_said_at_once(status: int, kind: type[EngineError]) -> None:
    answers = fake_server(refuses_with(status, "the context is too short"))
    with web_server(answers) as url, pytest.raises(EngineError, match="the context is too short") as caught:
        ask(remote(url))
    assert type(caught.value) is kind
    assert url in str(caught.value)
    assert len(answers.asked) == 1


def test_requests_go_to_the_endpoint_with_the_fewest_and_no_more_than_agreed_are_under_way() -> None:
    lock = threading.Lock()
    counts: list[list[int]] = [[], []]
    now = [0, 0]

    def counting(which: int) -> Callable[[FakeServer], None]:
        def answer(self: FakeServer) -> None:
            with lock:
                now[which] += 1
                counts[which].append(now[which])
            time.sleep(0.05)
            with lock:
                now[which] -= 1
            answers_well(self)

        return answer

    with web_server(fake_server(counting(0))) as first, web_server(fake_server(counting(1))) as second:

        async def test() -> None:
            async with remote(first, second, concurrency=6) as engine:
                await asyncio.gather(*(complete(engine, [1], DRAWN) for _ in range(24)))

        asyncio.run(test())
    assert len(counts[0]) + len(counts[1]) == 24
    assert max(counts[0] + counts[1]) == 3


def test_ready_tells_whether_an_endpoint_may_be_asked() -> None:
    with web_server(fake_server(answers_well, protocol_version="HTTP/1.0")) as url:
        engine = remote(url, retries=0, backoff_seconds=3600)
        assert engine.ready

    async def test() -> None:
        async with engine:
            with pytest.raises(EngineError):
                await complete(engine, [1], DRAWN)
            await asyncio.sleep(0.1)
            assert not engine.ready

    asyncio.run(test())


def test_one_that_failed_several_times_is_asked_for_answers_only_once_it_lists_the_model() -> None:
    listed = fake_server(FakeServer.finish, models=[{"id": "m", "max_model_len": 8192}])
    with web_server(listed) as url, web_server(fake_server(answers_well)) as other:
        engine = remote(url, other)
        listed.models = [{"id": "another", "max_model_len": 8192}]

        async def test() -> None:
            async with engine:
                for _ in range(8):
                    await complete(engine, [1], DRAWN)
                assert len(listed.asked) == 3
                await asyncio.to_thread(wait_for, lambda: len(listed.keys) >= 4)
                assert len(listed.asked) == 3, "it does not list the model"
                listed.completion = answers_well  # type: ignore[method-assign]
                listed.models = [{"id": "m", "max_model_len": 8192}]
                while len(listed.asked) < 4:
                    await asyncio.gather(*(complete(engine, [1], DRAWN) for _ in range(2)))

        asyncio.run(test())


@pytest.mark.parametrize("retries", [0, 3])
def test_what_one_endpoint_is_too_busy_for_is_asked_of_another_and_others_are_still_asked_there(retries: int) -> None:
    busy = fake_server(first_then(refuses_with(503, **{"retry-after": "3600"})))
    with web_server(busy) as url, web_server(fake_server(answers_well)) as other:

        async def test() -> None:
            async with remote(url, other, retries=retries, backoff_seconds=60) as engine:
                for _ in range(5):
                    assert (await complete(engine, [1], DRAWN))[0].ids == (7, 8, 9)

        asyncio.run(test())
    assert len(busy.asked) == 5


@pytest.mark.parametrize("fault", ["busy", "reset"])
def test_a_fault_of_one_request_is_none_of_the_next_ones(fault: str) -> None:
    first = FakeServer.finish if fault == "reset" else refuses_with(503, "full", **{"retry-after": "20"})
    answers = fake_server(first_then(first))
    with web_server(answers) as url:

        async def test() -> None:
            async with remote(url, retries=0, backoff_seconds=60) as engine:
                with pytest.raises(EngineUnavailableError) as caught:
                    await complete(engine, [1], DRAWN)
                told = (caught.value.status, round(caught.value.retry_seconds or 0))
                assert told == ((503, 20) if fault == "busy" else (None, 0))
                assert url in str(caught.value.where)
                assert engine.ready
                assert (await complete(engine, [1], DRAWN))[0].ids == (7, 8, 9)

        asyncio.run(test())
    assert len(answers.asked) == 2


ERRORS: dict[str, Callable[[FakeServer], None]] = {
    "500": refuses_with(500),
    "no such model": refuses_with(404),
    "a page": lambda self: self.answer(200, {"content-type": "text/html"}, b"<html>"),
    "an error event": lambda self: self.events({"error": {"message": "no", "code": 500}}),
}


@pytest.mark.parametrize("case", ERRORS)
def test_one_that_answers_errors_beside_one_that_works_costs_no_request_and_is_left_alone(case: str) -> None:
    broken = fake_server(ERRORS[case])
    with web_server(broken) as url, web_server(fake_server(answers_well)) as other:

        async def test() -> None:
            async with remote(url, other, retries=0, backoff_seconds=60) as engine:
                for _ in range(10):
                    assert (await complete(engine, [1], DRAWN))[0].ids == (7, 8, 9)

        asyncio.run(test())
    assert len(broken.asked) == 3


def test_a_request_that_no_endpoint_can_answer_is_none_of_their_faults() -> None:
    def poisoned(self: FakeServer) -> None:
        (refuses_with(500) if self.asked[-1]["prompt"] == [0] else answers_well)(self)

    first, second = fake_server(poisoned), fake_server(poisoned)
    with web_server(first) as url, web_server(second) as other:

        async def test() -> None:
            async with remote(url, other, retries=3, backoff_seconds=60) as engine:
                for _ in range(5):
                    with pytest.raises(EngineError, match="answered 500"):
                        await complete(engine, [0], DRAWN)
                together = [complete(engine, [1], DRAWN) for _ in range(10)]
                assert all(found[0].ids == (7, 8, 9) for found in await asyncio.gather(*together))

        asyncio.run(test())
    assert min(len(each.asked) for each in (first, second)) > 5, "both are still asked"


def test_the_last_endpoint_rests_no_longer_than_it_takes_to_see_that_it_is_there() -> None:
    answers = fake_server(lambda self: (FakeServer.finish if len(self.asked) <= 3 else answers_well)(self))
    with web_server(answers) as url:

        async def test() -> None:
            async with remote(url, retries=0, backoff_seconds=3600) as engine:
                for _ in range(3):
                    with pytest.raises(EngineUnavailableError):
                        await complete(engine, [1], DRAWN)
                await asyncio.to_thread(wait_for, lambda: engine.ready)
                assert (await complete(engine, [1], DRAWN))[0].ids == (7, 8, 9)

        asyncio.run(test())
    assert len(answers.keys) == 2, "it was asked for its models once more"


def test_those_that_nobody_asks_are_looked_at_where_that_is_wanted() -> None:
    # A connection for each request: one that is kept would outlive the server.
    answers = fake_server(answers_well, protocol_version="HTTP/1.0")
    with web_server(answers) as url:
        engine = remote(url, check_seconds=0.05)
        lazy = remote(url)
        assert engine.ready
    wait_for(lambda: not engine.ready)
    assert lazy.ready, "it has not noticed"
    with web_server(answers, int(url.rpartition(":")[2])):
        wait_for(lambda: engine.ready)
        assert ask(engine)[0].ids == (7, 8, 9)
        assert ask(lazy)[0].ids == (7, 8, 9)


def test_without_patience_each_endpoint_is_tried_once_and_a_request_is_refused_while_all_rest() -> None:
    first, second = fake_server(refuses_with(503)), fake_server(refuses_with(429))
    with web_server(first) as url, web_server(second) as other:

        async def test() -> None:
            async with remote(url, other, retries=0, backoff_seconds=60) as engine:
                with pytest.raises(EngineUnavailableError, match=r"503.*429"):
                    await complete(engine, [1], DRAWN)
                assert engine.ready

        asyncio.run(test())
    assert (len(first.asked), len(second.asked)) == (1, 1)
    with web_server(fake_server(answers_well, protocol_version="HTTP/1.0")) as url:
        engine = remote(url, retries=0, check_seconds=0.05)
    wait_for(lambda: not engine.ready)

    async def refused() -> None:
        async with engine:
            with pytest.raises(EngineUnavailableError):
                engine.submit([1], DRAWN)

    asyncio.run(refused())


def test_a_model_that_only_embeds_is_not_the_one_that_is_meant() -> None:
    models = [{"id": "m", "max_model_len": 8192}, {"id": "e", "max_model_len": 256, "task": "embeddings"}]
    with web_server(fake_server(answers_well, models=models)) as url:
        engine = remote(url)
        assert (engine.model, engine.features.max_length) == ("m", 8192)
        asyncio.run(engine.close())


@pytest.mark.parametrize("pad", [0, 270, 283])
def test_nothing_of_the_key_is_shown_wherever_the_endpoint_says_it(pad: int) -> None:
    words = "x" * pad + " no such key: sesame-and-more-1"
    amid = fake_server(lambda self: self.events({"error": {"message": words, "code": 500}}))
    refused = fake_server(refuses_with(400, words))
    passing = fake_server(refuses_with(503, words))
    for answers in (amid, refused, passing):
        with web_server(answers) as url, pytest.raises(EngineError) as caught:
            ask(remote(url, key="sesame-and-more-1", retries=0))
        assert "sesame" not in str(caught.value) + repr(caught.value)
    assert "ses" not in error_message(json.dumps({"error": {"message": words}}), "sesame-and-more-1")


def test_a_server_that_sends_requests_elsewhere_is_refused_and_the_key_does_not_follow() -> None:
    elsewhere = fake_server(answers_well)
    with web_server(elsewhere) as other:
        redirects: Any = lambda self: self.answer(307, {"location": f"{other}{self.path}"})  # noqa: E731
        with web_server(fake_server(redirects)) as url, pytest.raises(EngineError, match="307"):
            ask(remote(url, key="sesame"))
        with web_server(fake_server(answers_well, do_GET=redirects)) as url, pytest.raises(ModelError, match="307"):
            remote(url, key="sesame")
    assert (elsewhere.keys, elsewhere.asked) == ([], [])


def test_who_gets_the_key_is_said_where_it_may_not_be_meant(caplog: pytest.LogCaptureFixture) -> None:
    from corral.engines.remote.protocol import auth_header

    auth_header("sesame", "http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1")
    auth_header("sesame", "https://a.example/v1")
    auth_header("sesame", "http://localhost:1/v1", "http://localhost:2/v1")
    auth_header(None, "http://a.example/v1", "http://b.example/v1")
    assert not caplog.records
    auth_header("sesame", "https://a.example/v1", "https://b.example/v1")
    assert "a.example, b.example" in caplog.text
    auth_header("sesame", "http://c.example/v1")
    assert "c.example unencrypted" in caplog.text
    assert "sesame" not in caplog.text
