"""A chat with a model on any OpenAI-compatible server, through `/v1/chat/completions`.

It needs only the HTTP client, so that it works on a machine without models or engines. Each request sends the whole
conversation. corral's own server also says how a vote was decided.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import httpx2

from corral import __version__
from corral.chat.repl import AnswerPiece, describe_vote
from corral.engines.remote.protocol import (
    CONNECT_SECONDS,
    KEY_VARIABLE,
    MAX_ERROR_BYTES,
    NOT_OPENAI,
    api_url,
    auth_header,
    error_message,
    one_line,
)
from corral.errors import EngineError, ModelError
from corral.messages import Conversation

_READ_SECONDS = 600.0  # the longest silence of a server that computes an answer


class ServerBackend:
    """One model of a server; a ChatBackend.

    Args:
        url: of the API, with or without its `/v1`.
        model: its name; None takes the only one that is listed.
        key: sent as a bearer token to this URL only, and never shown.
        options: further fields of each request, such as `max_tokens`.

    Raises:
        InputError: the URL or the key cannot be used.
        ModelError: the server does not list its models, or has several.
    """

    def __init__(
        self, url: str, *, model: str | None = None, key: str | None = None, options: Mapping[str, Any] | None = None
    ) -> None:
        self.url = api_url(url)
        self._key = key
        self._options = dict(options or {})
        self._client = httpx2.Client(
            headers={"user-agent": f"corral/{__version__}"} | auth_header(key, self.url),
            timeout=httpx2.Timeout(_READ_SECONDS, connect=CONNECT_SECONDS),
        )
        try:
            self.model = self._only_model() if model is None else model
        except BaseException:
            self.close()
            raise

    def stream(self, conversation: Conversation) -> Generator[AnswerPiece, None, None]:
        """Stream the answer. Closing the generator closes the connection, so that the server stops.

        Raises:
            EngineError: the server cannot be reached, refuses the request, or breaks off.
        """
        body = {"model": self.model, "messages": conversation.to_json()["messages"], "stream": True, **self._options}
        is_finished = False
        with self._request("POST", "/chat/completions", body) as response:
            for event in httpx2.EventSource(response):
                if event.data == "[DONE]":
                    return
                piece, is_last = _parse_event(_parse_object(event.data), self._key)
                is_finished |= is_last
                if piece.text or piece.note:
                    yield piece
        if not is_finished:
            raise EngineError("the connection was lost amid the answer")

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _only_model(self) -> str:
        try:
            with self._request("GET", "/models") as response:
                listed = _parse_object(response.read())
        except EngineError as error:
            raise ModelError(error.what, where=self.url, hint=error.hint) from None
        # corral's own server also lists its embedding model, with another task, and aliases.
        listed_models = _objects_in(listed.get("data"))
        entries = [m for m in listed_models if m.get("task", "chat") == "chat" and not m.get("alias_of")]
        names = [str(each["id"]) for each in entries if "id" in each]
        if len(names) != 1:
            what = f"the server has {len(names)} models" + (
                f": {one_line(', '.join(names), self._key)}" if names else ""
            )
            raise ModelError(what, where=self.url, hint="name one with --model")
        return names[0]

    @contextmanager
    def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Generator[httpx2.Response]:
        """Send a request and yield a successful response. Raises: EngineError."""
        try:
            with self._client.stream(method, self.url + path, json=body) as response:
                if response.status_code != 200:
                    raise self._status_error(response)
                yield response
        except (httpx2.SSEError, httpx2.DecodingError, ValueError, RecursionError) as error:
            what = f"the server's answer cannot be read: {one_line(str(error), self._key)}"
            raise EngineError(what, hint=NOT_OPENAI) from None
        except httpx2.TimeoutException:
            raise EngineError(f"{self.url} does not answer") from None
        except httpx2.ConnectError as error:
            what = f"{self.url} cannot be reached ({one_line(str(error) or type(error).__name__, self._key)})"
            raise EngineError(what, hint="is the server running, and is this its address?") from None
        except httpx2.TransportError as error:
            what = f"the connection was lost ({one_line(str(error) or type(error).__name__, self._key)})"
            raise EngineError(what) from None

    def _status_error(self, response: httpx2.Response) -> EngineError:
        data = b""
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) > MAX_ERROR_BYTES:
                break
        words = error_message(data[:MAX_ERROR_BYTES].decode("utf-8", "replace"), self._key)
        status = response.status_code
        what = f"the server answered {status}" + (f": {words}" if words else "")
        wait = response.headers.get("retry-after", "")
        hints = {
            401: f"give its key with {KEY_VARIABLE} or --key",
            403: f"give its key with {KEY_VARIABLE} or --key",
            404: f"{NOT_OPENAI}; --model names another model",
        }
        return EngineError(what, hint=f"/retry in {wait} s" if wait.isdecimal() else hints.get(status))


def _parse_event(chunk: dict[str, Any], key: str | None) -> tuple[AnswerPiece, bool]:
    """(what an event adds to the answer, whether it ends it). Raises: EngineError (the event is an error)."""
    if "error" in chunk:
        raise EngineError(f"the server failed amid the answer: {error_message(json.dumps(chunk), key)}")
    text, is_last = "", False
    for choice in _objects_in(chunk.get("choices")):
        delta = choice.get("delta")
        content = cast("dict[str, Any]", delta).get("content") if isinstance(delta, dict) else None
        text += content if isinstance(content, str) else ""
        is_last = is_last or choice.get("finish_reason") is not None
    vote = chunk.get("consensus")
    return AnswerPiece(
        text, _describe_server_vote(cast("dict[str, Any]", vote)) if isinstance(vote, dict) else ""
    ), is_last


def _describe_server_vote(vote: dict[str, Any]) -> str:
    """How corral's own server chose the answer. Raises: ValueError."""
    try:
        scores = tuple(each["score"] for each in _objects_in(vote["candidates"]))
        return describe_vote(one_line(str(vote["method"])), int(vote["winner"]), scores, int(vote["cancelled"]))
    except (KeyError, TypeError, IndexError, OverflowError) as error:
        raise ValueError(f"a vote that is malformed: {error!r}") from None


def _parse_object(text: str | bytes) -> dict[str, Any]:
    """A JSON object. Raises: ValueError."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("an event is not a JSON object")
    return cast("dict[str, Any]", value)


def _objects_in(value: object) -> list[dict[str, Any]]:
    """The objects in a JSON list."""
    items = cast("list[Any]", value) if isinstance(value, list) else []
    return [item for item in items if isinstance(item, dict)]
