"""The bounded queue in front of the engines: how many requests run, how many wait, and which API key is next.

A request over the bounds is refused at once, with an estimate of when to try again.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass

from corral.serving.errors import server_full

_MAX_WAIT_SECONDS = 3600
_MEAN_WEIGHT = 0.1  # of the newest request in the running mean of request durations
_HALF_LIFE_SECONDS = 60.0  # after which a used token counts half towards whose turn it is


@dataclass(slots=True, eq=False)
class Slot:
    """Permission for one request to run."""

    key: str
    started: float
    """When it was granted, on the monotonic clock."""
    weight: int = 1
    """The choices that it generates at the same time."""


class RequestQueue:
    """Lets `at_once` requests run and `waiting` requests wait.

    The next slot goes to the key with fewest running choices; of equal ones, to the key that used the fewest tokens lately;
    then keys take turns. While several keys have requests, an eighth of the slots is for keys with no running request, so that
    one key's long requests do not block the others; a key alone has all slots. When the queue is full, a new request replaces
    the newest one of the key with the most waiting requests, if its own key has fewer: one key cannot fill the queue.

    Args:
        at_once: most running requests; at least 1.
        waiting: most waiting requests; with 0, a request that cannot run at once is refused.
    """

    def __init__(self, at_once: int, waiting: int) -> None:
        assert at_once > 0
        assert waiting >= 0
        self.at_once = at_once
        self.max_waiting = waiting
        self.reserved = at_once // 8
        self.running = 0
        self.waiting = 0
        self._running_by_key: Counter[str] = Counter()
        """The running choices of each key that has any."""
        self._queues: OrderedDict[str, deque[asyncio.Future[Slot]]] = OrderedDict()
        self._tokens: dict[str, tuple[float, float]] = {}
        """Key → (tokens it used lately, when that was counted)."""
        self._mean_seconds = 0.0
        """Running mean of request durations; 0 until one has finished."""
        self._start_sum = 0.0
        """Sum of the start times of running requests."""

    async def acquire(self, key: str) -> Slot:
        """Wait for a slot, which the caller must `release`.

        Raises:
            Refused: 503: the queue is full, or this request was evicted for a key with fewer requests.
        """
        # No queued request could start now (`_start_waiting` would have started it), so this one overtakes nobody.
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
                self._start_waiting()
            raise

    def set_weight(self, slot: Slot, choices: int) -> None:
        """Count a running request as so many choices."""
        self._running_by_key[slot.key] += choices - slot.weight
        slot.weight = choices

    def release(self, slot: Slot, tokens: int = 0) -> None:
        """Give back the slot of a request that used so many tokens, and start as many waiting requests as now may run."""
        now = time.monotonic()
        seconds = now - slot.started
        if self._mean_seconds:
            seconds = (1 - _MEAN_WEIGHT) * self._mean_seconds + _MEAN_WEIGHT * seconds
        self._mean_seconds = seconds
        self.running -= 1
        self._start_sum = self._start_sum - slot.started if self.running else 0.0
        self._running_by_key[slot.key] -= slot.weight
        if not self._running_by_key[slot.key]:
            del self._running_by_key[slot.key]
        if tokens:
            self._tokens[slot.key] = (self._tokens_lately(slot.key, now) + tokens, now)
        self._start_waiting()

    @property
    def seconds_per_request(self) -> float:
        """How long recent requests took to run; 0 if nothing is known."""
        mean_age = time.monotonic() - self._start_sum / self.running if self.running else 0.0
        return max(self._mean_seconds, mean_age)  # running requests take at least as long as they have run so far

    def wait_seconds(self, ahead: int) -> float:
        """Estimate how long it takes to start `ahead` requests."""
        return min(_MAX_WAIT_SECONDS, max(1.0, self.seconds_per_request * ahead / self.at_once))

    def _can_start(self, key: str) -> bool:
        others = len(self._running_by_key) - (key in self._running_by_key) + len(self._queues) - (key in self._queues)
        return self.running < self.at_once - (self.reserved if others and key in self._running_by_key else 0)

    def _start(self, key: str) -> Slot:
        slot = Slot(key, time.monotonic())
        self.running += 1
        self._running_by_key[key] += slot.weight
        self._start_sum += slot.started
        return slot

    def _start_waiting(self) -> None:
        now = time.monotonic()

        def turn(key: str) -> tuple[int, int]:
            return self._running_by_key[key], int(self._tokens_lately(key, now))

        while self.running < self.at_once:
            key = min(filter(self._can_start, self._queues), key=turn, default=None)
            if key is None:
                return
            self._queues.move_to_end(key)
            waiter = self._queues[key].popleft()
            self._removed(key)
            if not waiter.done():  # else it was cancelled, and its task has not run since
                waiter.set_result(self._start(key))

    def _tokens_lately(self, key: str, now: float) -> float:
        tokens, counted = self._tokens.get(key, (0.0, now))
        return tokens * 0.5 ** ((now - counted) / _HALF_LIFE_SECONDS)

    def _evict_newest(self, key: str) -> None:
        """Refuse the newest request of the longest queue. Raises: Refused (none is longer than the key's own would be)."""
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
