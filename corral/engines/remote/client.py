"""One endpoint: requests go through OpenAI's client, and what fails becomes an error that says whether to try again.

Answers are read from the raw response: servers of the vLLM kind send fields that OpenAI does not have (token ids, a prompt's
log-probabilities), and OpenAI's stream reader has no limit on the size of an event and takes a web page for an empty stream.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar, cast

import httpx2
import openai
from pydantic import BaseModel, ValidationError

from corral import __version__
from corral.engines.base import Alternatives, Finish
from corral.engines.remote.protocol import (
    CONNECT_SECONDS,
    KEY_VARIABLE,
    MAX_ERROR_BYTES,
    NOT_OPENAI,
    error_message,
    one_line,
)
from corral.errors import EngineError, RequestError

T = TypeVar("T")

_KEEP_ALIVE_SECONDS = 2.0  # uvicorn closes idle connections after 5: a request on one it just closed would fail
_MAX_EVENT_BYTES = 2**24  # the first event may repeat the ids of a long prompt
_MAX_RETRY_AFTER = 1e9  # seconds
_BUSY = (429, 503, 504)  # the endpoint does not take this request now, and may take the next one
_TRANSIENT = (*_BUSY, 408, 502)
_CODES_AMID_STREAM = ("engine_unavailable", "503", "429")  # of errors that another try may not meet
_TOKEN_ID = "token_id:"
_HEADERS = {
    "host",
    "accept",
    "accept-encoding",
    "connection",
    "content-type",
    "content-length",
    "user-agent",
    "authorization",
}


UNREACHABLE = "unreachable"
"""The kind of a TransientError for want of a connection."""
SILENT = "silent"
"""The kind of a TransientError for want of an answer in time."""


class TransientError(Exception):
    """One try failed for a reason that may pass.

    Args:
        reason: what the endpoint did, as in "closed the connection".
        kind: the same in a word or two that quote nothing, for health and metrics; with a status, "HTTP" and the status.
        retry_after: after how many seconds the endpoint wants to be asked again.
        status: of its response, if there was one.
    """

    def __init__(
        self,
        reason: str,
        *,
        kind: str = "broke off",
        retry_after: float | None = None,
        status: int | None = None,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.kind = kind if status is None else f"HTTP {status}"
        self.retry_after = retry_after
        self.status = status
        self.busy = status in _BUSY


class ListedModel(BaseModel):
    """An entry of `/v1/models`. Servers of the vLLM kind give the context length, corral's own server also the task, how
    many requests it runs at once, and which entries are other names of a model."""

    id: str
    max_model_len: int | None = None
    max_requests: int | None = None
    task: str = "chat"
    alias_of: str | None = None


class _ModelList(BaseModel):
    data: list[ListedModel]


class Logprobs(BaseModel):
    """Log-probabilities of the tokens of a choice, and of the most likely ones at their places; null for a token that nothing
    precedes. Tokens are `token_id:` and the id with `return_tokens_as_token_ids`."""

    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None

    def alternatives(self, count: int) -> list[Alternatives]:
        """The most likely ids at each place. Servers give the token at that place besides. Raises: EngineError."""
        tops: list[Alternatives] = []
        for by_token in self.top_logprobs or ():
            ranked = sorted((by_token or {}).items(), key=lambda item: item[1], reverse=True)[:count]
            if not all(_is_token_id(token) for token, _ in ranked):
                raise EngineError(
                    "the endpoint gives the most likely tokens as texts, not as ids",
                    hint="it must support `return_tokens_as_token_ids`, as corral serve and vLLM do",
                )
            tops.append(tuple((int(token.removeprefix(_TOKEN_ID)), logprob) for token, logprob in ranked))
        return tops


class Choice(BaseModel):
    """A choice in a chunk of a stream, or in a whole response."""

    index: int = 0
    text: str = ""
    token_ids: list[int] | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None

    @property
    def finish(self) -> Finish | None:
        """Why the choice ended, if it has. Raises: TransientError (the server shuts down), EngineError (unknown reason)."""
        match self.finish_reason:
            case "stop" | "length" | None as reason:
                return reason
            case "abort":  # vLLM, when it shuts down
                raise TransientError("broke off its answer")
            case reason:
                raise EngineError(f"the endpoint ended a choice with the reason {reason!r}")


class _StreamError(BaseModel):
    message: str = "no reason is given"
    code: str | int | None = None


class Chunk(BaseModel):
    """An event of a stream, or a whole response."""

    choices: list[Choice] = []
    error: _StreamError | None = None

    @property
    def logprobs(self) -> Logprobs:
        """Of the first choice; empty if there are none."""
        return self.choices[0].logprobs or Logprobs() if self.choices else Logprobs()


class EndpointClient:
    """The connection to one URL. It never retries and follows no redirect.

    Args:
        url: of the API, with its `/v1`.
        key: sent as a bearer token, never shown. None sends none.
        timeout_seconds: the longest silence of the endpoint.
    """

    def __init__(self, url: str, key: str | None, timeout_seconds: float) -> None:
        self.url = url
        self._key = key
        # Given with each request, so that no OPENAI_… variable puts another in its place.
        self._headers = {"authorization": f"Bearer {key}" if key else openai.Omit()}
        self._client = openai.AsyncOpenAI(
            base_url=url,
            api_key=key or "none",
            max_retries=0,
            default_headers={"user-agent": f"corral/{__version__}"},
            http_client=httpx2.AsyncClient(
                timeout=httpx2.Timeout(timeout_seconds, connect=CONNECT_SECONDS, pool=None),
                limits=httpx2.Limits(max_connections=None, keepalive_expiry=_KEEP_ALIVE_SECONDS),
                event_hooks={"request": [_remove_other_headers], "response": [_cut_error]},
            ),
        )

    async def models(self) -> list[ListedModel]:
        """The models that the endpoint lists. Raises: as `request`."""

        async def read(response: httpx2.Response) -> list[ListedModel]:
            return _ModelList.model_validate_json(await response.aread()).data

        return await self.request("/models", None, read)

    async def request(
        self, path: str, body: dict[str, Any] | None, read: Callable[[httpx2.Response], Awaitable[T]]
    ) -> T:
        """POST a JSON body to a path below the URL, or GET it if there is no body.

        Returns: what `read` made of the successful response.

        Raises:
            TransientError: another try may succeed.
            RequestError: the endpoint refuses this request.
            EngineError: the endpoint answers with another error, or with something that cannot be read.
        """
        arguments: Any = {"cast_to": httpx2.Response, "stream": True, "stream_cls": openai.AsyncStream}
        arguments["options"] = {"headers": self._headers}
        try:
            if body is None:
                answer: Any = await self._client.get(path, **arguments)
            else:
                answer = await self._client.post(path, body=body, **arguments)
            response = cast("httpx2.Response", answer)
            try:
                return await read(response)
            finally:
                await response.aclose()
        except openai.APIStatusError as error:
            raise self._status_error(path, error.response) from None
        except openai.APIConnectionError as error:
            raise self._connection_error(error.__cause__ or error) from None
        except (httpx2.SSEError, httpx2.DecodingError, ValidationError) as error:
            # pydantic's message would hold a part of the input, which the key's removal might miss.
            reason = error.errors(include_input=False)[0]["msg"] if isinstance(error, ValidationError) else str(error)
            what = f"the endpoint's answer cannot be read: {one_line(reason, self._key)}"
            raise EngineError(what, where=self.url, hint=NOT_OPENAI) from None
        except httpx2.TransportError as error:
            raise self._connection_error(error) from None
        except EngineError as error:
            # Its message may quote the endpoint.
            where = error.where or self.url
            raise type(error)(
                one_line(error.what, self._key), where=where, hint=error.hint, status=error.status
            ) from None

    async def close(self) -> None:
        """Close all connections."""
        await self._client.close()

    def _connection_error(self, error: BaseException) -> TransientError:
        if isinstance(error, httpx2.ConnectTimeout):
            return TransientError(f"does not answer within {CONNECT_SECONDS:.0f} s", kind=UNREACHABLE)
        if isinstance(error, httpx2.TimeoutException):
            return TransientError("fell silent", kind=SILENT)
        reason = one_line(str(error) or type(error).__name__, self._key)
        if isinstance(error, httpx2.ConnectError):
            return TransientError(f"cannot be reached ({reason})", kind=UNREACHABLE)
        return TransientError(f"closed the connection ({reason})")

    def _status_error(self, path: str, response: httpx2.Response) -> Exception:
        status = response.status_code
        message = error_message(response.text, self._key)
        what = f"answered {status}" + (f": {message}" if message else "")
        if status in _TRANSIENT:
            return TransientError(what, retry_after=_retry_after(response.headers.get("retry-after")), status=status)
        kind, where = EngineError, self.url
        if status in (401, 403):
            hint = f"put the key of this endpoint into {KEY_VARIABLE}" + (", the one there is wrong" * bool(self._key))
        elif status in (400, 413, 422):
            kind, hint = RequestError, "shorten the prompt or lower max_tokens" if "context" in message else None
        elif path == "/models":
            where, hint = self.url + path, NOT_OPENAI
        else:
            hint = f"see which models it has: {self.url}/models" if status == 404 else "its log may say more"
        return kind(f"the endpoint {what}", where=where, hint=hint, status=status)


async def chunks(response: httpx2.Response) -> AsyncGenerator[Chunk]:
    """The events of a streamed response; ends with `[DONE]`, or with the connection.

    Raises:
        TransientError, EngineError: an event is an error, which another try may not meet, or may.
    """
    async for event in httpx2.EventSource(response, _MAX_EVENT_BYTES):
        if event.data == "[DONE]":
            return
        chunk = Chunk.model_validate_json(event.data)
        if chunk.error is not None:
            what = f"the endpoint failed amid an answer: {chunk.error.message}"
            raise TransientError(what) if str(chunk.error.code) in _CODES_AMID_STREAM else EngineError(what)
        yield chunk


async def _remove_other_headers(request: httpx2.Request) -> None:
    """Remove what OpenAI's client adds about this machine, and from OPENAI_… variables: that is for OpenAI only."""
    for name in set(request.headers) - _HEADERS:
        del request.headers[name]


async def _cut_error(response: httpx2.Response) -> None:
    """Keep the beginning of an error's body: OpenAI's client reads all of it, however long."""
    if response.is_success:
        return
    beginning, stream = b"", cast("httpx2.AsyncByteStream", response.stream)
    async for data in stream:
        beginning += data
        if len(beginning) > MAX_ERROR_BYTES:
            break
    await stream.aclose()
    response.stream = httpx2.ByteStream(beginning[:MAX_ERROR_BYTES])


def _is_token_id(token: str) -> bool:
    number = token.removeprefix(_TOKEN_ID)
    return number != token and number.isascii() and number.isdecimal()


def _retry_after(value: str | None) -> float | None:
    """Seconds, from the number or the date of a Retry-After header; None for anything else."""
    if value is None:
        return None
    with suppress(ValueError):
        return min(max(0.0, float(value)), _MAX_RETRY_AFTER)
    with suppress(ValueError, OverflowError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return None
