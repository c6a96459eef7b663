"""Who asks, as a running server knows it: keys read from the database every second or so, and what each may still use.

What is used is counted here and added to the database every second or so, so that no request waits for a write and no token
costs one; a server that is killed loses the count of a second. It does not know what a request is for, or what it waits for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter, defaultdict, deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import NamedTuple, Protocol

from corral.errors import DatabaseError
from corral.serving.api_keys import Key, Keys, Quota, Used, key_id, today
from corral.serving.database import beside
from corral.serving.http_responses import trace
from corral.serving.protocol import Refused, Usage
from corral.serving.request_queue import Busy

_FRESH_SECONDS = 1.0
_PATIENT_SECONDS = 1.0  # for which a request waits to hear anew what is known already
_READ_SECONDS = 5.0  # after which a reading is given up, and the next one made over another connection
_STALE_SECONDS = 30.0  # for which a database that cannot be reached is forgiven; then nobody is let in on old knowledge
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: a key, or anybody where there are none."""

    key: str
    """The key's id: what conversations belong to. Empty for anybody."""
    name: str
    """For people."""
    quota: Quota = field(default_factory=Quota)


ANYBODY = Caller("", "anybody")


class Counts(Protocol):
    """What uses tokens as it goes on."""

    @property
    def usage(self) -> Usage:
        """So far."""
        ...


class _Known(NamedTuple):
    """What the database said of keys."""

    keys: Mapping[str, Key]
    at: float
    """When, on the monotonic clock."""


class Callers:
    """The callers of a server.

    Args:
        keys: where keys are kept; None: there are none, and anybody may ask.
    """

    def __init__(self, keys: Keys | None = None) -> None:
        self._keys = keys
        self._known: _Known | None = None
        self._tried = float("-inf")
        self.is_locked = False
        """Whether nobody comes in without a key even if there is none: once there was one, and where the server says so."""
        self._reading: asyncio.Task[None] | None = None
        self._settling: asyncio.Task[None] | None = None
        self._awaited: Sequence[asyncio.Task[None]] = ()
        """What began with the last reading, and itself."""
        self._later: asyncio.TimerHandle | None = None
        self._pending: dict[str, dict[str, Used]] = {}
        """Day → key → used, not in the database yet."""
        self._used: tuple[str, Mapping[str, Used]] = ("", {})
        """(a day, what keys used on it as the database said)"""
        self._held: Counter[str] = Counter()
        """Requests of a key that are under way or wait."""
        self._working: defaultdict[str, dict[int, Counts]] = defaultdict(dict)
        """Key → what works for it, by its `id`."""
        self._windows: dict[str, Window] = {}

    async def identify(self, authorization: str | None) -> Caller:
        """Who sends this header.

        Raises:
            Refused: 401: there are keys, and this is none of them; 503: the database that knows cannot be reached.
        """
        if self._keys is None:
            return ANYBODY
        known = await self._fresh()
        if not known.keys and not self.is_locked:
            return ANYBODY
        scheme, _, secret = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            raise _unknown("a key is needed, as the header 'Authorization: Bearer KEY'")
        secret = secret.strip()
        key = known.keys.get(key_id(secret) or "")
        if key is None or not key.opens_with(secret):
            raise _unknown("this key is not known here")
        if not key.works:
            raise _unknown(f"this key {'has expired' if key.revoked is None else 'was revoked'}")
        return Caller(key.id, key.name, key.quota)

    def came(self, caller: Caller) -> None:
        """Count a request of any kind against those that its key may send in a minute. Raises: Busy (429)."""
        most = caller.quota.requests_per_minute
        if most is None:
            return
        window = self._windows.setdefault(caller.key, Window())
        wait = window.seconds_until(most)
        if wait > 0:
            what = f"this key may send {most} requests a minute"
            raise Busy(429, what, retry_seconds=wait, code="rate_limit_exceeded")
        window.add()

    def admit(self, caller: Caller, seconds_each: float = 0.0) -> None:
        """Hold a request for work against what its key may use; every return needs a `left`.

        Tokens may be overdrawn by what is under way when they run out.

        Args:
            seconds_each: how long a request takes of late.

        Raises:
            Busy: 429: the key has nothing left, and when it will.
        """
        quota = caller.quota
        if quota.at_once is not None and self._held[caller.key] >= quota.at_once:
            what = f"this key may have {quota.at_once} requests under way at once"
            wait = seconds_each / quota.at_once
            raise Busy(429, what, retry_seconds=wait, code="rate_limit_exceeded")
        if quota.tokens_per_day is not None and self._tokens(caller.key) >= quota.tokens_per_day:
            what = f"this key's {quota.tokens_per_day} tokens for today are used up"
            raise Busy(429, what, retry_seconds=_until_tomorrow(), code="insufficient_quota")
        self._held[caller.key] += 1

    def turned_away(self, caller: Caller) -> None:
        """An admitted request found no place: it is none of those a minute."""
        if caller.key in self._windows:
            self._windows[caller.key].take_back()

    def began(self, caller: Caller, work: Counts) -> None:
        """An admitted request is worked on."""
        self._working[caller.key][id(work)] = work

    def left(self, caller: Caller, work: Counts | None) -> None:
        """An admitted request is over; `work`, if it was worked on."""
        self._held[caller.key] -= 1
        if not self._held[caller.key]:
            del self._held[caller.key]
        if work is None:
            return
        del self._working[caller.key][id(work)]
        if not self._working[caller.key]:
            del self._working[caller.key]
        if caller.key:
            self._count(caller.key, work.usage)

    def used_today(self, key: str) -> Used:
        """What a key used today, as far as this server knows."""
        day = today()
        used = self._pending.get(day, {}).get(key, Used())
        known_day, known = self._used
        return used.plus(known.get(key, Used())) if known_day == day else used

    async def close(self) -> None:
        """Write down what was used. What cannot be written, or is not yet when this is cancelled, is logged."""
        if self._later is not None:
            self._later.cancel()
        try:
            for _ in range(2):  # what is written just now may have been taken before the last request ended
                if self._keys is not None and self._pending:
                    await asyncio.wait([self._settle()])
        finally:
            for day, of_day in self._pending.items():
                for key, used in of_day.items():
                    what = "not written: on %s key %s used %d requests, %d tokens of prompts and %d of answers"
                    _log.error(what, day, key, *used)

    def _tokens(self, key: str) -> int:
        """Used today, with those of what is under way."""
        return self.used_today(key).tokens + sum(
            work.usage.total_tokens for work in self._working.get(key, {}).values()
        )

    def _count(self, key: str, usage: Usage) -> None:
        of_day = self._pending.setdefault(today(), {})
        used = Used(1, usage.prompt_tokens, usage.completion_tokens)
        of_day[key] = of_day.get(key, Used()).plus(used)
        if self._later is None:
            self._later = asyncio.get_running_loop().call_later(_FRESH_SECONDS, self._write)

    async def _fresh(self) -> _Known:
        """What is known, read anew if it has to be. A database that is slow to answer delays nobody for long.

        Raises:
            Refused: 503: what is known is too old.
        """
        now, known = time.monotonic(), self._known
        is_due = self._reading is not None or now - self._tried >= _FRESH_SECONDS
        if is_due and (known is None or now - known.at >= _FRESH_SECONDS):
            reading = self._read_anew()
            # Who waits may go: that does not end what is waited for.
            await asyncio.wait(self._awaited, timeout=max(0.0, self._tried + _PATIENT_SECONDS - now))
            if self._recent() is None:
                await asyncio.wait([reading])  # which is given up in time
        known = self._recent()
        if known is None:
            what = "the database of this server cannot be reached"
            raise Refused(503, what, code="database_unavailable", retry_seconds=1)
        return known

    def _recent(self) -> _Known | None:
        """What is known, if it may still be gone by."""
        known = self._known
        return None if known is None or time.monotonic() - known.at > _STALE_SECONDS else known

    def _read_anew(self) -> asyncio.Task[None]:
        if self._reading is None:
            self._tried = time.monotonic()
            self._reading = asyncio.create_task(self._read())
            # A settling that still waits for the database is not waited for again.
            self._awaited = (self._reading, *([] if self._settling else [self._settle()]))
        return self._reading

    def _settle(self) -> asyncio.Task[None]:
        """Apart from the keys: a database that is full, or that another program has locked, can be read all the same."""
        if self._settling is None:
            self._settling = asyncio.create_task(self._exchange())
        return self._settling

    def _write(self) -> None:
        self._later = None
        self._settle()

    async def _read(self) -> None:
        """Learn which keys there are."""
        assert self._keys is not None
        at = time.monotonic()
        try:
            with _logged():
                keys = await asyncio.wait_for(beside(self._keys.all), _READ_SECONDS)
                self._known = _Known({key.id: key for key in keys}, at)
                self.is_locked = self.is_locked or bool(keys)
        finally:
            self._reading = None

    async def _exchange(self) -> None:
        """Write what was used, read what all servers used; what cannot be written is kept for the next time."""
        assert self._keys is not None
        try:
            with _logged():
                for day, used in list(self._pending.items()):
                    counted = dict(used)
                    await beside(self._keys.count, day, counted)
                    self._subtract(day, counted)
            with _logged():
                day = today()
                self._used = (day, await beside(self._keys.used, day))
        finally:
            self._settling = None

    def _subtract(self, day: str, counted: Mapping[str, Used]) -> None:
        """Take what was written from what is pending, and keep it in what is known until that is read anew."""
        of_day = self._pending[day]
        for key, used in counted.items():
            left = Used(*(a - b for a, b in zip(of_day.pop(key), used, strict=True)))
            if any(left):
                of_day[key] = left
        if not of_day:
            del self._pending[day]
        known_day, known = self._used
        if known_day == day:
            both = {key: known.get(key, Used()).plus(used) for key, used in counted.items()}
            self._used = (day, {**known, **both})


@contextlib.contextmanager
def _logged() -> Generator[None]:
    """What the database fails in is logged; what is known stays, and grows old."""
    try:
        yield
    except DatabaseError as error:
        _log.error("%s", error.what)
    except TimeoutError:
        _log.error("the database does not answer")
    except Exception as error:
        _log.error("the database failed: %s", trace(error))


class Window:
    """At most so many events in any 60 seconds."""

    def __init__(self) -> None:
        self._times: deque[float] = deque()

    def seconds_until(self, most: int) -> float:
        """How long until one more is allowed; 0: now."""
        now = time.monotonic()
        while self._times and self._times[0] <= now - 60:
            self._times.popleft()
        return 0.0 if len(self._times) < most else self._times[len(self._times) - most] + 60 - now

    def add(self) -> None:
        """One more happens now."""
        self._times.append(time.monotonic())

    def take_back(self) -> None:
        """The last did not happen after all."""
        if self._times:
            self._times.pop()


def _unknown(what: str) -> Refused:
    return Refused(401, what, code="invalid_api_key")


def _until_tomorrow() -> float:
    now = datetime.now(UTC)
    return 86400 - (now.hour * 3600 + now.minute * 60 + now.second)
