"""A model of any OpenAI-compatible server, to talk with: a conversation → its answer, as it comes.

It speaks `/v1/chat/completions` and is told of votes by corral's own server. It needs the HTTP client and nothing else that is
installed, so it works on a machine that has neither models nor what computes them. It does not know terminals, or what was
said before: the conversation is sent whole each time.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import httpx2

from corral import __version__
from corral.chat.repl import AnswerPiece, describe_vote
from corral.engines.remote.protocol import KEY_VARIABLE, api_url, auth_header, error_message, one_line
from corral.errors import EngineError, ModelError
from corral.messages import Conversation

_CONNECT_SECONDS = 10.0
_SILENCE_SECONDS = 600.0  # of a server that has a question
_LONGEST_ERROR = 2**16
_NOT_OPENAI = "is this the address of an OpenAI-compatible server? It usually ends in /v1"


class ServerBackend:
    """One model there; a ChatBackend of `corral.chat.repl`.

    Args:
        url: of the API, with or without its `/v1`.
        model: its name; None takes the only one that is listed.
        key: sent as a auth_header token to that URL only, and never shown.
        options: what else each request holds, such as `max_tokens`.

    Raises:
        InputError: the URL or the key cannot be used.
        ModelError: the server cannot be asked which models it has, or has several.
    """

    def __init__(
        self, url: str, *, model: str | None = None, key: str | None = None, options: Mapping[str, Any] | None = None
    ) -> None:
        self.url = api_url(url)
        self._key = key
        self._options = dict(options or {})
        self._client = httpx2.Client(
            headers={"user-agent": f"corral/{__version__}"} | auth_header(key, self.url),
            timeout=httpx2.Timeout(_SILENCE_SECONDS, connect=_CONNECT_SECONDS),
        )
        try:
            self.model = self._only_model() if model is None else model
        except BaseException:
            self.close()
            raise

    def stream(self, conversation: Conversation) -> Generator[AnswerPiece, None, None]:
        """The answer as it comes; closing the generator closes the connection, which ends the server's work.

        Raises:
            EngineError: the server cannot be reached, refuses, or breaks off.
        """
        body = {"model": self.model, "messages": conversation.to_json()["messages"], "stream": True, **self._options}
        is_finished = False
        with self._asked("POST", "/chat/completions", body) as response:
            for event in httpx2.EventSource(response):
                if event.data == "[DONE]":
                    return
                piece, ends = _piece(_object(event.data), self._key)
                is_finished |= ends
                if piece.text or piece.note:
                    yield piece
        if not is_finished:
            raise EngineError("the connection was lost amid the answer")

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _only_model(self) -> str:
        try:
            with self._asked("GET", "/models") as response:
                listed = _object(response.read())
        except EngineError as error:
            raise ModelError(error.what, where=self.url, hint=error.hint) from None
        # corral's own server lists what only embeds as well, and says so.
        entries = [each for each in _list(listed.get("data")) if each.get("task", "chat") == "chat"]
        names = [str(each["id"]) for each in entries if "id" in each]
        if len(names) != 1:
            what = f"the server has {len(names)} models" + (
                f": {one_line(', '.join(names), self._key)}" if names else ""
            )
            raise ModelError(what, where=self.url, hint="name one with --model")
        return names[0]

    @contextmanager
    def _asked(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Generator[httpx2.Response]:
        """A successful answer, to be read. Raises: EngineError."""
        try:
            with self._client.stream(method, self.url + path, json=body) as response:
                if response.status_code != 200:
                    raise self._refusal(response)
                yield response
        except (httpx2.SSEError, httpx2.DecodingError, ValueError, RecursionError) as error:
            what = f"the server's answer cannot be read: {one_line(str(error), self._key)}"
            raise EngineError(what, hint=_NOT_OPENAI) from None
        except httpx2.TimeoutException:
            raise EngineError(f"{self.url} does not answer") from None
        except httpx2.ConnectError as error:
            what = f"{self.url} cannot be reached ({one_line(str(error) or type(error).__name__, self._key)})"
            raise EngineError(what, hint="is the server running, and is this its address?") from None
        except httpx2.TransportError as error:
            what = f"the connection was lost ({one_line(str(error) or type(error).__name__, self._key)})"
            raise EngineError(what) from None

    def _refusal(self, response: httpx2.Response) -> EngineError:
        data = b""
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) > _LONGEST_ERROR:
                break
        words = error_message(data[:_LONGEST_ERROR].decode("utf-8", "replace"), self._key)
        status = response.status_code
        what = f"the server answered {status}" + (f": {words}" if words else "")
        wait = response.headers.get("retry-after", "")
        hints = {
            401: f"give its key with {KEY_VARIABLE} or --key",
            403: f"give its key with {KEY_VARIABLE} or --key",
            404: f"{_NOT_OPENAI}; --model names another model",
        }
        return EngineError(what, hint=f"/retry in {wait} s" if wait.isdecimal() else hints.get(status))


def _piece(chunk: dict[str, Any], key: str | None) -> tuple[AnswerPiece, bool]:
    """What an event adds to the answer, and whether it ends it. Raises: EngineError (it tells of a fault)."""
    if "error" in chunk:
        raise EngineError(f"the server failed amid the answer: {error_message(json.dumps(chunk), key)}")
    text, ends = "", False
    for choice in _list(chunk.get("choices")):
        delta = choice.get("delta")
        content = cast("dict[str, Any]", delta).get("content") if isinstance(delta, dict) else None
        text += content if isinstance(content, str) else ""
        ends = ends or choice.get("finish_reason") is not None
    vote = chunk.get("consensus")
    return AnswerPiece(text, _note(cast("dict[str, Any]", vote)) if isinstance(vote, dict) else ""), ends


def _note(vote: dict[str, Any]) -> str:
    """How corral's server chose the answer. Raises: ValueError."""
    try:
        scores = tuple(each["score"] for each in _list(vote["candidates"]))
        return describe_vote(one_line(str(vote["method"])), int(vote["winner"]), scores, int(vote["cancelled"]))
    except (KeyError, TypeError, IndexError, OverflowError) as error:
        raise ValueError(f"a vote that is none: {error!r}") from None


def _object(text: str | bytes) -> dict[str, Any]:
    """A JSON object. Raises: ValueError."""
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("an event is no JSON object")
    return cast("dict[str, Any]", found)


def _list(value: object) -> list[dict[str, Any]]:
    """The objects of a JSON list."""
    listed = cast("list[Any]", value) if isinstance(value, list) else []
    return [each for each in listed if isinstance(each, dict)]
