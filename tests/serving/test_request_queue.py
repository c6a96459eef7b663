"""The queue alone: its bounds, whose turn it is, and what is said to those who are sent away."""

from __future__ import annotations

import asyncio
import random

import pytest

from corral.serving.errors import Refused
from corral.serving.request_queue import RequestQueue, Slot


class Crowd:
    """Requests at a queue: who got in, in order, and who was sent away."""

    def __init__(self, queue: RequestQueue) -> None:
        self.queue = queue
        self.entered: list[str] = []
        self.refused: list[tuple[str, Refused]] = []
        self.inside: list[Slot] = []

    async def come(self, *keys: str, choices: int = 1) -> list[asyncio.Task[None]]:
        tasks = [asyncio.create_task(self.one(key, choices)) for key in keys]
        await self.settle()
        return tasks

    async def leave(self) -> None:
        """The one who is inside for longest goes."""
        self.queue.release(self.inside.pop(0))
        await self.settle()

    async def leave_all(self) -> None:
        while self.inside:
            await self.leave()

    @staticmethod
    async def settle() -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    async def one(self, key: str, choices: int = 1) -> None:
        try:
            slot = await self.queue.acquire(key, choices)
        except Refused as busy:
            self.refused.append((key, busy))
            return
        self.entered.append(key)
        self.inside.append(slot)


async def test_running_and_waiting_requests_are_bounded_and_the_next_is_refused() -> None:
    crowd = Crowd(RequestQueue(2, 3))
    await crowd.come(*"aaaaaaa")
    assert (crowd.queue.running, crowd.queue.waiting, len(crowd.refused)) == (2, 3, 2)
    assert all((busy.status, busy.code) == (503, "server_full") for _, busy in crowd.refused)
    await crowd.leave_all()
    assert len(crowd.entered) == 5
    assert (crowd.queue.running, crowd.queue.waiting) == (0, 0)


async def test_waiting_keys_take_turns() -> None:
    crowd = Crowd(RequestQueue(1, 100))
    await crowd.come(*"aaaaaa", *"bb", *"ccc")
    await crowd.leave_all()
    assert "".join(crowd.entered) == "a" + "abc" + "abc" + "ac" + "aa"


@pytest.mark.parametrize("at_once", [1, 2, 7, 8, 128])
async def test_a_key_alone_has_all_slots(at_once: int) -> None:
    crowd = Crowd(RequestQueue(at_once, 10))
    await crowd.come(*"a" * (at_once + 5))
    assert (len(crowd.entered), crowd.queue.waiting) == (at_once, 5)
    await crowd.leave_all()
    assert len(crowd.entered) == at_once + 5


async def test_while_several_keys_have_requests_a_new_one_does_not_wait_for_their_long_ones() -> None:
    crowd = Crowd(RequestQueue(16, 100))
    await crowd.come(*"b" * 2)
    await crowd.come(*"a" * 20)
    assert (crowd.entered.count("a"), crowd.queue.running) == (12, 14), "two slots are for keys with no running request"
    await crowd.come("c")
    assert (crowd.entered[-1], crowd.queue.waiting) == ("c", 8), "it enters at once"
    while "b" in (slot.key for slot in crowd.inside) or "c" in (slot.key for slot in crowd.inside):
        crowd.queue.release(crowd.inside.pop(next(i for i, slot in enumerate(crowd.inside) if slot.key != "a")))
        await crowd.settle()
    assert crowd.queue.running == 16, "alone again, it has all"
    await crowd.leave_all()
    assert (crowd.queue.running, crowd.queue.waiting) == (0, 0)


async def test_the_last_waiting_request_of_another_key_frees_its_slots_when_it_is_cancelled() -> None:
    crowd = Crowd(RequestQueue(8, 10))
    await crowd.come(*"aaaaaaaa")
    (waiting,) = await crowd.come("b")
    await crowd.come("a")
    await crowd.leave()
    assert crowd.entered[-1] == "b"
    await crowd.leave()
    assert crowd.queue.running == 7, "b is inside, so the last slot is for others"
    (other,) = await crowd.come("a")
    crowd.queue.release(crowd.inside.pop(next(i for i, slot in enumerate(crowd.inside) if slot.key == "b")))
    await crowd.settle()
    assert crowd.queue.running == 8
    assert waiting.done()
    assert other.done()


async def test_the_key_with_the_fewest_running_choices_is_next() -> None:
    crowd = Crowd(RequestQueue(4, 100))
    await crowd.come(*"aaab")
    await crowd.come(*"aabb")
    await crowd.leave()
    await crowd.leave()
    assert crowd.entered[4:] == ["b", "a"], "1 of b's beside 2 of a's, and then 2 beside 1"
    crowd = Crowd(RequestQueue(7, 100))
    await crowd.come(*"aaa")
    await crowd.come("b", choices=4)
    await crowd.come(*"bbaa")
    await crowd.leave()
    await crowd.leave()
    assert crowd.entered[4:] == ["a", "a"], "one request of b's has four choices"
    await crowd.leave_all()
    assert (crowd.queue.running, crowd.queue.waiting) == (0, 0)


async def test_a_request_takes_a_place_for_each_of_its_choices_and_smaller_ones_do_not_overtake_it() -> None:
    crowd = Crowd(RequestQueue(4, 100))
    await crowd.come("a")
    await crowd.come("b", choices=4)
    await crowd.come(*"ccc")
    assert crowd.entered == ["a"], "three places are free, and b needs four"
    await crowd.leave()
    assert (crowd.entered, crowd.queue.choices) == (["a", "b"], 4)
    await crowd.leave()
    assert crowd.entered == ["a", "b", "c", "c", "c"]


async def test_a_request_with_more_choices_than_there_are_places_runs_alone() -> None:
    crowd = Crowd(RequestQueue(4, 100))
    await crowd.come("a", choices=3)
    await crowd.come("a", choices=16)
    await crowd.come("a")
    assert crowd.entered == ["a"]
    await crowd.leave()
    assert (crowd.queue.running, crowd.queue.choices, crowd.queue.waiting) == (1, 16, 1)
    await crowd.leave()
    assert (crowd.queue.running, crowd.queue.choices, crowd.queue.waiting) == (1, 1, 0)


async def test_what_is_remembered_of_keys_is_bounded() -> None:
    queue = RequestQueue(1, 1)
    for i in range(3000):
        queue.release(await queue.acquire(f"key {i}"), 5)
    assert len(queue._tokens) == 1024
    assert "key 2999" in queue._tokens


async def test_of_equal_keys_the_one_that_used_fewer_tokens_lately_is_next(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("corral.serving.request_queue.time.monotonic", lambda: clock[0])
    crowd = Crowd(RequestQueue(1, 100))
    await crowd.come("a", *"aaab" * 10)
    for _ in range(12):
        key = crowd.inside[0].key
        crowd.queue.release(crowd.inside.pop(), 4000 if key == "a" else 1000)
        await crowd.settle()
    assert (crowd.entered[1:].count("b"), crowd.entered[1:].count("a")) == (10, 2), "four of b's for one of a's"
    clock[0] += 3600
    await crowd.come(*"cb")
    for _ in range(3):
        await crowd.leave()
    assert crowd.entered[-3:] == ["a", "c", "b"], "what was used an hour ago counts no more, so they take turns"


async def test_one_key_with_a_thousand_requests_does_not_block_others() -> None:
    crowd = Crowd(RequestQueue(4, 32))
    await crowd.come(*(["flood"] * 1000))
    before = len(crowd.refused)
    assert before == 1000 - 36
    await crowd.come(*"bcd")
    assert [key for key, _ in crowd.refused[before:]] == ["flood"] * 3, "the newest of the longest queue makes room"
    assert crowd.queue.waiting == 32
    for _ in range(4):
        await crowd.leave()
    assert sorted(crowd.entered[4:]) == ["b", "c", "d", "flood"], "the others wait for one turn, not for a thousand"
    await crowd.come(*(["flood"] * 1000))
    assert crowd.queue.waiting == 32


async def test_a_queue_full_of_keys_with_one_request_each_refuses_another_key() -> None:
    crowd = Crowd(RequestQueue(1, 3))
    await crowd.come(*"abcde")
    assert [key for key, _ in crowd.refused] == ["e"]


async def test_a_cancelled_wait_leaves_the_queue_unchanged() -> None:
    crowd = Crowd(RequestQueue(1, 10))
    tasks = await crowd.come(*"abca")
    tasks[1].cancel()
    tasks[3].cancel()
    await crowd.settle()
    assert crowd.queue.waiting == 1
    await crowd.leave_all()
    assert crowd.entered == ["a", "c"]
    assert (crowd.queue.running, crowd.queue.waiting) == (0, 0)


async def test_a_slot_granted_to_a_request_being_cancelled_goes_to_the_next() -> None:
    crowd = Crowd(RequestQueue(1, 10))
    tasks = await crowd.come(*"abc")
    crowd.queue.release(crowd.inside.pop())  # b's turn is there, and b has not seen it
    tasks[1].cancel()
    await crowd.settle()
    assert crowd.entered == ["a", "c"]
    await crowd.leave_all()
    assert (crowd.queue.running, crowd.queue.waiting) == (0, 0)


@pytest.mark.parametrize("at_once", [3, 8])
@pytest.mark.parametrize("seed", range(5))
async def test_the_queue_counts_stay_consistent(seed: int, at_once: int) -> None:
    draw = random.Random(seed)
    crowd = Crowd(RequestQueue(at_once, 5))
    tasks: list[asyncio.Task[None]] = []
    for _ in range(300):
        match draw.randrange(4):
            case 0 | 1:
                tasks += [
                    asyncio.create_task(crowd.one(draw.choice("abc"), draw.randrange(1, 5)))
                    for _ in range(draw.randrange(6))
                ]
            case 2:
                if tasks:
                    draw.choice(tasks).cancel()
            case _:
                if crowd.inside:
                    slot = crowd.inside.pop(draw.randrange(len(crowd.inside)))
                    crowd.queue.release(slot, draw.randrange(100))
        if draw.random() < 0.5:
            await crowd.settle()
            choices = sum(slot.choices for slot in crowd.inside)
            assert (crowd.queue.running, crowd.queue.choices) == (len(crowd.inside), choices)
            assert choices <= at_once or len(crowd.inside) == 1
            assert crowd.queue.waiting <= 5
            assert crowd.queue.waiting == 0 or choices > at_once - at_once // 8 - 4, "less than the widest is free"
    await crowd.settle()
    await crowd.leave_all()
    assert (crowd.queue.running, crowd.queue.choices, crowd.queue.waiting) == (0, 0, 0)


async def test_the_estimated_wait_follows_recent_request_durations(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr("corral.serving.request_queue.time.monotonic", lambda: clock[0])
    queue = RequestQueue(2, 4)
    assert queue.wait_seconds(3) == 1, "nothing is known, and it says the least it can"
    began = [await queue.acquire("a") for _ in range(2)]
    clock[0] += 30
    assert queue.wait_seconds(2) == pytest.approx(30), "none has ended, and they take 30 seconds at least"
    for each in began:
        queue.release(each)
    assert queue.wait_seconds(4) == pytest.approx(60)
    for _ in range(100):
        each = await queue.acquire("a")
        clock[0] += 10
        queue.release(each)
    assert queue.wait_seconds(4) == pytest.approx(20, rel=0.01), "what happened lately counts"
    assert queue.wait_seconds(10**6) == 3600
