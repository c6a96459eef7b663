"""The one bounded queue before the engines: so many requests inside, so many waiting, and turns that go from key to key.

Over its bounds a request is refused at once, with an estimate of when it is worth asking again; nothing grows without end.
It does not know what a request is, who stands behind a key, or what the key may use.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, OrderedDict, deque
from typing import NamedTuple

from corral.serving.protocol import Refused

_LONGEST_WAIT = 3600
_WEIGHT = 0.1  # of the newest request in the mean of how long they take


class Busy(Refused):
    """A request that may be sent again, after so many seconds.

    Args:
        status: 429, where the caller's key is used up; 503, where the server is full.
        what: the fault, for the person who reads it.
        retry_seconds: what `Retry-After` says.
        code: what programs know it by.
    """

    def __init__(self, status: int, what: str, *, retry_seconds: float, code: str) -> None:
        super().__init__(status, what, code=code, retry_seconds=max(1, math.ceil(retry_seconds)))


class Place(NamedTuple):
    """A place inside."""

    key: str
    began: float
    """When it was taken, on the monotonic clock."""


class Places:
    """Room for `at_once` requests inside, and `waiting` outside.

    A place goes to the key that has the fewest inside, of several to each in turn, one request each; some are only for keys
    that have none inside, so that one key's long requests keep nobody waiting. Where all places outside are taken, whoever
    has fewer there than the key with the most takes the place of that key's newest: one key's thousand requests keep nobody
    else out.

    Args:
        at_once: the most inside; at least 1.
        waiting: the most that wait; 0 refuses whatever finds no place inside.
        reserved: of `at_once`, for keys that have none inside; less than that.
    """

    def __init__(self, at_once: int, waiting: int, reserved: int = 0) -> None:
        assert at_once > reserved >= 0
        assert waiting >= 0
        self.at_once = at_once
        self.most_waiting = waiting
        self.reserved = reserved
        self.inside = 0
        self.waiting = 0
        self._inside: Counter[str] = Counter()
        """Of each key."""
        self._queues: OrderedDict[str, deque[asyncio.Future[Place]]] = OrderedDict()
        self._mean = 0.0
        """Seconds that requests were inside, the latest weighing most; 0 before any has ended."""
        self._began = 0.0
        """When those inside began, summed."""

    async def take(self, key: str) -> Place:
        """Wait for a place inside.

        Returns: what `give_back` wants to have back, which must be called.

        Raises:
            Busy: there is no place to wait (503), or it went to somebody with fewer requests.
        """
        # Nobody waits who might enter.
        if self._may_enter(key):
            return self._enter(key)
        if self.waiting >= self.most_waiting:
            self._make_room(key)
        turn: asyncio.Future[Place] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(key, deque()).append(turn)
        self.waiting += 1
        try:
            return await turn
        except BaseException:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.give_back(turn.result())  # it got its place as it gave up
            elif turn in self._queues.get(key, ()):
                self._queues[key].remove(turn)
                self._left(key)
            raise

    def give_back(self, place: Place) -> None:
        """Leave the inside. `place` is what `take` returned."""
        seconds = time.monotonic() - place.began
        self._mean = seconds if not self._mean else (1 - _WEIGHT) * self._mean + _WEIGHT * seconds
        self.inside -= 1
        self._began = self._began - place.began if self.inside else 0.0
        self._inside[place.key] -= 1
        if not self._inside[place.key]:
            del self._inside[place.key]
        while (
            key := min(filter(self._may_enter, self._queues), key=self._inside.__getitem__, default=None)
        ) is not None:
            self._admit(key)

    @property
    def seconds_each(self) -> float:
        """How long a request is inside, going by how long requests take of late; 0 where nothing is known."""
        age = time.monotonic() - self._began / self.inside if self.inside else 0.0
        return max(self._mean, age)  # those inside take longer than they have taken so far

    def wait_seconds(self, ahead: int) -> float:
        """How long `ahead` requests take to get inside."""
        return min(_LONGEST_WAIT, max(1.0, self.seconds_each * ahead / self.at_once))

    def _may_enter(self, key: str) -> bool:
        return self.inside < self.at_once - (self.reserved if self._inside[key] else 0)

    def _enter(self, key: str) -> Place:
        place = Place(key, time.monotonic())
        self.inside += 1
        self._inside[key] += 1
        self._began += place.began
        return place

    def _admit(self, key: str) -> None:
        queue = self._queues[key]
        self._queues.move_to_end(key)
        turn = queue.popleft()
        self.waiting -= 1
        if not queue:
            del self._queues[key]
        if not turn.done():  # else it was cancelled, and is not yet aware of it
            turn.set_result(self._enter(key))

    def _make_room(self, key: str) -> None:
        """Send the newest of the longest queue away. Raises: Busy (none is longer than the key's own would be)."""
        own = len(self._queues.get(key, ()))
        longest = max(self._queues, key=lambda each: len(self._queues[each]), default=key)
        full = Busy(
            503,
            f"this server is full: {self.inside} requests are under way and {self.waiting} wait",
            retry_seconds=self.wait_seconds(self.waiting + 1),
            code="server_full",
        )
        if len(self._queues.get(longest, ())) <= own + 1:
            raise full
        turn = self._queues[longest].pop()
        self._left(longest)
        if not turn.done():
            turn.set_exception(full)

    def _left(self, key: str) -> None:
        """One of a key's turns was taken out of its queue."""
        self.waiting -= 1
        if not self._queues[key]:
            del self._queues[key]
