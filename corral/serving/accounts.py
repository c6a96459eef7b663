"""The callers of a server: authenticates them by API key, enforces their quotas and requests per minute, counts usage.

Keys are read about once a second while there are requests. Usage is counted in memory and added to the database about once a
second, so no request waits for a write; a server that is killed loses up to a second of counts.

A request reserves the most tokens that it may use before it runs, so that requests which run at the same time cannot use more
than the day's quota together; what it did use is settled at its end. Each server reserves for itself, and knows what others
settled a second or two later: n servers on one database may together use up to n times what was left of a quota, once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Protocol

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from corral.errors import CorralError
from corral.serving.database import run_in_thread
from corral.serving.errors import Refused, database_unavailable
from corral.serving.keys import NO_LIMITS, Key, KeySource, KeyUsage, Quota, hash_key, today
from corral.serving.logs import traceback_without_message
from corral.serving.protocol import Usage

_REFRESH_SECONDS = 1.0  # age after which keys are read again
_WAIT_SECONDS = 1.0  # most that a request waits for such a read while the known keys are recent enough
_READ_SECONDS = 5.0  # timeout of a read; the next one uses another connection
_MAX_AGE_SECONDS = 30.0  # if the keys could not be read for this long, nobody is let in
_log = logging.getLogger(__name__)


RATE_LIMIT_HEADERS = tuple(
    f"x-ratelimit-{part}-{unit}" for unit in ("requests", "tokens") for part in ("limit", "remaining", "reset")
)
"""The names of `Accounts.rate_limit_headers`."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request: the owner of a key, or anybody on a server without keys."""

    key_id: str
    """Conversations belong to this id. Empty for `ANONYMOUS`."""
    name: str
    """For people."""
    quota: Quota = NO_LIMITS
    is_admin: bool = False
    """Whether it may read metrics and change what is served."""


ANONYMOUS = Caller("", "anybody", is_admin=True)


class Reserve(Protocol):
    """How a request that is about to run says what it may use; see `OpenRequest.reserve`."""

    def __call__(self, prompt_tokens: int, max_tokens: int, choices: int = 1, *, may_shorten: bool = False) -> int:
        """Returns: `max_tokens` of each choice, or less. Raises: Refused (429)."""
        ...


def reserve_any(prompt_tokens: int, max_tokens: int, choices: int = 1, *, may_shorten: bool = False) -> int:
    """A `Reserve` without a quota."""
    return max_tokens


class OpenRequest:
    """A request for model work, from `Accounts.admit` until it is closed.

    Args:
        end: ends the request with an error; called when its key was revoked or has expired.
    """

    def __init__(self, accounts: Accounts, caller: Caller, end: Callable[[Refused], None]) -> None:
        self.caller = caller
        self.end = end
        self.reserved = 0
        """The most tokens that it may use."""
        self._accounts = accounts

    def reserve(
        self,
        prompt_tokens: int,
        max_tokens: int,
        choices: int = 1,
        *,
        may_shorten: bool = False,
        retry_seconds: float = 0.0,
    ) -> int:
        """Set aside what the request may use of the day's tokens.

        Args:
            prompt_tokens: of all prompts.
            max_tokens: of each choice.
            choices: of all prompts.
            may_shorten: reduce `max_tokens` to what is left, if that is at least 1.
            retry_seconds: when a running request of the key may end; for `Retry-After`.

        Returns: `max_tokens`, shortened if necessary.

        Raises:
            Refused: 429: the request may use more than is left.
        """
        most = self.caller.quota.tokens_per_day
        if most is None:
            return max_tokens
        self.reserved = 0
        left = self._accounts.tokens_left(self.caller)
        if may_shorten:
            max_tokens = min(max_tokens, max(1, (left - prompt_tokens) // choices))
        tokens = prompt_tokens + choices * max_tokens
        if tokens > left:
            unused = most - self._accounts.usage_today(self.caller.key_id).tokens
            need = f"this request may use {tokens} tokens with its prompt"
            if tokens <= unused:
                what = f"{need}, and this key's running requests hold all but {max(0, left)} of its {most} for today"
                raise Refused(429, what, retry_seconds=retry_seconds, code="rate_limit_exceeded")
            wait = _seconds_until_midnight() if tokens <= most else None
            what = (
                f"{need}, and this key has {max(0, unused)} of its {most} for today left: send less, or ask for fewer"
            )
            raise Refused(429, what, retry_seconds=wait, code="insufficient_quota")
        self.reserved = tokens
        return max_tokens

    def close(self, usage: Usage | None) -> None:
        """Settle the request, which used so much; None if it never ran."""
        self._accounts.close_request(self, usage)


class Accounts:
    """The callers of a server, with their quotas and usage.

    Args:
        keys: the API keys; None: no key is needed.
    """

    def __init__(self, keys: KeySource | None = None) -> None:
        self._keys = keys
        self._known: Mapping[str, Key] | None = None
        """Digest → key, as last read at `_known_at`."""
        self._known_at = float("-inf")
        self._last_read = float("-inf")
        self.requires_key = False
        """Refuse requests without a key even if there are no keys. Set by the server, and once any key was seen."""
        self._read_task: asyncio.Task[None] | None = None
        self._flush_task: asyncio.Task[None] | None = None
        self._awaited_tasks: Sequence[asyncio.Task[None]] = ()
        """The last read, and the flush that started with it, if any."""
        self._unwritten: dict[str, dict[str, KeyUsage]] = {}
        """Day → key id → usage that is not in the database yet."""
        self._stored_usage: tuple[str, Mapping[str, KeyUsage]] = ("", {})
        """(day, key id → usage of that day as last read from the database)"""
        self._open: defaultdict[str, set[OpenRequest]] = defaultdict(set)
        """Key id → its running and waiting requests."""
        self._watch_task: asyncio.Task[None] | None = None
        self._rates = MovingWindowRateLimiter(MemoryStorage())

    async def authenticate(self, authorization: str | None) -> Caller:
        """Return the caller who sent this `Authorization` header.

        Raises:
            Refused: 401: the server needs a key, and this is not a valid one; 503: the keys could not be read.
        """
        if self._keys is None:
            return ANONYMOUS
        keys = await self._current_keys()
        if not keys and not self.requires_key:
            return ANONYMOUS
        scheme, _, secret = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            raise _invalid_key("a key is needed, as the header 'Authorization: Bearer KEY'")
        # Found by its hash, so how long this takes says nothing about the keys that are not known.
        key = keys.get(hash_key(secret.strip()))
        _check_active(key)
        assert key is not None
        return Caller(key.id, key.name, key.quota, key.is_admin)

    def count_request(self, caller: Caller) -> None:
        """Count a request of any kind towards the key's requests per minute. Raises: Refused (429)."""
        most = caller.quota.requests_per_minute
        if most is None or self._rates.hit(_rate(most), caller.key_id):
            return
        wait = self._rates.get_window_stats(_rate(most), caller.key_id).reset_time - time.time()
        what = f"this key may send {most} requests a minute"
        raise Refused(429, what, retry_seconds=wait, code="rate_limit_exceeded")

    def rate_limit_headers(self, caller: Caller) -> dict[str, str]:
        """What is left of a key's quotas, and the seconds until more is, as OpenAI's headers; empty without quotas."""
        values: list[tuple[str, int, int, float]] = []
        if (most := caller.quota.requests_per_minute) is not None:
            stats = self._rates.get_window_stats(_rate(most), caller.key_id)
            values.append(("requests", most, stats.remaining, stats.reset_time - time.time()))
        if (most := caller.quota.tokens_per_day) is not None:
            values.append(("tokens", most, self.tokens_left(caller), _seconds_until_midnight()))
        headers: dict[str, str] = {}
        for unit, most, left, seconds in values:
            headers[f"x-ratelimit-limit-{unit}"] = str(most)
            headers[f"x-ratelimit-remaining-{unit}"] = str(max(0, left))
            headers[f"x-ratelimit-reset-{unit}"] = f"{max(0, math.ceil(seconds))}s"
        return headers

    def admit(self, caller: Caller, end: Callable[[Refused], None], seconds_per_request: float = 0.0) -> OpenRequest:
        """Check a request for model work against the key's quota; each admitted request must be closed.

        Args:
            end: see `OpenRequest`.
            seconds_per_request: how long recent requests took; for the estimate in `Retry-After`.

        Raises:
            Refused: 429: the quota is used up.
        """
        quota, opened = caller.quota, len(self._open.get(caller.key_id, ()))
        if quota.at_once is not None and opened >= quota.at_once:
            what = f"this key may have {quota.at_once} requests under way at once"
            wait = seconds_per_request / quota.at_once
            raise Refused(429, what, retry_seconds=wait, code="rate_limit_exceeded")
        used = self.usage_today(caller.key_id).tokens
        if quota.tokens_per_day is not None and used >= quota.tokens_per_day:
            what = f"this key's {quota.tokens_per_day} tokens for today are used up"
            raise Refused(429, what, retry_seconds=_seconds_until_midnight(), code="insufficient_quota")
        request = OpenRequest(self, caller, end)
        self._open[caller.key_id].add(request)
        if caller.key_id and self._watch_task is None:
            self._watch_task = asyncio.get_running_loop().create_task(self._watch())
        return request

    def close_request(self, request: OpenRequest, usage: Usage | None) -> None:
        """See `OpenRequest.close`."""
        key_id = request.caller.key_id
        self._open[key_id].remove(request)
        if not self._open[key_id]:
            del self._open[key_id]
        if key_id and usage is not None:
            self._record_usage(key_id, usage)

    def tokens_left(self, caller: Caller) -> int:
        """Tokens of the day's quota, which there must be, that are neither used nor reserved; negative if overdrawn."""
        assert caller.quota.tokens_per_day is not None
        reserved = sum(request.reserved for request in self._open.get(caller.key_id, ()))
        return caller.quota.tokens_per_day - self.usage_today(caller.key_id).tokens - reserved

    def usage_today(self, key_id: str) -> KeyUsage:
        """What a key used today, as far as this server knows; without running requests."""
        day = today()
        usage = self._unwritten.get(day, {}).get(key_id, KeyUsage())
        stored_day, stored = self._stored_usage
        return usage.plus(stored.get(key_id, KeyUsage())) if stored_day == day else usage

    async def close(self) -> None:
        """Write usage counts to the database; log those that could not be written, also if this is cancelled."""
        if self._watch_task is not None:
            self._watch_task.cancel()
        try:
            for _ in range(2):  # a flush that is already running may have started before the last request finished
                if self._keys is not None and self._unwritten:
                    await asyncio.wait([self._start_flush()])
        finally:
            for day, usage_by_key in self._unwritten.items():
                for key_id, usage in usage_by_key.items():
                    what = "not written: on %s key %s used %d requests, %d tokens of prompts and %d of answers"
                    _log.error(what, day, key_id, *usage)

    async def _watch(self) -> None:
        """Every second, as long as there are requests with a key: write usage, and end those whose key is no longer valid."""
        try:
            while any(self._open) or self._unwritten:
                await asyncio.sleep(_REFRESH_SECONDS)
                await asyncio.wait([self._start_read()])
                by_id = {key.id: key for key in (self._known or {}).values()}
                for key_id in filter(None, list(self._open) if self._known is not None else ()):
                    try:
                        _check_active(by_id.get(key_id))
                    except Refused as refused:
                        for request in list(self._open[key_id]):
                            request.end(refused)
        finally:
            self._watch_task = None

    def _record_usage(self, key_id: str, usage: Usage) -> None:
        usage_by_key = self._unwritten.setdefault(today(), {})
        new = KeyUsage(1, usage.prompt_tokens, usage.completion_tokens)
        usage_by_key[key_id] = usage_by_key.get(key_id, KeyUsage()).plus(new)

    async def _current_keys(self) -> Mapping[str, Key]:
        """Return the keys by digest, read again if they are older than a second. A slow database delays no request for long.

        Raises:
            Refused: 503: the keys are too old, and could not be read.
        """
        now = time.monotonic()
        is_due = self._read_task is not None or now - self._last_read >= _REFRESH_SECONDS
        if is_due and now - self._known_at >= _REFRESH_SECONDS:
            read_task = self._start_read()
            # `wait` does not cancel the tasks if this request is cancelled.
            await asyncio.wait(self._awaited_tasks, timeout=max(0.0, self._last_read + _WAIT_SECONDS - now))
            if self._is_outdated():
                await asyncio.wait([read_task])  # has a timeout of its own
        if self._known is None or self._is_outdated():
            raise database_unavailable()
        return self._known

    def _is_outdated(self) -> bool:
        """Whether the known keys are too old to let anybody in."""
        return time.monotonic() - self._known_at > _MAX_AGE_SECONDS

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

    async def _read_keys(self) -> None:
        assert self._keys is not None
        started = time.monotonic()
        try:
            with _log_failures():
                keys = await asyncio.wait_for(run_in_thread(self._keys.all), _READ_SECONDS)
                self._known, self._known_at = {key.digest: key for key in keys}, started
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
    except CorralError as error:
        _log.error("%s%s", error.what, f" ({error.where})" if error.where else "")
    except TimeoutError:
        _log.error("the database does not answer")
    except Exception as error:
        _log.error("the database failed: %s", traceback_without_message(error))


@lru_cache(maxsize=1024)
def _rate(requests: int) -> RateLimitItemPerMinute:
    return RateLimitItemPerMinute(requests)


def _invalid_key(what: str) -> Refused:
    return Refused(401, what, code="invalid_api_key")


def _check_active(key: Key | None) -> None:
    """Raises: Refused (401: it is not known, was revoked or has expired)."""
    if key is None:
        raise _invalid_key("this key is not known here")
    if not key.is_active:
        raise _invalid_key(f"this key {'has expired' if key.revoked is None else 'was revoked'}")


def _seconds_until_midnight() -> float:
    now = datetime.now(UTC)
    return 86400 - (now.hour * 3600 + now.minute * 60 + now.second)
