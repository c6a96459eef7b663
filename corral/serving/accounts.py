"""The callers of a server: authenticates them by API key, enforces their quotas and requests per minute, counts usage.

Keys are read from the database about once a second. Usage is counted in memory and added to the database about once a second,
so no request waits for a write; a server that is killed loses up to a second of counts.
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
from corral.serving.database import run_in_thread
from corral.serving.errors import Refused, database_unavailable
from corral.serving.keys import Key, KeyStore, KeyUsage, Quota, parse_key_id, today
from corral.serving.logs import traceback_without_message
from corral.serving.protocol import Usage

_REFRESH_SECONDS = 1.0  # age after which keys are read again
_WAIT_SECONDS = 1.0  # most that a request waits for such a read while the known keys are recent enough
_READ_SECONDS = 5.0  # timeout of a read; the next one uses another connection
_MAX_AGE_SECONDS = 30.0  # if the keys could not be read for this long, nobody is let in
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request: the owner of a key, or anybody on a server without keys."""

    key_id: str
    """Conversations belong to this id. Empty for `ANONYMOUS`."""
    name: str
    """For people."""
    quota: Quota = field(default_factory=Quota)
    is_admin: bool = False
    """Whether it may read metrics and change what is served."""


ANONYMOUS = Caller("", "anybody", is_admin=True)


class HasUsage(Protocol):
    """A request in progress, whose token count grows."""

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        ...


class _KeySnapshot(NamedTuple):
    """The keys as last read from the database."""

    keys: Mapping[str, Key]
    """By id."""
    read_at: float
    """On the monotonic clock."""


class Accounts:
    """The callers of a server, with their quotas and usage.

    Args:
        keys: the API keys; None: no key is needed.
    """

    def __init__(self, keys: KeyStore | None = None) -> None:
        self._keys = keys
        self._snapshot: _KeySnapshot | None = None
        self._last_read = float("-inf")
        self.requires_key = False
        """Refuse requests without a key even if there are no keys. Set by the server, and once any key was seen."""
        self._read_task: asyncio.Task[None] | None = None
        self._flush_task: asyncio.Task[None] | None = None
        self._awaited_tasks: Sequence[asyncio.Task[None]] = ()
        """The last read, and the flush that started with it, if any."""
        self._flush_timer: asyncio.TimerHandle | None = None
        self._unwritten: dict[str, dict[str, KeyUsage]] = {}
        """Day → key id → usage that is not in the database yet."""
        self._stored_usage: tuple[str, Mapping[str, KeyUsage]] = ("", {})
        """(day, key id → usage of that day as last read from the database)"""
        self._open_requests: Counter[str] = Counter()
        """Running and waiting requests of each key."""
        self._running: defaultdict[str, dict[int, HasUsage]] = defaultdict(dict)
        """Key id → its running requests, by their `id()`."""
        self._windows: dict[str, RateWindow] = {}

    async def authenticate(self, authorization: str | None) -> Caller:
        """Return the caller who sent this `Authorization` header.

        Raises:
            Refused: 401: the server needs a key, and this is not a valid one; 503: the keys could not be read.
        """
        if self._keys is None:
            return ANONYMOUS
        snapshot = await self._current_keys()
        if not snapshot.keys and not self.requires_key:
            return ANONYMOUS
        scheme, _, secret = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            raise _invalid_key("a key is needed, as the header 'Authorization: Bearer KEY'")
        secret = secret.strip()
        key = snapshot.keys.get(parse_key_id(secret) or "")
        if key is None or not key.matches(secret):
            raise _invalid_key("this key is not known here")
        if not key.is_active:
            raise _invalid_key(f"this key {'has expired' if key.revoked is None else 'was revoked'}")
        return Caller(key.id, key.name, key.quota)

    def count_request(self, caller: Caller) -> None:
        """Count a request of any kind towards the key's requests per minute. Raises: Refused (429)."""
        most = caller.quota.requests_per_minute
        if most is None:
            return
        window = self._windows.setdefault(caller.key_id, RateWindow())
        wait = window.seconds_until(most)
        if wait > 0:
            what = f"this key may send {most} requests a minute"
            raise Refused(429, what, retry_seconds=wait, code="rate_limit_exceeded")
        window.add()

    def uncount_request(self, caller: Caller) -> None:
        """Take back `count_request` for an admitted request that the full queue refused."""
        if caller.key_id in self._windows:
            self._windows[caller.key_id].remove_last()

    def admit(self, caller: Caller, seconds_per_request: float = 0.0) -> None:
        """Check a request for model work against the key's quota; each admitted request must be `finished`.

        Running requests are not stopped when the day's tokens run out, so these may be overdrawn.

        Args:
            seconds_per_request: how long recent requests took; for the estimate in `Retry-After`.

        Raises:
            Refused: 429: the quota is used up.
        """
        quota = caller.quota
        if quota.at_once is not None and self._open_requests[caller.key_id] >= quota.at_once:
            what = f"this key may have {quota.at_once} requests under way at once"
            wait = seconds_per_request / quota.at_once
            raise Refused(429, what, retry_seconds=wait, code="rate_limit_exceeded")
        if quota.tokens_per_day is not None and self._tokens_today(caller.key_id) >= quota.tokens_per_day:
            what = f"this key's {quota.tokens_per_day} tokens for today are used up"
            raise Refused(429, what, retry_seconds=_seconds_until_midnight(), code="insufficient_quota")
        self._open_requests[caller.key_id] += 1

    def started(self, caller: Caller, handler: HasUsage) -> None:
        """An admitted request has a slot, and its tokens count from now on."""
        self._running[caller.key_id][id(handler)] = handler

    def finished(self, caller: Caller, handler: HasUsage | None) -> None:
        """An admitted request is over; `handler` is the one given to `started`, or None if it never started."""
        self._open_requests[caller.key_id] -= 1
        if not self._open_requests[caller.key_id]:
            del self._open_requests[caller.key_id]
        if handler is None:
            return
        del self._running[caller.key_id][id(handler)]
        if not self._running[caller.key_id]:
            del self._running[caller.key_id]
        if caller.key_id:
            self._record_usage(caller.key_id, handler.usage)

    def usage_today(self, key_id: str) -> KeyUsage:
        """What a key used today, as far as this server knows; without running requests."""
        day = today()
        usage = self._unwritten.get(day, {}).get(key_id, KeyUsage())
        stored_day, stored = self._stored_usage
        return usage.plus(stored.get(key_id, KeyUsage())) if stored_day == day else usage

    async def close(self) -> None:
        """Write usage counts to the database; log those that could not be written, also if this is cancelled."""
        if self._flush_timer is not None:
            self._flush_timer.cancel()
        try:
            for _ in range(2):  # a flush that is already running may have started before the last request finished
                if self._keys is not None and self._unwritten:
                    await asyncio.wait([self._start_flush()])
        finally:
            for day, usage_by_key in self._unwritten.items():
                for key_id, usage in usage_by_key.items():
                    what = "not written: on %s key %s used %d requests, %d tokens of prompts and %d of answers"
                    _log.error(what, day, key_id, *usage)

    def _tokens_today(self, key_id: str) -> int:
        """Tokens used today, with those of running requests."""
        running = self._running.get(key_id, {}).values()
        return self.usage_today(key_id).tokens + sum(handler.usage.total_tokens for handler in running)

    def _record_usage(self, key_id: str, usage: Usage) -> None:
        usage_by_key = self._unwritten.setdefault(today(), {})
        new = KeyUsage(1, usage.prompt_tokens, usage.completion_tokens)
        usage_by_key[key_id] = usage_by_key.get(key_id, KeyUsage()).plus(new)
        if self._flush_timer is None:
            self._flush_timer = asyncio.get_running_loop().call_later(_REFRESH_SECONDS, self._flush_after_timer)

    async def _current_keys(self) -> _KeySnapshot:
        """Return the keys, read again if they are older than a second. A slow database delays no request for long.

        Raises:
            Refused: 503: the keys are too old, and could not be read.
        """
        now, snapshot = time.monotonic(), self._snapshot
        is_due = self._read_task is not None or now - self._last_read >= _REFRESH_SECONDS
        if is_due and (snapshot is None or now - snapshot.read_at >= _REFRESH_SECONDS):
            read_task = self._start_read()
            # `wait` does not cancel the tasks if this request is cancelled.
            await asyncio.wait(self._awaited_tasks, timeout=max(0.0, self._last_read + _WAIT_SECONDS - now))
            if self._usable_snapshot() is None:
                await asyncio.wait([read_task])  # has a timeout of its own
        snapshot = self._usable_snapshot()
        if snapshot is None:
            raise database_unavailable()
        return snapshot

    def _usable_snapshot(self) -> _KeySnapshot | None:
        """The known keys, unless they are too old."""
        snapshot = self._snapshot
        return None if snapshot is None or time.monotonic() - snapshot.read_at > _MAX_AGE_SECONDS else snapshot

    def _start_read(self) -> asyncio.Task[None]:
        if self._read_task is None:
            self._last_read = time.monotonic()
            self._read_task = asyncio.create_task(self._read_keys())
            # If an older flush is still pending, requests do not wait for it again.
            self._awaited_tasks = (self._read_task, *([] if self._flush_task else [self._start_flush()]))
        return self._read_task

    def _start_flush(self) -> asyncio.Task[None]:
        """Separate from reading keys: a database that is full or locked can still be read."""
        if self._flush_task is None:
            self._flush_task = asyncio.create_task(self._flush())
        return self._flush_task

    def _flush_after_timer(self) -> None:
        self._flush_timer = None
        self._start_flush()

    async def _read_keys(self) -> None:
        assert self._keys is not None
        started = time.monotonic()
        try:
            with _log_failures():
                keys = await asyncio.wait_for(run_in_thread(self._keys.all), _READ_SECONDS)
                self._snapshot = _KeySnapshot({key.id: key for key in keys}, started)
                self.requires_key = self.requires_key or bool(keys)
        finally:
            self._read_task = None

    async def _flush(self) -> None:
        """Write this server's usage, read that of all servers; keep what could not be written for the next time."""
        assert self._keys is not None
        try:
            with _log_failures():
                for day, usage_by_key in list(self._unwritten.items()):
                    written = dict(usage_by_key)
                    await run_in_thread(self._keys.add_usage, day, written)
                    self._mark_written(day, written)
            with _log_failures():
                day = today()
                self._stored_usage = (day, await run_in_thread(self._keys.usage_on, day))
        finally:
            self._flush_task = None

    def _mark_written(self, day: str, written: Mapping[str, KeyUsage]) -> None:
        """Move usage from `_unwritten` to `_stored_usage`."""
        unwritten = self._unwritten[day]
        for key_id, usage in written.items():
            rest = KeyUsage(*(a - b for a, b in zip(unwritten.pop(key_id), usage, strict=True)))
            if any(rest):
                unwritten[key_id] = rest
        if not unwritten:
            del self._unwritten[day]
        stored_day, stored = self._stored_usage
        if stored_day == day:
            sums = {key_id: stored.get(key_id, KeyUsage()).plus(usage) for key_id, usage in written.items()}
            self._stored_usage = (day, {**stored, **sums})


@contextlib.contextmanager
def _log_failures() -> Generator[None]:
    """Log errors of the database and go on with what is known."""
    try:
        yield
    except DatabaseError as error:
        _log.error("%s", error.what)
    except TimeoutError:
        _log.error("the database does not answer")
    except Exception as error:
        _log.error("the database failed: %s", traceback_without_message(error))


class RateWindow:
    """Counts events of the last 60 seconds."""

    def __init__(self) -> None:
        self._times: deque[float] = deque()

    def seconds_until(self, most: int) -> float:
        """How long until there are fewer than `most` events; 0 if there are now."""
        now = time.monotonic()
        while self._times and self._times[0] <= now - 60:
            self._times.popleft()
        return 0.0 if len(self._times) < most else self._times[len(self._times) - most] + 60 - now

    def add(self) -> None:
        """Count an event that happens now."""
        self._times.append(time.monotonic())

    def remove_last(self) -> None:
        """Forget the newest event, if there is one."""
        if self._times:
            self._times.pop()


def _invalid_key(what: str) -> Refused:
    return Refused(401, what, code="invalid_api_key")


def _seconds_until_midnight() -> float:
    now = datetime.now(UTC)
    return 86400 - (now.hour * 3600 + now.minute * 60 + now.second)
