"""The bounded queue in front of the engines: how many choices run, how many requests wait, and which API key is next.

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
_MAX_KEYS = 1024  # whose tokens are remembered
_HALF_LIFE_SECONDS = 60.0  # after which a used token counts half towards whose turn it is


@dataclass(slots=True, eq=False)
class Slot:
    """Permission for one request to run."""

    key: str
    choices: int
    """That it generates at the same time: so many places of the engine are its own."""
    started: float
    """When it was granted, on the monotonic clock."""


class _Waiter(asyncio.Future[Slot]):
    """A request in the queue."""

    choices: int


class RequestQueue:
    """Lets requests of `at_once` choices run and `waiting` requests wait.

    The next places go to the key with fewest running choices; of equal ones, to the key that used the fewest tokens lately;
    then keys take turns. A request that needs more places than are free gets the next ones that become free, and one that
    needs more than there are runs alone. While several keys have requests, an eighth of the places is for keys with no running
    request, so that one key's long requests do not block the others; a key alone has all. When the queue is full, a new
    request replaces the newest one of the key with the most waiting requests, if its own key has fewer: one key cannot
    fill the queue.

    Args:
        at_once: most running choices; at least 1.
        waiting: most waiting requests; with 0, a request that cannot run at once is refused.
    """

    def __init__(self, at_once: int, waiting: int) -> None:
        assert at_once > 0
        assert waiting >= 0
        self.at_once = at_once
        self.max_waiting = waiting
        self.reserved = at_once // 8
        self.running = 0
        """Requests."""
        self.choices = 0
        """Of the running requests."""
        self.waiting = 0
        self._choices_by_key: Counter[str] = Counter()
        """The running choices of each key that has any."""
        self._queues: OrderedDict[str, deque[_Waiter]] = OrderedDict()
        self._tokens: dict[str, tuple[float, float]] = {}
        """Key → (tokens it used lately, when that was counted), of the keys that used any last; the latest at the end."""
        self._mean_seconds = 0.0
        """Running mean of request durations; 0 until one has finished."""
        self._start_sum = 0.0
        """Sum of the start times of running requests."""

    async def acquire(self, key: str, choices: int = 1) -> Slot:
        """Wait for places for so many choices; the caller must `release` the slot.

        Raises:
            Refused: 503: the queue is full, or this request was evicted for a key with fewer requests.
        """
        waiter = _Waiter(loop=asyncio.get_running_loop())
        waiter.choices = choices
        self._queues.setdefault(key, deque()).append(waiter)
        self.waiting += 1
        self._start_waiting()
        if self.waiting > self.max_waiting:
            self._evict_newest(key)
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

    def release(self, slot: Slot, tokens: int = 0) -> None:
        """Give back the slot of a request that used so many tokens, and start as many waiting requests as now may run."""
        now = time.monotonic()
        seconds = now - slot.started
        if self._mean_seconds:
            seconds = (1 - _MEAN_WEIGHT) * self._mean_seconds + _MEAN_WEIGHT * seconds
        self._mean_seconds = seconds
        self.running -= 1
        self.choices -= slot.choices
        self._start_sum = self._start_sum - slot.started if self.running else 0.0
        self._choices_by_key[slot.key] -= slot.choices
        if not self._choices_by_key[slot.key]:
            del self._choices_by_key[slot.key]
        if tokens:
            lately = self._tokens_lately(slot.key, now)
            self._tokens.pop(slot.key, None)
            self._tokens[slot.key] = (lately + tokens, now)
            if len(self._tokens) > _MAX_KEYS:
                del self._tokens[next(iter(self._tokens))]
        self._start_waiting()

    @property
    def seconds_per_request(self) -> float:
        """How long recent requests took to run; 0 if nothing is known."""
        mean_age = time.monotonic() - self._start_sum / self.running if self.running else 0.0
        return max(self._mean_seconds, mean_age)  # running requests take at least as long as they have run so far

    def wait_seconds(self, ahead: int) -> float:
        """Estimate how long it takes to start `ahead` requests, of as many choices as those that run."""
        choices = self.choices / self.running if self.running else 1.0
        return min(_MAX_WAIT_SECONDS, max(1.0, self.seconds_per_request * ahead * choices / self.at_once))

    def _most(self, key: str) -> int:
        """How many choices may run when one of this key's requests starts."""
        others = len(self._choices_by_key) - (key in self._choices_by_key) + len(self._queues) - (key in self._queues)
        return self.at_once - (self.reserved if others and key in self._choices_by_key else 0)

    def _start_waiting(self) -> None:
        now = time.monotonic()

        def turn(key: str) -> tuple[int, int]:
            return self._choices_by_key[key], int(self._tokens_lately(key, now))

        while self.choices < self.at_once:
            key = min((key for key in self._queues if self.choices < self._most(key)), key=turn, default=None)
            if key is None:
                return
            waiter = self._queues[key][0]
            if not waiter.done():  # else it was cancelled, and its task has not run since
                if self.running and self.choices + waiter.choices > self._most(key):
                    return  # nothing overtakes it, or it would wait as long as smaller requests come
                waiter.set_result(self._start(key, waiter.choices))
            self._queues.move_to_end(key)
            self._queues[key].popleft()
            self._removed(key)

    def _start(self, key: str, choices: int) -> Slot:
        slot = Slot(key, choices, time.monotonic())
        self.running += 1
        self.choices += choices
        self._choices_by_key[key] += choices
        self._start_sum += slot.started
        return slot

    def _tokens_lately(self, key: str, now: float) -> float:
        tokens, counted = self._tokens.get(key, (0.0, now))
        return tokens * 0.5 ** ((now - counted) / _HALF_LIFE_SECONDS)

    def _evict_newest(self, key: str) -> None:
        """Refuse the newest request of the longest queue; of equal ones, of this key's."""
        longest = max(self._queues, key=lambda each: (len(self._queues[each]), each == key))
        waiter = self._queues[longest].pop()
        self._removed(longest)
        count = f"{self.running} requests are running and {self.waiting} are waiting"
        if not waiter.done():
            waiter.set_exception(server_full(count, self.wait_seconds(self.waiting + 1)))

    def _removed(self, key: str) -> None:
        """Account for a waiter that was taken out of its key's queue."""
        self.waiting -= 1
        if not self._queues[key]:
            del self._queues[key]
