"""Requests to several endpoints that serve the same model: which one to ask, when to ask again, which ones to leave alone.

- Requests take turns at the endpoints. For more (the least loaded, the one that has the prompt in its cache), give the one URL
  of a load balancer: nginx, vLLM's router.
- An endpoint that is busy (429, 503, 504) is not asked again by this request until its Retry-After has passed.
- An endpoint that cannot be reached, or that fails three times in a row, rests: for a while, longer each time, and until it
  lists its model again.
- Requests under way at an endpoint that is silent in three checks are taken from it, and asked elsewhere.
- An endpoint that answers with an error counts as failed only if another one answers the same request.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx2

from corral.engines.base import ReplicaHealth
from corral.engines.remote.client import SILENT, UNREACHABLE, EndpointClient, ListedModel, TransientError
from corral.engines.remote.protocol import api_url, auth_header, one_line
from corral.errors import EngineError, EngineUnavailableError, InputError, ModelError, RequestError

T = TypeVar("T")

_SETUP_REQUESTS = 64  # at once, before `monitor`
_PROBE_SECONDS = 10.0  # a list of models is no work
_LONGEST_REST = 300.0  # a request waits for no endpoint that asks for more
_MAX_FAILURES = (
    3  # in a row: of requests, after which an endpoint rests; of silent checks, after which it gives no answer any more
)


@dataclass(slots=True)
class _Endpoint:
    client: EndpointClient
    requests: set[asyncio.Timeout] = field(default_factory=set[asyncio.Timeout])
    """One for each request under way, which ends it if rescheduled."""
    silent_checks: int = 0
    """Since it last passed one."""
    failures: int = 0
    """Requests in a row that failed, not counting those that it was too busy for."""
    rests: int = 0
    """In a row."""
    rests_until: float = 0.0
    """On the monotonic clock."""
    failure: str = ""
    """The last one."""
    kind: str = ""
    """Of the last failure; see TransientError."""
    status: int | None = None
    """Of the response to the last request that failed, if there was one."""
    recovery: asyncio.Task[None] | None = None
    """Waits until a resting endpoint is back; None while it may be asked."""

    @property
    def url(self) -> str:
        return self.client.url


class FailoverClient:
    """The endpoints and the connections to them. All coroutines belong to one event loop.

    Its arguments are those of RemoteEngine; `urls` may lack their `/v1`. Raises: InputError (a URL or the key cannot be used).
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        key: str | None,
        timeout_seconds: float,
        retries: int,
        backoff_seconds: float,
        check_seconds: float | None = None,
    ) -> None:
        if not urls:
            raise InputError("no URL of an endpoint is given", hint="give one, such as http://127.0.0.1:8000/v1")
        api_urls = list(dict.fromkeys(map(api_url, urls)))
        auth_header(key, *api_urls)
        self._endpoints = [_Endpoint(EndpointClient(url, key, timeout_seconds)) for url in api_urls]
        self._turn = 0
        self._key = key
        self._retries = retries
        self._backoff = backoff_seconds
        self._check_seconds = check_seconds
        self._model: str | None = None
        self._any_available = asyncio.Event()
        self._checks: asyncio.Task[None] | None = None
        self._slots = asyncio.Semaphore(_SETUP_REQUESTS)

    @property
    def health(self) -> list[ReplicaHealth]:
        """The state of each endpoint, in the given order."""
        return [ReplicaHealth(each.url, None if each.recovery is None else each.kind) for each in self._endpoints]

    async def monitor(self, model: str, concurrency: int) -> None:
        """From now on a resting endpoint must list that model to be asked again; starts the regular checks.

        Args:
            concurrency: most requests under way at once, over all endpoints.
        """
        self._model = model
        self._slots = asyncio.Semaphore(concurrency)
        if self._check_seconds is not None:
            self._checks = asyncio.create_task(self._check_regularly(self._check_seconds))

    async def models(self) -> list[tuple[str, list[ListedModel]]]:
        """(URL, its models) of each endpoint that answers; each is asked once.

        Raises:
            ModelError: no endpoint answers, or one answers with an error.
        """
        responses = await asyncio.gather(*(each.client.models() for each in self._endpoints), return_exceptions=True)
        listed: list[tuple[str, list[ListedModel]]] = []
        for endpoint, models in zip(self._endpoints, responses, strict=True):
            if isinstance(models, TransientError):
                self._rest(endpoint, models)
            elif isinstance(models, EngineError):
                # A wrong key or a wrong address stays wrong.
                raise ModelError(models.what, where=models.where, hint=models.hint)
            elif isinstance(models, BaseException):
                raise models
            else:
                listed.append((endpoint.url, models))
        if not listed:
            raise ModelError(
                "; ".join(f"{endpoint.url} {endpoint.failure}" for endpoint in self._endpoints),
                hint="is the server running, and is this its address?",
            )
        return listed

    async def post(
        self,
        path: str,
        body: dict[str, Any],
        read: Callable[[httpx2.Response], Awaitable[T]],
        may_repeat: Callable[[], bool] = lambda: True,
    ) -> T:
        """Send a JSON body to one endpoint after another until one answers it, and to the same ones again.

        Args:
            path: below the URL.
            read: reads a successful response, once for each try; may raise TransientError.
            may_repeat: whether another try is allowed after what `read` has read so far.

        Returns: what `read` returned.

        Raises:
            EngineUnavailableError: no endpoint may be asked, after all retries.
            RequestError, EngineError: as `EndpointClient.request`.
        """
        async with self._slots:
            waits = 0
            excluded: dict[str, float] = {}  # URL → from when on this request may ask it again
            errors: list[tuple[_Endpoint, EngineError]] = []
            while True:
                endpoint = self._next(excluded)
                if endpoint is None:
                    if errors:
                        raise errors[0][1]
                    await self._wait(waits, excluded)
                    waits += 1
                    excluded = {url: moment for url, moment in excluded.items() if moment > time.monotonic()}
                    continue
                try:
                    result = await _request(endpoint, path, body, read)
                except TransientError as failure:
                    self._count_failure(endpoint, failure)
                    if not may_repeat():
                        raise EngineError(
                            f"the endpoint was lost amid an answer ({endpoint.failure}), which it would not give again",
                            where=endpoint.url,
                            hint="ask again; with a seed, or at temperature 0, an answer is continued where it broke off",
                            status=failure.status,
                        ) from None
                    excluded[endpoint.url] = time.monotonic() + (failure.retry_after or 0.0)
                    continue
                except RequestError:
                    raise
                except EngineError as error:
                    if not may_repeat():
                        raise
                    errors.append((endpoint, error))
                    excluded[endpoint.url] = math.inf
                    continue
                endpoint.failures = endpoint.rests = 0
                for other, error in errors:
                    self._count_failure(
                        other, TransientError(error.what, kind="answers with an error", status=error.status)
                    )
                return result

    async def close(self) -> None:
        """Close all connections. The caller ends the tasks of its loop before."""
        for endpoint in self._endpoints:
            await endpoint.client.close()

    def _next(self, excluded: Collection[str]) -> _Endpoint | None:
        """The endpoint whose turn it is, of those that may be asked."""
        for _ in self._endpoints:
            endpoint = self._endpoints[self._turn]
            self._turn = (self._turn + 1) % len(self._endpoints)
            if endpoint.recovery is None and endpoint.url not in excluded:
                return endpoint
        return None

    @property
    def _is_any_available(self) -> bool:
        return any(each.recovery is None for each in self._endpoints)

    def _note(self, endpoint: _Endpoint, failure: TransientError) -> None:
        endpoint.failure = one_line(failure.reason, self._key)
        endpoint.kind, endpoint.status = failure.kind, failure.status

    def _count_failure(self, endpoint: _Endpoint, failure: TransientError) -> None:
        """Note a failed request. One failure may be due to the request itself, so the endpoint need not rest yet."""
        self._note(endpoint, failure)
        if failure.busy:
            return
        endpoint.failures += 1
        if failure.kind == UNREACHABLE or endpoint.failures >= _MAX_FAILURES:
            self._rest(endpoint, failure)

    def _rest(self, endpoint: _Endpoint, failure: TransientError, *, still: bool = False) -> None:
        """Leave an endpoint alone for a while, and then until it lists its model. `still`: it rested, and failed to."""
        # Many requests may fail together: that is one rest.
        counts = still or endpoint.recovery is None
        backoff = self._backoff * 2 ** min(endpoint.rests, 5) if counts else 0.0
        seconds = backoff if failure.retry_after is None else max(self._backoff, failure.retry_after)
        if all(other.recovery is not None for other in self._endpoints if other is not endpoint):
            # No other endpoint may be asked: check this one now, and then as often as possible.
            seconds = min(seconds, self._backoff) if still else 0.0
        endpoint.rests_until = max(endpoint.rests_until, time.monotonic() + seconds)
        endpoint.rests += counts
        self._note(endpoint, failure)
        if endpoint.recovery is None:
            endpoint.recovery = asyncio.create_task(self._recover(endpoint))
        if not self._is_any_available:
            self._any_available.clear()

    async def _recover(self, endpoint: _Endpoint) -> None:
        while (left := endpoint.rests_until - time.monotonic()) > 0 or not await self._is_healthy(endpoint):
            await asyncio.sleep(max(left, 0.0))
        endpoint.recovery = None
        self._any_available.set()

    async def _is_healthy(self, endpoint: _Endpoint) -> bool:
        """Whether an endpoint lists the model; if not, it rests."""
        try:
            async with asyncio.timeout(_PROBE_SECONDS):
                listed = await endpoint.client.models()
            if self._model is None or any(model.id == self._model for model in listed):
                endpoint.silent_checks = 0
                return True
            failure = TransientError(f"has no model {self._model!r}", kind="lacks the model")
        except TransientError as error:
            failure = error
        except TimeoutError:
            failure = TransientError(f"does not list its models within {_PROBE_SECONDS:.0f} s", kind=SILENT)
        except EngineError as error:
            failure = TransientError(error.what, kind="answers with an error", status=error.status)
        # One that refuses checks or connections may still finish its answers, as a server does that is shut down.
        endpoint.silent_checks += failure.kind == SILENT
        if endpoint.silent_checks >= _MAX_FAILURES:
            while endpoint.requests:
                endpoint.requests.pop().reschedule(0.0)
        self._rest(endpoint, failure, still=endpoint.recovery is not None)
        return False

    async def _check_regularly(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            await asyncio.gather(*(self._is_healthy(each) for each in self._endpoints if each.recovery is None))

    async def _wait(self, waits: int, excluded: Mapping[str, float]) -> None:
        """Wait until this request may ask an endpoint. Raises: EngineUnavailableError (no retry is left, or it takes long)."""
        moments = (max(each.rests_until, excluded.get(each.url, 0.0)) for each in self._endpoints)
        left = max(0.0, min(moments) - time.monotonic())
        if waits == self._retries or left > _LONGEST_REST:
            raise self._unavailable(left)
        pause = self._backoff * 2**waits
        if self._is_any_available:
            await asyncio.sleep(left + pause)
        else:
            with suppress(TimeoutError):
                async with asyncio.timeout(left + pause):
                    await self._any_available.wait()
        # At different moments: all waiting requests at once would be too many again.
        await asyncio.sleep(pause / 2 * random.random())

    def _unavailable(self, left: float) -> EngineUnavailableError:
        failed = [endpoint for endpoint in self._endpoints if endpoint.failure]
        reasons = "; ".join(f"{endpoint.url} {endpoint.failure}" for endpoint in failed)
        more = f", and asks to be left alone for {left:.0f} s" if left > _LONGEST_REST else ""
        return EngineUnavailableError(
            f"no endpoint answers: {reasons}{more}",
            where=", ".join(endpoint.url for endpoint in failed),
            hint="see whether the server runs, or give more URLs or retries",
            status=next((endpoint.status for endpoint in failed if endpoint.status), None),
            retry_seconds=left or None,
        )


async def _request(
    endpoint: _Endpoint, path: str, body: dict[str, Any], read: Callable[[httpx2.Response], Awaitable[T]]
) -> T:
    """`EndpointClient.request`, until the endpoint was silent in too many checks."""
    try:
        async with asyncio.timeout(None) as patience:
            endpoint.requests.add(patience)
            try:
                return await endpoint.client.request(path, body, read)
            finally:
                endpoint.requests.discard(patience)
    except TimeoutError:
        raise TransientError("fell silent", kind=SILENT) from None
