"""Requests to one of several URLs that serve the same model: which to ask, when to ask again, what an error says.

A URL that cannot be reached, or fails several times in a row, is left alone for a while, longer each time, and is back once it
lists its models again; meanwhile the others are asked. One that is busy is asked again, when it says, by those it sent away.
What one answers with an error is asked of the others: only if one of them answers, the error was a failure of the first.
It knows HTTP and OpenAI's form of errors and of `/v1/models`. It does not know completions, tokens, or when an answer may be
asked for twice.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from corral import __version__
from corral.engines.remote.http_errors import NOT_OPENAI, Busy, Gone, Lost, refusal
from corral.engines.remote.protocol import api_url, auth_header, one_line
from corral.errors import EngineError, EngineUnavailableError, InputError, ModelError, RequestError

T = TypeVar("T")

_CONNECT_SECONDS = 10.0
_PROBE_SECONDS = 10.0  # a list of models is no work
_LONGEST_REST = 300.0  # an endpoint that asks for more patience than this is taken at its word: it cannot serve now
_FAULTS_IN_A_ROW = 3  # of requests, after which an endpoint that still answers is taken to be ill
_KEEP_ALIVE_SECONDS = 2.0  # uvicorn closes idle connections after 5: a request on one it just closed would fail


@dataclass(slots=True)
class Endpoint:
    """One URL, and how it fares."""

    url: str
    under_way: int = 0
    faults: int = 0
    """Requests in a row that failed, not counting those that it was too busy for."""
    rests: int = 0
    """In a row."""
    rests_until: float = 0.0
    """On the monotonic clock."""
    fault: str = ""
    """What was last wrong."""
    status: int | None = None
    """What it answered then, if it did."""
    probe: asyncio.Task[None] | None = None
    """What waits for it to come back; None while it may be asked."""


class ListedModel(BaseModel):
    """An entry of `/v1/models`; servers of the vLLM kind tell the context, corral's own what a model is for."""

    id: str
    max_model_len: int | None = None
    task: str = "chat"


class _Listed(BaseModel):
    data: list[ListedModel]


class Endpoints:
    """The URLs and the connections to them. All coroutines belong to one event loop.

    Args:
        urls: of the API, with or without its `/v1`.
        key: sent as a bearer token, never shown. None sends none.
        concurrency: requests under way at once, over all URLs.
        timeout_seconds: the longest silence of an endpoint that has a request.
        retries: how often a request waits for an endpoint when all of them rest.
        backoff_seconds: the first such wait; it doubles each time.
        check_seconds: how often URLs that nobody asks are looked at; None looks only at those that failed.

    Raises:
        InputError: a URL cannot be used.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        key: str | None,
        concurrency: int,
        timeout_seconds: float,
        retries: int,
        backoff_seconds: float,
        check_seconds: float | None = None,
    ) -> None:
        if not urls:
            raise InputError("no URL of an endpoint is given", hint="give one, such as http://127.0.0.1:8000/v1")
        self._endpoints = [Endpoint(url) for url in dict.fromkeys(map(api_url, urls))]
        self._key = key
        self._retries = retries
        self._backoff = backoff_seconds
        self._check_seconds = check_seconds
        self._model: str | None = None
        self._back = asyncio.Event()
        """Set while a URL may be asked."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._room = asyncio.Semaphore(concurrency)
        self._client = httpx2.AsyncClient(
            headers={"user-agent": f"corral/{__version__}"}
            | auth_header(key, *(endpoint.url for endpoint in self._endpoints)),
            timeout=httpx2.Timeout(timeout_seconds, connect=_CONNECT_SECONDS, pool=None),
            limits=httpx2.Limits(max_connections=None, keepalive_expiry=_KEEP_ALIVE_SECONDS),
        )

    @property
    def ready(self) -> bool:
        """Whether any endpoint may be asked now."""
        return any(endpoint.probe is None for endpoint in self._endpoints)

    async def watch(self, model: str) -> None:
        """From now on an endpoint must have that model to be asked again after a failure."""
        self._model = model
        if self._check_seconds is not None:
            self._keep(self._check(self._check_seconds))

    async def models(self) -> list[tuple[str, list[ListedModel]]]:
        """(URL, its models) of each endpoint that answers, each asked once.

        Raises:
            ModelError: none answers.
        """
        found = await asyncio.gather(*map(self._models_of, self._endpoints), return_exceptions=True)
        answers: list[tuple[str, list[ListedModel]]] = []
        for endpoint, models in zip(self._endpoints, found, strict=True):
            if isinstance(models, Lost):
                self._rest(endpoint, models)
            elif isinstance(models, EngineError):
                # A wrong key or a wrong address will not mend itself.
                raise ModelError(models.what, where=models.where, hint=models.hint)
            elif isinstance(models, BaseException):
                raise models
            else:
                answers.append((endpoint.url, models))
        if not answers:
            raise ModelError(
                "; ".join(f"{endpoint.url} {endpoint.fault}" for endpoint in self._endpoints),
                hint="is the server running, and is this its address?",
            )
        return answers

    async def post(
        self,
        path: str,
        body: dict[str, Any],
        use: Callable[[httpx2.Response], Awaitable[T]],
        may_repeat: Callable[[], bool] = lambda: True,
    ) -> T:
        """Ask an endpoint, and another or the same again while that may help.

        Args:
            path: below the URL.
            body: sent as JSON.
            use: reads a successful response, once for each try; may raise Lost.
            may_repeat: whether what `use` did so far allows another try.

        Returns: what `use` returned.

        Raises:
            RequestError: the endpoint refuses this request.
            EngineError: it cannot be reached, refuses the key, does not have the model, or answers nonsense.
        """
        async with self._room:
            waits = 0
            refused: dict[str, float] = {}  # of URLs that did not take it: from when on they may be asked again
            errors: list[tuple[Endpoint, EngineError]] = []
            while True:
                endpoint = self._least_busy(refused)
                if endpoint is None:
                    if errors:
                        raise errors[0][1]
                    await self._wait(waits, refused)
                    waits += 1
                    refused = {url: moment for url, moment in refused.items() if moment > time.monotonic()}
                    continue
                endpoint.under_way += 1
                try:
                    result = await self._once(endpoint, "POST", path, body, use)
                except Lost as lost:
                    self._failed(endpoint, lost)
                    if not may_repeat():
                        raise EngineError(
                            f"the endpoint was lost amid an answer ({endpoint.fault}), which it would not give again",
                            where=endpoint.url,
                            hint="ask again; with a seed, or at temperature 0, an answer is taken up where it broke off",
                            status=lost.status,
                        ) from None
                    refused[endpoint.url] = time.monotonic() + (lost.retry_after or 0.0)
                    continue
                except RequestError:
                    raise
                except EngineError as error:
                    if not may_repeat():
                        raise
                    errors.append((endpoint, error))
                    refused[endpoint.url] = math.inf
                    continue
                finally:
                    endpoint.under_way -= 1
                endpoint.faults = endpoint.rests = 0
                for other, error in errors:
                    self._failed(other, Lost(error.what, status=error.status))
                return result

    async def close(self) -> None:
        """Close all connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.aclose()

    def _least_busy(self, refused: Collection[str]) -> Endpoint | None:
        """Of those that may be asked, and did not refuse the request."""
        up = [each for each in self._endpoints if each.probe is None and each.url not in refused]
        return min(up, key=lambda endpoint: endpoint.under_way, default=None)

    def _failed(self, endpoint: Endpoint, lost: Lost) -> None:
        """A request failed. That may be the request's own affair: others are asked for there, unless that looks hopeless."""
        endpoint.fault, endpoint.status = one_line(lost.what, self._key), lost.status
        if isinstance(lost, Busy):
            return
        endpoint.faults += 1
        if isinstance(lost, Gone) or endpoint.faults >= _FAULTS_IN_A_ROW:
            self._rest(endpoint, lost)

    def _rest(self, endpoint: Endpoint, lost: Lost, *, again: bool = False) -> None:
        """Leave an endpoint alone for a while; then it has to show that it is back. `again`: it has not shown it."""
        # Many requests that it fails with are one failure.
        counts = again or endpoint.probe is None
        backoff = self._backoff * 2 ** min(endpoint.rests, 5) if counts else 0.0
        rest = backoff if lost.retry_after is None else max(self._backoff, lost.retry_after)
        if not any(other.probe is None for other in self._endpoints if other is not endpoint):
            # Nobody else can be asked: it is looked at now, and then as often as may be.
            rest = min(rest, self._backoff) if again else 0.0
        endpoint.rests_until = max(endpoint.rests_until, time.monotonic() + rest)
        endpoint.rests += counts
        endpoint.fault, endpoint.status = one_line(lost.what, self._key), lost.status
        if endpoint.probe is None:
            endpoint.probe = self._keep(self._return_of(endpoint))
        if not self.ready:
            self._back.clear()

    async def _return_of(self, endpoint: Endpoint) -> None:
        """Wait until an endpoint that failed lists its model."""
        while (left := endpoint.rests_until - time.monotonic()) > 0 or await self._fails(endpoint):
            await asyncio.sleep(max(left, 0.0))
        endpoint.probe = None
        self._back.set()

    async def _fails(self, endpoint: Endpoint) -> bool:
        """Ask an endpoint for its models; one that does not list what is needed rests."""
        try:
            async with asyncio.timeout(_PROBE_SECONDS):
                listed = await self._models_of(endpoint)
            if self._model is None or any(model.id == self._model for model in listed):
                return False
            lost = Lost(f"has no model {self._model!r}")
        except Lost as fault:
            lost = fault
        except TimeoutError:
            lost = Lost(f"does not list its models within {_PROBE_SECONDS:.0f} s")
        except EngineError as error:
            lost = Lost(error.what)
        self._rest(endpoint, lost, again=endpoint.probe is not None)
        return True

    async def _check(self, seconds: float) -> None:
        """See now and then whether the endpoints that may be asked are still there."""
        while True:
            await asyncio.sleep(seconds)
            await asyncio.gather(*(self._fails(endpoint) for endpoint in self._endpoints if endpoint.probe is None))

    def _keep(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that ends when the connections are closed."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _wait(self, waits: int, refused: Mapping[str, float]) -> None:
        """Until an endpoint may be asked for that request. Raises: EngineUnavailableError (it is not worth it)."""
        moments = (max(each.rests_until, refused.get(each.url, 0.0)) for each in self._endpoints)
        left = max(0.0, min(moments) - time.monotonic())
        if waits == self._retries or left > _LONGEST_REST:
            raise self._gave_up(left)
        pause = self._backoff * 2**waits
        if self.ready:
            await asyncio.sleep(left + pause)
        else:
            with suppress(TimeoutError):
                async with asyncio.timeout(left + pause):
                    await self._back.wait()
        # Not all at the same moment: those who wait would be too many again.
        await asyncio.sleep(pause / 2 * random.random())

    def _gave_up(self, left: float) -> EngineUnavailableError:
        failed = [endpoint for endpoint in self._endpoints if endpoint.fault]
        tried = "; ".join(f"{endpoint.url} {endpoint.fault}" for endpoint in failed)
        more = f", and asks to be left alone for {left:.0f} s" if left > _LONGEST_REST else ""
        return EngineUnavailableError(
            f"no endpoint answers: {tried}{more}",
            where=", ".join(endpoint.url for endpoint in failed),
            hint="see whether the server runs, or give more URLs or retries",
            status=next((endpoint.status for endpoint in failed if endpoint.status), None),
            retry_seconds=left or None,
        )

    async def _once(
        self,
        endpoint: Endpoint,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        use: Callable[[httpx2.Response], Awaitable[T]],
    ) -> T:
        try:
            async with self._client.stream(method, endpoint.url + path, json=body) as response:
                if response.status_code != 200:
                    raise await refusal(endpoint.url, path, response, self._key)
                return await use(response)
        except (httpx2.SSEError, httpx2.DecodingError, ValidationError) as error:
            # Without the input, which pydantic cuts anywhere.
            told = error.errors(include_input=False)[0]["msg"] if isinstance(error, ValidationError) else str(error)
            what = f"the endpoint's answer cannot be read: {one_line(told, self._key)}"
            raise EngineError(what, where=endpoint.url, hint=NOT_OPENAI) from None
        except httpx2.ConnectTimeout:
            raise Gone(f"does not answer within {_CONNECT_SECONDS:.0f} s") from None
        except httpx2.TimeoutException:
            raise Lost("fell silent") from None
        except httpx2.ConnectError as error:
            raise Gone(f"cannot be reached ({one_line(str(error) or type(error).__name__, self._key)})") from None
        except httpx2.TransportError as error:
            raise Lost(f"closed the connection ({one_line(str(error) or type(error).__name__, self._key)})") from None
        except EngineError as error:
            # It may tell what the endpoint said amid an answer.
            where = error.where or endpoint.url
            raise type(error)(
                one_line(error.what, self._key), where=where, hint=error.hint, status=error.status
            ) from None

    async def _models_of(self, endpoint: Endpoint) -> list[ListedModel]:
        async def read(response: httpx2.Response) -> list[ListedModel]:
            return _Listed.model_validate_json(await response.aread()).data

        return await self._once(endpoint, "GET", "/models", None, read)
