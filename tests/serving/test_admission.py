"""All that a request for work passes, over real sockets: quota, queue, turns, time, and what is given back at the end."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx2
import pytest

from corral.engines.base import Sampling
from corral.engines.scripted import ScriptedEngine
from corral.serving.admission import Admission, ServerLimits
from corral.serving.keys import KeyStore, Quota, today
from tests.serving.conftest import ASKED, CHAT, Endless, RunningServer, Serve, bearer, openai_client, wait_for

BODY = {"model": "m", "messages": ASKED, "max_tokens": 4000}


class Gated(ScriptedEngine):
    """An engine that answers once it is let, and remembers the lengths of the prompts in the order they were begun."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.lengths: list[int] = []
        super().__init__(self._count_until_let, delay_seconds=0.002)

    def _count_until_let(self, ids: Sequence[int], sampling: Sampling, choice: int) -> Iterator[int]:
        self.lengths.append(len(ids))
        while not self.gate.is_set():
            yield 40
        yield 41


def open_client(server: RunningServer) -> httpx2.AsyncClient:
    limits = httpx2.Limits(max_connections=200, max_keepalive_connections=200)
    return httpx2.AsyncClient(base_url=server.url, timeout=60, limits=limits)


def post(client: httpx2.AsyncClient, headers: Any = None, **body: Any) -> asyncio.Task[httpx2.Response]:
    return asyncio.create_task(client.post(CHAT, json=BODY | body, headers=headers))


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(0.01)


async def test_a_full_server_gives_retry_after_and_serves_its_queue(serve: Serve) -> None:
    engine, admission = Gated(), Admission(ServerLimits(at_once=2, waiting=3))
    async with open_client(serve(engine, admission)) as client:
        tasks = [post(client) for _ in range(9)]
        await until(lambda: sum(task.done() for task in tasks) == 4)
        assert (admission.queue.running, admission.queue.waiting) == (2, 3)
        for task in tasks:
            if task.done():
                assert task.result().json()["error"]["code"] == "server_full"
                assert int(task.result().headers["retry-after"]) >= 1
        engine.gate.set()
        assert Counter([(await task).status_code for task in tasks]) == {200: 5, 503: 4}
    assert (admission.queue.running, admission.queue.waiting) == (0, 0)


async def test_requests_wait_for_as_many_places_as_they_have_choices(serve: Serve) -> None:
    """Several answers, candidates of a vote, and texts to continue."""
    several: list[tuple[str, dict[str, Any]]] = [
        (CHAT, BODY | {"n": 3}),
        (CHAT, BODY | {"temperature": 1, "consensus": {"method": "majority", "n": 3}}),
        ("/v1/completions", {"model": "m", "prompt": ["a", "b", "c"]}),
    ]
    for path, body in several:
        engine, admission = Gated(), Admission(ServerLimits(at_once=4))
        async with open_client(serve(engine, admission)) as client:
            tasks = [post(client), post(client)]
            await until(lambda admission=admission: admission.queue.running == 2)
            tasks.append(asyncio.create_task(client.post(path, json=body)))
            await until(lambda admission=admission: admission.queue.waiting == 1)
            engine.gate.set()
            assert {(await task).status_code for task in tasks} == {200}
        assert admission.queue.choices == 0


async def test_ten_times_more_clients_than_slots_are_served_or_get_503(serve: Serve, keys: KeyStore) -> None:
    """Every answer is good, or says when to come back; the queue stays bounded; a flood gets no more than its turn."""
    flood, calm = keys.add("flood")[1], keys.add("calm")[1]
    admission = Admission(ServerLimits(at_once=4, waiting=12), keys)
    deepest = 0
    loud: list[httpx2.Response] = []
    quiet: list[httpx2.Response] = []

    async def one(client: httpx2.AsyncClient, secret: str, responses: list[httpx2.Response]) -> None:
        nonlocal deepest
        responses.append(await post(client, bearer(secret), stream=len(responses) % 3 == 0))
        deepest = max(deepest, admission.queue.waiting)
        if responses[-1].status_code != 200:
            await asyncio.sleep(0.02)

    async with open_client(serve(ScriptedEngine([40] * 5, delay_seconds=0.002), admission)) as client:

        async def calm_one() -> None:
            for _ in range(6):
                await one(client, calm, quiet)

        async def loud_one() -> None:
            while len(quiet) < 12:
                await one(client, flood, loud)

        await asyncio.gather(calm_one(), calm_one(), *(loud_one() for _ in range(38)))
    for answer in [*loud, *quiet]:
        assert answer.status_code in (200, 503), answer.text
        assert answer.status_code == 200 or int(answer.headers["retry-after"]) >= 1
        assert answer.status_code == 503 or "error" not in answer.text
    assert any(answer.status_code == 503 for answer in loud), "it was an overload"
    assert deepest <= 12
    assert all(answer.status_code == 200 for answer in quiet), "who sends two at a time always finds a place"
    assert (admission.queue.running, admission.queue.waiting) == (0, 0)


async def test_one_key_with_many_requests_does_not_starve_another(serve: Serve, keys: KeyStore) -> None:
    engine = Gated()
    flood, calm = keys.add("flood")[1], keys.add("calm")[1]
    admission = Admission(ServerLimits(at_once=1, waiting=200), keys)
    long = [{"role": "user", "content": "What is two plus two? Hello"}]  # to tell them apart, not to cost more
    async with open_client(serve(engine, admission)) as client:
        tasks = [post(client, bearer(flood)) for _ in range(50)]
        await until(lambda: admission.queue.waiting == 49)
        tasks += [post(client, bearer(calm), messages=long) for _ in range(3)]
        await until(lambda: admission.queue.waiting == 52)
        engine.gate.set()
        assert {(await task).status_code for task in tasks} == {200}
    turns = [i for i, length in enumerate(engine.lengths) if length == max(engine.lengths)]
    assert len(turns) == 3
    assert turns[-1] <= 6, "one in turn with those of the flood"


def test_exceeding_a_quota_gives_429_with_retry_after(serve: Serve, keys: KeyStore) -> None:
    minute = keys.add("minute", Quota(requests_per_minute=3))[1]
    day = keys.add("day", Quota(tokens_per_day=60))[1]
    free = keys.add("free")[1]
    server = serve(ScriptedEngine([40] * 5), Admission(keys=keys))
    for secret, code, most_seconds in ((minute, "rate_limit_exceeded", 60), (day, "insufficient_quota", 86400)):
        answers = [server.chat(bearer(secret), max_tokens=10) for _ in range(6)]
        statuses = [status for status, _, _ in answers]
        assert statuses[0] == 200
        assert statuses[-1] == 429
        assert statuses == sorted(statuses), "once used up it stays so"
        assert answers[-1][1]["error"]["code"] == code
        assert answers[-1][1]["error"]["type"] == ("rate_limit_error" if secret == minute else "insufficient_quota")
        assert 1 <= int(answers[-1][2]["retry-after"]) <= most_seconds
    assert server.chat(bearer(free))[0] == 200
    by_name = {key.name: key.id for key in keys.all()}
    assert wait_for(lambda: by_name["free"] in keys.usage_on(today())), "the last request is written"
    used = keys.usage_on(today())
    assert used[by_name["minute"]].requests == 3, "those refused are not counted"
    assert 30 <= used[by_name["day"]].tokens <= 60


@pytest.mark.parametrize("changes", [{"max_tokens": 40}, {"max_tokens": 10, "n": 4}, {}])
async def test_requests_at_the_same_time_do_not_use_more_than_the_quota(
    changes: dict[str, Any], serve: Serve, keys: KeyStore
) -> None:
    """They reserve the most that they may use, and the next ones find it gone until they are settled."""
    key, secret = keys.add("alice", Quota(tokens_per_day=500))
    admission = Admission(keys=keys)
    body = {"model": "m", "messages": ASKED, "temperature": 1, **changes}
    async with open_client(serve(ScriptedEngine([40] * 200, delay_seconds=0.001), admission)) as client:
        tasks = [client.post(CHAT, json=body, headers=bearer(secret)) for _ in range(60)]
        answers = await asyncio.gather(*tasks)
    codes = Counter(answer.json()["error"]["code"] if answer.status_code == 429 else "" for answer in answers)
    assert codes[""] >= 1
    assert codes[""] + codes["rate_limit_exceeded"] + codes["insufficient_quota"] == 60
    used = admission.accounts.usage_today(key.id).tokens
    assert 0 < used <= 500
    assert used == sum(answer.json()["usage"]["total_tokens"] for answer in answers if answer.status_code == 200)


async def test_a_running_and_a_waiting_request_end_when_their_key_is_revoked(
    serve: Serve, keys: KeyStore, set_seconds: Callable[..., None]
) -> None:
    set_seconds(refresh=0.1)
    endless, secret = Endless(), keys.add("alice")[1]
    admission = Admission(ServerLimits(at_once=1), keys)
    async with open_client(serve(endless.engine, admission)) as client:
        tasks = [post(client, bearer(secret)) for _ in range(2)]
        await until(lambda: (admission.queue.running, admission.queue.waiting) == (1, 1))
        keys.revoke("alice")
        for task in tasks:
            answer = await task
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
            assert answer.json()["error"]["type"] == "authentication_error"
        await until(lambda: (admission.queue.running, admission.queue.waiting) == (0, 0))
    assert endless.has_stopped()


def test_a_stream_ends_with_the_error_when_its_key_is_revoked(
    serve: Serve, keys: KeyStore, set_seconds: Callable[..., None]
) -> None:
    set_seconds(refresh=0.1)
    endless, secret = Endless(), keys.add("alice")[1]
    server = serve(endless.engine, Admission(keys=keys))
    revoker = threading.Thread(target=lambda: endless.started.wait(30) and keys.revoke("alice"))
    revoker.start()
    status, events, _ = server.chat(bearer(secret), stream=True, max_tokens=8000)
    revoker.join()
    assert status == 200, "it had begun"
    assert events[-1]["error"]["code"] == "invalid_api_key"
    assert all("error" not in event for event in events[:-1])
    assert endless.has_stopped()


async def test_concurrent_requests_of_a_key_are_bounded(serve: Serve, keys: KeyStore) -> None:
    engine, secret = Gated(), keys.add("alice", Quota(at_once=2))[1]
    async with open_client(serve(engine, Admission(keys=keys))) as client:
        tasks = [post(client, bearer(secret)) for _ in range(5)]
        await until(lambda: sum(task.done() for task in tasks) == 3)
        engine.gate.set()
        assert sorted([(await task).status_code for task in tasks]) == [200, 200, 429, 429, 429]


@pytest.mark.parametrize("waits", [False, True])
def test_a_request_over_its_time_limit_gets_504_and_its_work_stops(waits: bool, serve: Serve) -> None:
    endless, admission = Endless(), Admission(ServerLimits(at_once=1, max_seconds=0.5))
    server = serve(endless.engine, admission)
    holder = threading.Thread(target=server.chat)
    if waits:
        holder.start()
        assert wait_for(lambda: admission.queue.running == 1)
    status, answer, headers = server.chat()
    assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")
    assert headers["x-should-retry"] == "false", "OpenAI's client would ask three times"
    if waits:
        holder.join()
    assert wait_for(lambda: (admission.queue.running, admission.queue.waiting) == (0, 0))
    assert endless.has_stopped(within=0)


def test_a_client_that_disconnects_while_queued_leaves_the_queue(serve: Serve) -> None:
    engine, admission = Gated(), Admission(ServerLimits(at_once=1, waiting=5))
    server = serve(engine, admission)
    holder = threading.Thread(target=lambda: server.chat(max_tokens=4000))
    holder.start()
    assert wait_for(lambda: admission.queue.running == 1)
    with pytest.raises(httpx2.TimeoutException):
        httpx2.post(server.url + CHAT, json=BODY, timeout=0.3)
    assert wait_for(lambda: admission.queue.waiting == 0)
    engine.gate.set()
    holder.join()
    assert len(engine.lengths) == 1, "it was never begun"


def test_a_request_that_fails_to_start_releases_its_slot(serve: Serve) -> None:
    server = serve("Hello", Admission(ServerLimits(at_once=1, waiting=0)))
    for _ in range(3):
        assert server.chat(n=1000)[0] == 400
    assert server.chat()[0] == 200


def test_openais_client_retries_after_the_retry_after_time(serve: Serve, keys: KeyStore) -> None:
    """It retries 429 by itself, going by Retry-After."""
    secret = keys.add("alice", Quota(at_once=1))[1]
    server = serve(ScriptedEngine([40] * 5, delay_seconds=0.05), Admission(keys=keys))
    answers: list[Any] = []
    with openai_client(server.url, api_key=secret) as client:
        patient = client.with_options(max_retries=5)
        threads = [
            threading.Thread(target=lambda: answers.append(patient.chat.completions.create(model="m", messages=ASKED)))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(answers) == 2
