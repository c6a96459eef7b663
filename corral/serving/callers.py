"""Who asks, as a running server knows it: keys read from the database every second or so, and what each may still use.

What is used is counted here and added to the database with the next reading, so that no request waits for a write and no token
costs one; a server that is killed loses the count of a second. It does not know what a request is for, or what it waits for.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol

from corral.errors import DatabaseError
from corral.serving.admission import Busy
from corral.serving.keys import Key, Keys, Quota, Used, key_id, today
from corral.serving.protocol import Refused, Usage

_FRESH_SECONDS = 1.0
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


@dataclass(frozen=True, slots=True)
class _Known:
    """What the database said."""

    keys: Mapping[str, Key]
    used: Mapping[str, Used]
    """Of the day."""
    day: str
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
        self._syncing: asyncio.Task[None] | None = None
        self._later: asyncio.TimerHandle | None = None
        self._pending: dict[str, dict[str, Used]] = {}
        """Day → key → used, not in the database yet."""
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
        if not known.keys:
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

    def admit(self, caller: Caller, seconds_each: float = 0.0) -> None:
        """Count a request against what its key may use; every return needs a `left`.

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
        if quota.requests_per_minute is not None:
            window = self._windows.setdefault(caller.key, Window())
            wait = window.seconds_until(quota.requests_per_minute)
            if wait > 0:
                what = f"this key may send {quota.requests_per_minute} requests a minute"
                raise Busy(429, what, retry_seconds=wait, code="rate_limit_exceeded")
            window.add()
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
        if self._known is not None and self._known.day == day:
            used = used.plus(self._known.used.get(key, Used()))
        return used

    async def close(self) -> None:
        """Write down what was used. A database that cannot be reached is logged."""
        if self._later is not None:
            self._later.cancel()
        for _ in range(2):  # what is written just now may have been taken before the last request ended
            if self._keys is not None and self._pending:
                await self._sync()

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
        now, known = time.monotonic(), self._known
        is_due = self._syncing is not None or now - self._tried >= _FRESH_SECONDS
        if is_due and (known is None or now - known.at >= _FRESH_SECONDS):
            await self._sync()
        known = self._known
        if known is None or time.monotonic() - known.at > _STALE_SECONDS:
            what = "the database of this server cannot be reached"
            raise Refused(503, what, code="database_unavailable", retry_seconds=1)
        return known

    def _write(self) -> None:
        self._later = None
        self._start()

    async def _sync(self) -> None:
        # Shielded: who waits for it may go, and others wait too.
        await asyncio.shield(self._start())

    def _start(self) -> asyncio.Task[None]:
        if self._syncing is None:
            self._syncing = asyncio.create_task(self._exchange())
        return self._syncing

    async def _exchange(self) -> None:
        """Write what was used, read what is known."""
        assert self._keys is not None
        self._tried = time.monotonic()
        try:
            for day, used in list(self._pending.items()):
                counted = dict(used)
                await asyncio.to_thread(self._keys.count, day, counted)
                self._subtract(day, counted)
            self._known = await asyncio.to_thread(self._read, self._keys)
        except DatabaseError as error:
            _log.error("%s", error.what)
        finally:
            self._syncing = None

    def _subtract(self, day: str, counted: Mapping[str, Used]) -> None:
        """Take what was written from what is pending, and keep it in what is known until that is read anew."""
        of_day = self._pending[day]
        for key, used in counted.items():
            left = Used(*(a - b for a, b in zip(of_day.pop(key), used, strict=True)))
            if any(left):
                of_day[key] = left
        if not of_day:
            del self._pending[day]
        known = self._known
        if known is not None and known.day == day:
            both = {**known.used, **{key: known.used.get(key, Used()).plus(used) for key, used in counted.items()}}
            self._known = _Known(known.keys, both, day, known.at)

    @staticmethod
    def _read(keys: Keys) -> _Known:
        at, day = time.monotonic(), today()
        return _Known({key.id: key for key in keys.all()}, keys.used(day), day, at)


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
