"""Requests to one of several URLs that serve the same model: which to ask, when to ask again, what an error says.

A URL that fails is left alone for a while, longer each time, and asked again; meanwhile the others are. It knows HTTP and
OpenAI's form of errors and of `/v1/models`. It does not know completions, tokens, or when an answer may be asked for twice.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from corral import __version__
from corral.errors import EngineError, InputError, ModelError, RequestError

T = TypeVar("T")

KEY_VARIABLE = "CORRAL_API_KEY"

_CONNECT_SECONDS = 10.0
_LONGEST_REST = 300.0  # an endpoint that asks for more patience than this is taken at its word: it cannot serve now
_KEEP_ALIVE_SECONDS = 2.0  # uvicorn closes idle connections after 5: a request on one it just closed would fail
_TRANSIENT = (408, 429, 502, 503, 504)
_NOT_OPENAI = "is this the address of an OpenAI-compatible server? It usually ends in /v1"


class Lost(Exception):
    """One try failed for a reason that may pass.

    Args:
        what: the reason.
        retry_after: how many seconds the endpoint asks to be left alone.
    """

    def __init__(self, what: str, retry_after: float | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.retry_after = retry_after


@dataclass(slots=True)
class Endpoint:
    """One URL, and how it fares."""

    url: str
    under_way: int = 0
    failures: int = 0
    """In a row."""
    rests_until: float = 0.0
    """On the monotonic clock."""
    fault: str = ""
    """The last one."""


class ListedModel(BaseModel):
    """An entry of `/v1/models`; servers of the vLLM kind tell the context."""

    id: str
    max_model_len: int | None = None


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
    ) -> None:
        if not urls:
            raise InputError("no URL of an endpoint is given", hint="give one, such as http://127.0.0.1:8000/v1")
        self._endpoints = [Endpoint(url) for url in dict.fromkeys(map(_api_url, urls))]
        self._key = key
        self._retries = retries
        self._backoff = backoff_seconds
        self._room = asyncio.Semaphore(concurrency)
        headers = {"user-agent": f"corral/{__version__}"} | ({"authorization": f"Bearer {key}"} if key else {})
        try:
            self._client = httpx2.AsyncClient(
                headers=headers,
                timeout=httpx2.Timeout(timeout_seconds, connect=_CONNECT_SECONDS, pool=None),
                limits=httpx2.Limits(max_connections=None, keepalive_expiry=_KEEP_ALIVE_SECONDS),
            )
        except UnicodeEncodeError:
            raise InputError("the key holds characters that no key has", hint=f"look at {KEY_VARIABLE}") from None

    @property
    def rested(self) -> bool:
        """Whether any endpoint may be asked now."""
        return any(endpoint.rests_until <= time.monotonic() for endpoint in self._endpoints)

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
            waits = tries = 0
            while True:
                endpoint = self._least_busy()
                if endpoint is None:
                    await self._wait(waits)
                    waits += 1
                    continue
                endpoint.under_way += 1
                tries += 1
                try:
                    result = await self._once(endpoint, "POST", path, body, use)
                except Lost as lost:
                    self._rest(endpoint, lost)
                    if not may_repeat():
                        raise EngineError(
                            f"the endpoint was lost amid an answer ({endpoint.fault}), which it would not give again",
                            where=endpoint.url,
                            hint="ask again; with a seed, or at temperature 0, an answer is taken up where it broke off",
                        ) from None
                    if tries > self._retries * len(self._endpoints):
                        raise self._gave_up() from None
                    continue
                finally:
                    endpoint.under_way -= 1
                endpoint.failures = 0
                return result

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    def _least_busy(self) -> Endpoint | None:
        now = time.monotonic()
        rested = [endpoint for endpoint in self._endpoints if endpoint.rests_until <= now]
        return min(rested, key=lambda endpoint: endpoint.under_way, default=None)

    def _rest(self, endpoint: Endpoint, lost: Lost) -> None:
        backoff = self._backoff * 2 ** min(endpoint.failures, 5)
        rest = backoff if lost.retry_after is None else max(self._backoff, lost.retry_after)
        endpoint.rests_until = max(endpoint.rests_until, time.monotonic() + rest)
        endpoint.failures += 1
        endpoint.fault = self._without_key(lost.what)

    async def _wait(self, waits: int) -> None:
        """Until an endpoint may be asked again. Raises: EngineError (it is not worth it)."""
        left = min(endpoint.rests_until for endpoint in self._endpoints) - time.monotonic()
        if waits == self._retries or left > _LONGEST_REST:
            raise self._gave_up(f", and asks to be left alone for {left:.0f} s" if left > _LONGEST_REST else "")
        # Not all at the same moment: those who wait would be too many again.
        await asyncio.sleep(max(left, 0.0) + self._backoff * 2**waits * random.uniform(0.0, 0.5))

    def _gave_up(self, more: str = "") -> EngineError:
        tried = "; ".join(f"{endpoint.url} {endpoint.fault}" for endpoint in self._endpoints if endpoint.fault)
        return EngineError(
            f"no endpoint answers: {tried}{more}", hint="see whether the server runs, or give more URLs or retries"
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
                    raise self._refusal(
                        endpoint, response, path, (await _beginning(response)).decode("utf-8", "replace")
                    )
                return await use(response)
        except (httpx2.SSEError, httpx2.DecodingError, ValidationError) as error:
            what = self._without_key(f"the endpoint's answer cannot be read: {_short(str(error))}")
            raise EngineError(what, where=endpoint.url, hint=_NOT_OPENAI) from None
        except httpx2.ConnectTimeout:
            raise Lost(f"does not answer within {_CONNECT_SECONDS:.0f} s") from None
        except httpx2.TimeoutException:
            raise Lost("fell silent") from None
        except httpx2.ConnectError as error:
            raise Lost(f"cannot be reached ({_short(str(error) or type(error).__name__)})") from None
        except httpx2.TransportError as error:
            raise Lost(f"closed the connection ({_short(str(error) or type(error).__name__)})") from None
        except EngineError as error:
            error.where = error.where or endpoint.url
            raise

    async def _models_of(self, endpoint: Endpoint) -> list[ListedModel]:
        async def read(response: httpx2.Response) -> list[ListedModel]:
            return _Listed.model_validate_json(await response.aread()).data

        return await self._once(endpoint, "GET", "/models", None, read)

    def _refusal(self, endpoint: Endpoint, response: httpx2.Response, path: str, text: str) -> Exception:
        status = response.status_code
        said = self._without_key(_message(text))
        what = f"answered {status}" + (f": {said}" if said else "")
        if status in _TRANSIENT:
            return Lost(what, _retry_after(response.headers.get("retry-after")))
        if status in (401, 403):
            hint = f"put the key of this endpoint into {KEY_VARIABLE}" + (", the one there is wrong" * bool(self._key))
            return EngineError(f"the endpoint {what}", where=endpoint.url, hint=hint)
        if status in (400, 413, 422):
            hint = "shorten the prompt or lower max_tokens" if "context" in said else None
            return RequestError(f"the endpoint {what}", where=endpoint.url, hint=hint)
        if path == "/models":
            return EngineError(f"the endpoint {what}", where=endpoint.url + path, hint=_NOT_OPENAI)
        hint = f"see which models it has: {endpoint.url}/models" if status == 404 else "its log may say more"
        return EngineError(f"the endpoint {what}", where=endpoint.url, hint=hint)

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _api_url(given: str) -> str:
    """The URL with its `/v1`, and nothing that must not be shown. Raises: InputError."""
    try:
        url = httpx2.URL(given.strip())
    except httpx2.InvalidURL as error:
        raise InputError(f"{given!r} is not a URL: {error}", hint="give one such as http://127.0.0.1:8000/v1") from None
    if url.userinfo or url.query:
        what = "a URL of an endpoint may hold no password and no query"
        raise InputError(what, where=url.host, hint=f"put the key into {KEY_VARIABLE}")
    if url.scheme not in ("http", "https") or not url.host:
        raise InputError(f"{given!r} is no http or https URL", hint="give one such as http://127.0.0.1:8000/v1")
    return str(url.copy_with(path=url.path.rstrip("/") or "/v1", fragment=None))


async def _beginning(response: httpx2.Response) -> bytes:
    """The first part of a body that may be of any length."""
    data = b""
    async for chunk in response.aiter_bytes():
        data += chunk
        if len(data) > 2**16:
            break
    return data[: 2**16]


def _message(text: str) -> str:
    """What the body of an error says, in OpenAI's form or in those that stand in for it."""
    found: Any = None
    with suppress(ValueError):
        found = json.loads(text)
    for name in ("error", "message", "detail"):
        found = found.get(name, found) if isinstance(found, dict) else found
    return _short(found if isinstance(found, str) else text)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else line[:297] + "…"


def _retry_after(value: str | None) -> float | None:
    """Seconds, from a number or a date; None where neither is given."""
    if value is None:
        return None
    with suppress(ValueError):
        return max(0.0, float(value))
    with suppress(ValueError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return None
