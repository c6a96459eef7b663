"""The bounded queue in front of the engines: how many requests run, how many wait, and which API key is next.

A request over the bounds is refused at once, with an estimate of when to try again.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict, deque
from typing import NamedTuple

from corral.serving.errors import server_full

_MAX_WAIT_SECONDS = 3600
_MEAN_WEIGHT = 0.1  # of the newest request in the running mean of request durations


class Slot(NamedTuple):
    """Permission for one request to run."""

    key: str
    started: float
    """When it was granted, on the monotonic clock."""


class RequestQueue:
    """Lets `at_once` requests run and `waiting` requests wait.

    The next slot goes to the key with the fewest running requests; keys with equally many take turns, one request each. Some
    slots are reserved for keys with no running request, so that one key's long requests do not block the others. When the
    queue is full, a new request replaces the newest one of the key with the most waiting requests, if its own key has fewer:
    one key cannot fill the queue.

    Args:
        at_once: most running requests; at least 1.
        waiting: most waiting requests; with 0, a request that cannot run at once is refused.
        reserved: how many of `at_once` are only for keys with no running request; less than `at_once`.
    """

    def __init__(self, at_once: int, waiting: int, reserved: int = 0) -> None:
        assert at_once > reserved >= 0
        assert waiting >= 0
        self.at_once = at_once
        self.max_waiting = waiting
        self.reserved = reserved
        self.running = 0
        self.waiting = 0
        self._running_by_key: Counter[str] = Counter()
        self._queues: OrderedDict[str, deque[asyncio.Future[Slot]]] = OrderedDict()
        self._mean_seconds = 0.0
        """Running mean of request durations; 0 until one has finished."""
        self._start_sum = 0.0
        """Sum of the start times of running requests."""

    async def acquire(self, key: str) -> Slot:
        """Wait for a slot, which the caller must `release`.

        Raises:
            Refused: 503: the queue is full, or this request was evicted for a key with fewer requests.
        """
        # No queued request could start now (`release` would have started it), so this one overtakes nobody.
        if self._can_start(key):
            return self._start(key)
        if self.waiting >= self.max_waiting:
            self._evict_newest(key)
        waiter: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(key, deque()).append(waiter)
        self.waiting += 1
        try:
            return await waiter
        except BaseException:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self.release(waiter.result())  # the slot was granted in the moment of the cancellation
            elif waiter in self._queues.get(key, ()):
                self._queues[key].remove(waiter)
                self._removed(key)
            raise

    def release(self, slot: Slot) -> None:
        """Give back a slot, and start as many waiting requests as now may run."""
        seconds = time.monotonic() - slot.started
        if self._mean_seconds:
            seconds = (1 - _MEAN_WEIGHT) * self._mean_seconds + _MEAN_WEIGHT * seconds
        self._mean_seconds = seconds
        self.running -= 1
        self._start_sum = self._start_sum - slot.started if self.running else 0.0
        self._running_by_key[slot.key] -= 1
        if not self._running_by_key[slot.key]:
            del self._running_by_key[slot.key]
        while (
            key := min(filter(self._can_start, self._queues), key=self._running_by_key.__getitem__, default=None)
        ) is not None:
            self._start_next(key)

    @property
    def seconds_per_request(self) -> float:
        """How long recent requests took to run; 0 if nothing is known."""
        mean_age = time.monotonic() - self._start_sum / self.running if self.running else 0.0
        return max(self._mean_seconds, mean_age)  # running requests take at least as long as they have run so far

    def wait_seconds(self, ahead: int) -> float:
        """Estimate how long it takes to start `ahead` requests."""
        return min(_MAX_WAIT_SECONDS, max(1.0, self.seconds_per_request * ahead / self.at_once))

    def _can_start(self, key: str) -> bool:
        return self.running < self.at_once - (self.reserved if self._running_by_key[key] else 0)

    def _start(self, key: str) -> Slot:
        slot = Slot(key, time.monotonic())
        self.running += 1
        self._running_by_key[key] += 1
        self._start_sum += slot.started
        return slot

    def _start_next(self, key: str) -> None:
        queue = self._queues[key]
        self._queues.move_to_end(key)
        waiter = queue.popleft()
        self._removed(key)
        if not waiter.done():  # else it was cancelled, and its task has not run since
            waiter.set_result(self._start(key))

    def _evict_newest(self, key: str) -> None:
        """Refuse the newest request of the longest queue. Raises: Refused (no queue is longer than the key's own would be)."""
        own = len(self._queues.get(key, ()))
        longest = max(self._queues, key=lambda each: len(self._queues[each]), default=key)
        count = f"{self.running} requests are running and {self.waiting} are waiting"
        full = server_full(count, self.wait_seconds(self.waiting + 1))
        if len(self._queues.get(longest, ())) <= own + 1:
            raise full
        waiter = self._queues[longest].pop()
        self._removed(longest)
        if not waiter.done():
            waiter.set_exception(full)

    def _removed(self, key: str) -> None:
        """Account for a waiter that was taken out of its key's queue."""
        self.waiting -= 1
        if not self._queues[key]:
            del self._queues[key]
