"""All that a request for work passes, over real sockets: quota, queue, turns, time, and what is given back at the end."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx2
import pytest

from corral.answering.answerer import Answerer
from corral.engines.base import Sampling
from corral.engines.scripted import ScriptedEngine
from corral.serving.admission import Admission, ServerLimits
from corral.serving.api_keys import KeyStore, Quota, today
from corral.serving.generation import ServedModel
from corral.template import Template
from tests.serving.conftest import Endless, openai_client, serve_in_thread
from tests.serving.test_app import ASKED, CHAT, call, wait_for

BODY = {"model": "m", "messages": ASKED}


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}", "content-type": "application/json"}


class Gated:
    """An engine that answers once it is let, and remembers who was served in which order (by the prompt's last word)."""

    def __init__(self, template: Template) -> None:
        self.gate = threading.Event()
        self.order: list[int] = []
        self.engine = ScriptedEngine(self._reply, delay_seconds=0.002)
        self.served = ServedModel(Answerer(self.engine, template), "m")

    def _reply(self, ids: Sequence[int], sampling: Sampling, choice: int) -> Iterator[int]:
        self.order.append(len(ids))
        while not self.gate.is_set():
            yield 40
        yield 41


async def ask(client: httpx2.AsyncClient, headers: Any = None, **body: Any) -> httpx2.Response:
    return await client.post(CHAT, json=BODY | body, headers=headers)


def test_a_full_server_gives_retry_after_and_serves_its_queue(tiny_template: Template) -> None:
    gated, admission = Gated(tiny_template), Admission(ServerLimits(at_once=2, waiting=3))
    with serve_in_thread(gated.served, admission=admission) as url:

        async def work() -> Counter[int]:
            async with httpx2.AsyncClient(base_url=url, timeout=60) as client:
                tasks = [asyncio.create_task(ask(client, max_tokens=4000)) for _ in range(9)]
                while sum(task.done() for task in tasks) < 4:
                    await asyncio.sleep(0.01)
                assert (admission.queue.running, admission.queue.waiting) == (2, 3)
                for task in tasks:
                    if task.done():
                        answer = task.result()
                        assert answer.json()["error"]["code"] == "server_full"
                        assert int(answer.headers["retry-after"]) >= 1
                gated.gate.set()
                return Counter([(await task).status_code for task in tasks])

        assert asyncio.run(work()) == {200: 5, 503: 4}
    assert (admission.queue.running, admission.queue.waiting) == (0, 0)


async def test_ten_times_more_clients_than_slots_are_served_or_get_503(tiny_template: Template, keys: KeyStore) -> None:
    """Every answer is good, or says when to come back; the queue stays bounded; a flood gets no more than its turn."""
    flood, calm = keys.add("flood")[1], keys.add("calm")[1]
    served = ServedModel(Answerer(ScriptedEngine([40] * 5, delay_seconds=0.002), tiny_template), "m")
    admission = Admission(ServerLimits(at_once=4, waiting=12), keys)
    deepest = 0
    with serve_in_thread(served, admission=admission) as url:
        loud: list[httpx2.Response] = []
        quiet: list[httpx2.Response] = []

        async def one(client: httpx2.AsyncClient, secret: str, found: list[httpx2.Response]) -> None:
            nonlocal deepest
            found.append(await ask(client, bearer(secret), stream=len(found) % 3 == 0))
            deepest = max(deepest, admission.queue.waiting)
            if found[-1].status_code != 200:
                await asyncio.sleep(0.02)

        limits = httpx2.Limits(max_connections=200, max_keepalive_connections=200)
        async with httpx2.AsyncClient(base_url=url, timeout=60, limits=limits) as client:

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


async def test_one_key_with_many_requests_does_not_starve_another(tiny_template: Template, keys: KeyStore) -> None:
    gated = Gated(tiny_template)
    flood, calm = keys.add("flood")[1], keys.add("calm")[1]
    admission = Admission(ServerLimits(at_once=1, waiting=200), keys)
    with serve_in_thread(gated.served, admission=admission) as url:
        limits = httpx2.Limits(max_connections=200)
        async with httpx2.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
            long = [{"role": "user", "content": "Hello Hello Hello"}]
            tasks = [asyncio.create_task(ask(client, bearer(flood), max_tokens=4000)) for _ in range(50)]
            while admission.queue.waiting < 49:
                await asyncio.sleep(0.01)
            tasks += [asyncio.create_task(ask(client, bearer(calm), max_tokens=4000, messages=long)) for _ in range(3)]
            while admission.queue.waiting < 52:
                await asyncio.sleep(0.01)
            gated.gate.set()
            assert {(await task).status_code for task in tasks} == {200}
        order = gated.order
    places = [i for i, length in enumerate(order) if length == max(order)]
    assert len(places) == 3
    assert places[-1] <= 6, "one in turn with those of the flood"


def test_exceeding_a_quota_gives_429_with_retry_after(tiny_template: Template, keys: KeyStore) -> None:
    served = ServedModel(Answerer(ScriptedEngine([40] * 5), tiny_template), "m")
    minute = keys.add("minute", Quota(requests_per_minute=3))[1]
    day = keys.add("day", Quota(tokens_per_day=30))[1]
    free = keys.add("free")[1]
    asked = json.dumps(BODY)
    with serve_in_thread(served, admission=Admission(keys=keys)) as url:
        for secret, code, most_seconds in ((minute, "rate_limit_exceeded", 60), (day, "insufficient_quota", 86400)):
            answers = [call(url, "POST", CHAT, asked, bearer(secret)) for _ in range(6)]
            statuses = [status for status, _, _ in answers]
            assert statuses[0] == 200
            assert statuses[-1] == 429
            assert statuses == sorted(statuses), "once used up it stays so"
            assert answers[-1][1]["error"]["code"] == code
            assert 1 <= int(answers[-1][2]["retry-after"]) <= most_seconds
        assert call(url, "POST", CHAT, asked, bearer(free))[0] == 200
        assert statuses.count(200) < 6
    used = {key.name: keys.usage_on(today()).get(key.id) for key in keys.all()}
    assert used["minute"]
    assert used["minute"].requests == 3, "those refused are not counted"
    assert used["day"]
    assert used["day"].tokens >= 30


def test_concurrent_requests_of_a_key_are_bounded(tiny_template: Template, keys: KeyStore) -> None:
    gated = Gated(tiny_template)
    secret = keys.add("alice", Quota(at_once=2))[1]
    with serve_in_thread(gated.served, admission=Admission(keys=keys)) as url:

        async def work() -> list[int]:
            async with httpx2.AsyncClient(base_url=url, timeout=60) as client:
                tasks = [asyncio.create_task(ask(client, bearer(secret), max_tokens=4000)) for _ in range(5)]
                while sum(task.done() for task in tasks) < 3:
                    await asyncio.sleep(0.01)
                gated.gate.set()
                return sorted([(await task).status_code for task in tasks])

        assert asyncio.run(work()) == [200, 200, 429, 429, 429]


@pytest.mark.parametrize("waits", [False, True])
def test_a_request_over_its_time_limit_gets_504_and_its_work_stops(waits: bool, tiny_template: Template) -> None:
    endless = Endless()
    served = ServedModel(Answerer(endless.engine, tiny_template), "m")
    admission = Admission(ServerLimits(at_once=1, max_seconds=0.5))
    with serve_in_thread(served, admission=admission) as url:
        holder = threading.Thread(target=call, args=(url, "POST", CHAT, json.dumps(BODY)))
        if waits:
            holder.start()
            assert wait_for(lambda: admission.queue.running == 1)
        status, answer, _ = call(url, "POST", CHAT, json.dumps(BODY))
        assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")
        if waits:
            holder.join()
        assert wait_for(lambda: (admission.queue.running, admission.queue.waiting) == (0, 0))
        assert endless.has_stopped(within=0)


def test_a_stream_over_its_time_limit_ends_with_the_error(tiny_template: Template) -> None:
    endless = Endless()
    admission = Admission(ServerLimits(max_seconds=0.5))
    with serve_in_thread(ServedModel(Answerer(endless.engine, tiny_template), "m"), admission=admission) as url:
        with httpx2.Client(base_url=url, timeout=60) as client:
            text = client.post(CHAT, json=BODY | {"stream": True}).text
        events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        assert len(events) > 5
        assert json.loads(events[-1])["error"]["code"] == "deadline_exceeded"
        assert "[DONE]" not in text
        assert wait_for(lambda: b'outcome="late"} 1.0' in admission.metrics.render())
        assert endless.has_stopped(within=0)


def test_a_client_that_disconnects_while_queued_leaves_the_queue(tiny_template: Template) -> None:
    gated, admission = Gated(tiny_template), Admission(ServerLimits(at_once=1, waiting=5))
    with serve_in_thread(gated.served, admission=admission) as url, httpx2.Client(base_url=url, timeout=60) as client:
        holder = threading.Thread(target=lambda: client.post(CHAT, json=BODY | {"max_tokens": 4000}))
        holder.start()
        assert wait_for(lambda: admission.queue.running == 1)
        with pytest.raises(httpx2.TimeoutException):
            httpx2.post(url + CHAT, json=BODY, timeout=0.3)
        assert wait_for(lambda: admission.queue.waiting == 0)
        gated.gate.set()
        holder.join()
    assert len(gated.order) == 1, "it was never begun"


def test_a_request_that_fails_to_start_releases_its_slot(scripted_model: Callable[..., ServedModel]) -> None:
    admission = Admission(ServerLimits(at_once=1, waiting=0))
    with serve_in_thread(scripted_model("Hello"), admission=admission) as url:
        for _ in range(3):
            body = json.dumps({"model": "scripted", "messages": ASKED, "n": 1000})
            assert call(url, "POST", CHAT, body)[0] == 400
        assert call(url, "POST", CHAT, json.dumps({"model": "scripted", "messages": ASKED}))[0] == 200


def test_openais_client_retries_after_the_retry_after_time(tiny_template: Template, keys: KeyStore) -> None:
    """It retries 429 by itself, going by Retry-After."""
    secret = keys.add("alice", Quota(at_once=1))[1]
    served = ServedModel(Answerer(ScriptedEngine([40] * 5, delay_seconds=0.05), tiny_template), "m")
    with serve_in_thread(served, admission=Admission(keys=keys)) as url, openai_client(url, api_key=secret) as client:
        patient = client.with_options(max_retries=5)
        found: list[Any] = []

        def one() -> None:
            found.append(patient.chat.completions.create(model="m", messages=ASKED))

        threads = [threading.Thread(target=one) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 2
