"""The engine at the other end of a wire: any OpenAI-compatible server that takes token ids in `/v1/completions`.

corral's own server and vLLM are such: they give token ids back (`return_token_ids`), end at `stop_token_ids` and nothing
else (`ignore_eos`), and tell log-probabilities of a prompt (`echo`). It knows that protocol and when an answer may be asked
for twice. It does not know which of several URLs to ask (`endpoints`), and, as every engine, no text, save that of servers
which give no ids back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import traceback
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import httpx2

from corral.engines.base import Delta, Engine, Features, Finish, Generation, Sampling, closed_error
from corral.engines.remote.abilities import Abilities, abilities
from corral.engines.remote.endpoints import Endpoints, ListedModel
from corral.engines.remote.events import Event, NewTokens
from corral.engines.remote.http_errors import Lost
from corral.engines.remote.protocol import KEY_VARIABLE, one_line
from corral.errors import EngineError, EngineUnavailableError, InputError, ModelError

T = TypeVar("T")

_log = logging.getLogger(__name__)

_DONE = "[DONE]"
_LONGEST_EVENT = 2**24  # bytes: the first one may repeat the ids of a long prompt
_NO_IDS = "give `encode`, which makes ids of its text, or use a server that returns ids (corral serve, vLLM)"


class RemoteEngine(Engine):
    """Completes and scores at one or several endpoints that serve the same model.

    Requests go to the endpoint with the fewest under way. What one refuses with 429, 503 or 504 is asked elsewhere, or there
    again after as long as its Retry-After says; that does not concern other requests. One that cannot be reached, or fails
    three times in a row, is left alone for a while, then looked at until it lists the model. A request whose answer breaks off
    is asked again, if each of its unfinished choices has not begun, or must come out the same (a seed, or temperature 0): then
    what came is compared with what comes, and only the rest is passed on.

    Args:
        urls: of the API, such as `http://127.0.0.1:8000/v1`.
        model: its name there; None takes the only one that is listed.
        vocabulary: ids are in range(vocabulary); the tokenizer must be the model's.
        max_length: most tokens of prompt and completion; an endpoint whose list tells a shorter `max_model_len` has that.
            None: what the list tells.
        key: None takes the environment variable CORRAL_API_KEY, or none if it is not set. Never shown.
        encode: text → ids, for servers that give no ids back. What is drawn is then known only as text: an answer comes
            whole, ends where the server ends it, is tokenised anew (other ids may make the same text), and has no
            log-probabilities. Without it such a server's answers are refused.
        probe: ask for one token, to see what there is besides text: `encode` is used only where no ids are given, and
            `features` says whether there are log-probabilities. Without it a server is taken to give all of it, or only text
            if there is `encode`.
        concurrency: requests under way at once, over all URLs.
        retries: how often a request waits because no endpoint takes it; the first time about `backoff_seconds`, then
            twice as long each time. 0 waits for none, and `submit` then refuses while all of them rest.
        timeout_seconds: the longest silence of an endpoint that has a request; the first token may take that long.
        check_seconds: how often endpoints that nobody asks are looked at, so that `ready` tells of those that have gone; None
            looks only at those that failed.
        name: what errors and records call this engine.

    Raises:
        InputError: a URL cannot be used, or the endpoint does not tell the model's context and `max_length` is not given.
        ModelError: no endpoint answers, the key is refused, the model is not there, or what was tried out does not suffice.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        model: str | None,
        vocabulary: int,
        max_length: int | None = None,
        key: str | None = None,
        encode: Callable[[str], Sequence[int]] | None = None,
        probe: bool = False,
        concurrency: int = 64,
        retries: int = 8,
        backoff_seconds: float = 1.0,
        timeout_seconds: float = 600.0,
        check_seconds: float | None = None,
        name: str = "remote",
    ) -> None:
        self.name = name
        self._encode = encode
        self._patient = retries > 0
        self._endpoints = Endpoints(
            urls,
            key=key or os.environ.get(KEY_VARIABLE) or None,
            concurrency=concurrency,
            timeout_seconds=timeout_seconds,
            retries=retries,
            backoff_seconds=backoff_seconds,
            check_seconds=check_seconds,
        )
        self._tasks: set[asyncio.Task[Any]] = set()
        self._open: set[_Request] = set()
        self._handing = threading.Lock()
        """Held while work is handed to the loop, so that none arrives once it has been told to end."""
        self._is_closed = False
        # Engines serve callers of several event loops; connections belong to one.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"corral-{name}", daemon=True)
        self._thread.start()
        try:
            listed = self._hand_over(self._endpoints.models()).result()
            found = _the_model(listed, model)
            self.model = found[0].id
            length = _shortest(found, max_length)
            told = encode is None
            can = Abilities(told, told, told)
            if probe:
                can = self._hand_over(abilities(self._endpoints, self.model)).result()
                self._encode = _way_without_ids(can, encode, listed[0][0])
            self._hand_over(self._endpoints.watch(self.model)).result()
        except BaseException:
            self._end()
            raise
        self.features = Features(length, vocabulary, can.logprobs, can.score)

    @property
    def ready(self) -> bool:
        """Whether an endpoint may be asked: those that failed may not, until they list the model again."""
        return self._endpoints.ready

    def submit(self, ids: Sequence[int], sampling: Sampling) -> Generation:  # noqa: D102 (the protocol says it)
        self.check_submit(ids, sampling)
        if not (self._patient or self.ready):
            raise EngineUnavailableError(f"no endpoint of engine {self.name!r} answers", hint="ask again later")
        request = _Request(tuple(map(int, ids)), sampling, self._encode)

        def cancel(choice: int | None) -> None:
            with contextlib.suppress(RuntimeError):  # the engine was closed, and its requests with it
                self._loop.call_soon_threadsafe(request.cancel, choice)

        request.generation = Generation(len(ids), sampling.n, cancel)
        self._hand_over(self._answer(request))
        return request.generation

    async def score(self, ids: Sequence[int], start: int = 1) -> list[float]:  # noqa: D102
        self.check_score(ids, start)
        return await asyncio.wrap_future(self._hand_over(self._score([*map(int, ids)], start)))

    async def close(self) -> None:  # noqa: D102
        await asyncio.to_thread(self._end)

    def _hand_over(self, work: Coroutine[Any, Any, T]) -> Any:
        """Run a coroutine on the engine's loop. Returns: its concurrent.futures.Future. Raises: EngineClosedError."""
        with self._handing:
            if self._is_closed:
                work.close()
                raise closed_error(self)
            return asyncio.run_coroutine_threadsafe(self._tracked(work), self._loop)

    async def _tracked(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            return await work
        except asyncio.CancelledError:
            if self._is_closed:
                raise closed_error(self) from None
            raise
        finally:
            self._tasks.discard(task)

    def _end(self) -> None:
        with self._handing:
            first, self._is_closed = not self._is_closed, True
        if first:
            asyncio.run_coroutine_threadsafe(self._stop_work(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        if first:
            self._loop.close()

    async def _stop_work(self) -> None:
        for request in list(self._open):
            request.generation.fail(closed_error(self))
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._endpoints.close()

    async def _answer(self, request: _Request) -> None:
        request.task = asyncio.current_task()
        if not request.open:
            return  # cancelled before it began
        self._open.add(request)
        try:
            await self._endpoints.post("/completions", request.body(self.model), request.read, request.may_repeat)
        except EngineError as error:
            request.generation.fail(error)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]  # its words may quote what was asked or answered
            kind = type(error).__name__
            _log.error("engine %r failed: %s at %s:%d", self.name, kind, place.filename, place.lineno)
            request.generation.fail(EngineError(f"engine {self.name!r}: {error!r}"))
        finally:
            self._open.discard(request)

    async def _score(self, ids: list[int], start: int) -> list[float]:
        if start == len(ids):
            return []
        body: dict[str, Any] = {"model": self.model, "prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 0}

        async def read(response: httpx2.Response) -> list[float]:
            answer = Event.model_validate_json(await response.aread())
            given = answer.choices[0].logprobs.token_logprobs if answer.choices and answer.choices[0].logprobs else []
            values = [value for value in given[start : len(ids)] if value is not None]
            if len(given) not in (len(ids), len(ids) + 1) or len(values) != len(ids) - start:
                raise EngineError(
                    f"the endpoint gives {len(given)} log-probabilities of a prompt of {len(ids)} ids",
                    hint="it must support `echo` with `logprobs`, as corral serve and vLLM do",
                )
            return values

        return await self._endpoints.post("/completions", body, read)


class _Request:
    """A generation under way; on the engine's loop, once it has been handed over."""

    generation: Generation
    task: asyncio.Task[Any] | None = None

    def __init__(self, ids: tuple[int, ...], sampling: Sampling, encode: Callable[[str], Sequence[int]] | None) -> None:
        self.open = set(range(sampling.n))
        self._ids = ids
        self._sampling = sampling
        self._encode = encode
        self._given: list[list[int]] = [[] for _ in range(sampling.n)]
        """What was passed on, for each choice."""
        self._seen = [0] * sampling.n
        """How many ids of each choice this try brought."""
        self._texts = [""] * sampling.n

    def body(self, model: str) -> dict[str, Any]:
        """What is asked."""
        s = self._sampling
        body: dict[str, Any] = {
            "model": model,
            "prompt": list(self._ids),
            "stream": True,
            "max_tokens": s.max_tokens,
            "n": s.n,
            "temperature": s.temperature,
            "top_p": s.top_p,
        }
        if s.seed is not None:
            body["seed"] = s.seed
        if self._encode is None:
            body |= {"return_token_ids": True, "ignore_eos": True, "stop_token_ids": list(s.stop_ids)}
            # vLLM takes these from the model's generation_config.json unless it is told.
            body |= {"top_k": s.top_k, "min_p": 0.0, "repetition_penalty": 1.0}
        elif s.top_k:
            body["top_k"] = s.top_k
        if s.logprobs:
            body["logprobs"] = 0
        return body

    def may_repeat(self) -> bool:
        """Whether the same request can be asked again: it must come out as it began, or not have begun."""
        is_certain = self._sampling.temperature == 0 or self._sampling.seed is not None
        return is_certain or not any(self._given[choice] for choice in self.open)

    def cancel(self, choice: int | None) -> None:
        """End choices from the asking side; once none is left, the connection is closed."""
        for each in [c for c in self.open if choice is None or c == choice]:
            self._push(each, [], None, "cancelled")
        if not self.open and self.task is not None:
            self.task.cancel()

    async def read(self, response: httpx2.Response) -> None:
        """Pass a stream on. Raises: Lost, EngineError."""
        self._seen = [0] * self._sampling.n
        self._texts = [""] * self._sampling.n
        unfinished = set(range(self._sampling.n))  # as the endpoint sees it: it also works for cancelled choices
        async for event in httpx2.EventSource(response, _LONGEST_EVENT):
            if event.data == _DONE:
                break
            chunk = Event.model_validate_json(event.data)
            if chunk.error is not None:
                raise chunk.error.as_exception()
            for choice in chunk.choices:
                self._take(choice)
                if choice.finish_reason is not None:
                    unfinished.discard(choice.index)
            if not self.open and unfinished:
                return  # nobody needs the rest: closing the connection frees the endpoint's work
        if self.open:
            raise Lost("ended its answer too early")

    def _take(self, new: NewTokens) -> None:
        if not 0 <= new.index < self._sampling.n:
            raise EngineError(f"the endpoint answers with a choice {new.index}, and {self._sampling.n} were asked for")
        if new.index not in self.open:
            return
        finish = new.finish
        if self._encode is not None:
            self._texts[new.index] += new.text
            if finish is None:
                return
            ids = list(self._encode(self._texts[new.index]))[: self._sampling.max_tokens]
            logprobs = None
        elif new.token_ids is None and new.text:
            raise EngineError("the endpoint gives back text and no token ids", hint=_NO_IDS)
        else:
            ids = new.token_ids or []
            logprobs = self._logprobs_of(new, len(ids))
        # vLLM's ids end with the stop id, corral's before it.
        stop = next((i for i, id_ in enumerate(ids) if id_ in self._sampling.stop_ids), None)
        if stop is not None:
            ids, finish = ids[:stop], "stop"
        fresh = self._fresh(new.index, ids)
        if fresh or finish is not None:
            known = len(ids) - len(fresh)
            self._push(new.index, fresh, None if logprobs is None else logprobs[known : len(ids)], finish)

    def _fresh(self, index: int, ids: list[int]) -> list[int]:
        """Those ids that were not passed on by an earlier try. Raises: EngineError (they differ from that one's)."""
        given, seen = self._given[index], self._seen[index]
        self._seen[index] += len(ids)
        known = given[seen : seen + len(ids)]
        if ids[: len(known)] != known:
            raise EngineError(
                f"asked again after it was lost, the endpoint began choice {index} with other ids",
                hint="ask anew; bfloat16, int8 and int4 weights may turn a draw, as rounding depends on what is beside it",
            )
        if len(given) + len(ids) - len(known) > self._sampling.max_tokens:
            raise EngineError(f"the endpoint gives more than the {self._sampling.max_tokens} tokens asked for")
        return ids[len(known) :]

    def _logprobs_of(self, new: NewTokens, count: int) -> list[float] | None:
        if not self._sampling.logprobs:
            return None
        given = (new.logprobs.token_logprobs if new.logprobs else []) if count else []
        values = [value for value in given if value is not None]
        if len(values) != count:
            raise EngineError(f"the endpoint gives {len(values)} log-probabilities of {count} tokens")
        return values

    def _push(self, choice: int, ids: list[int], logprobs: list[float] | None, finish: Finish | None) -> None:
        self._given[choice] += ids
        if finish is not None:
            self.open.discard(choice)
        if logprobs is None and self._sampling.logprobs:
            logprobs = []
        self.generation.push(Delta(choice, tuple(ids), None if logprobs is None else tuple(logprobs), finish))


def _the_model(listed: Sequence[tuple[str, Sequence[ListedModel]]], name: str | None) -> list[ListedModel]:
    """The model as each endpoint lists it. Raises: ModelError."""
    found: list[ListedModel] = []
    for url, all_models in listed:
        models = [model for model in all_models if model.task == "chat"]
        names = one_line(", ".join(model.id for model in models)) or "none"
        if name is None and len(models) != 1:
            raise ModelError(f"the endpoint has several models, or none: {names}", where=url, hint="name one of them")
        wanted = models[0].id if name is None else name
        name = wanted  # the others must have it too
        of_url = next((model for model in models if model.id == wanted), None)
        if of_url is None:
            raise ModelError(
                f"the endpoint has no model {wanted!r}; it has: {names}", where=url, hint="name one of them"
            )
        found.append(of_url)
    return found


def _shortest(models: Sequence[ListedModel], known: int | None) -> int:
    """The context that all endpoints have. Raises: InputError (nobody tells it)."""
    lengths = [length for model in models if (length := model.max_model_len or known)]
    if len(lengths) != len(models):
        raise InputError("an endpoint does not tell the model's context", hint="give max_length, in tokens")
    return min(lengths if known is None else [*lengths, known])


def _way_without_ids(
    can: Abilities, encode: Callable[[str], Sequence[int]] | None, url: str
) -> Callable[[str], Sequence[int]] | None:
    """What makes ids of text, if that is needed. Raises: ModelError (it is, and there is nothing)."""
    if can.ids:
        return None
    if encode is None:
        raise ModelError("the endpoint gives back text and no token ids", where=url, hint=_NO_IDS)
    _log.warning("%s gives no token ids: its text is tokenised here, and there are no log-probabilities", url)
    return encode
