"""The engine for any OpenAI-compatible server that takes token ids in `/v1/completions`.

corral's own server and vLLM are such: they return token ids (`return_token_ids`), end only at `stop_token_ids` (`ignore_eos`),
and give log-probabilities of a prompt (`echo`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import traceback
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeAlias, TypeVar

import httpx2

from corral.engines.base import (
    CLOSED,
    Alternatives,
    Delta,
    Engine,
    Features,
    Finish,
    Generation,
    ReplicaHealth,
    Sampling,
    TokenScore,
    closed_error,
)
from corral.engines.remote import discovery
from corral.engines.remote.client import Choice, Chunk, Logprobs, TransientError, chunks
from corral.engines.remote.discovery import RETURN_IDS, RETURN_TOPS, Returned
from corral.engines.remote.failover import FailoverClient
from corral.engines.remote.protocol import KEY_VARIABLE
from corral.errors import EngineError, EngineUnavailableError, ModelError

T = TypeVar("T")

Encode: TypeAlias = Callable[[str], Sequence[int]]
"""Text → token ids."""

_log = logging.getLogger(__name__)

_NO_IDS = "give `encode`, which makes ids of its text, or use a server that returns ids (corral serve, vLLM)"


class RemoteEngine(Engine):
    """Completes and scores at one or several endpoints that serve the same model.

    Which endpoint is asked, and when again, is said in `corral.engines.remote.failover`. A request whose answer breaks off is
    repeated if none of its unfinished choices has begun, or if it must come out the same (a seed, or temperature 0): then the
    new answer is compared with what was passed on already, and only the rest is passed on.

    Args:
        urls: of the API, such as `http://127.0.0.1:8000/v1`.
        model: its name there; None takes the only one that is listed.
        vocabulary: ids are in range(vocabulary); the tokenizer must be the model's.
        max_length: most tokens of prompt and completion; an endpoint that lists a shorter `max_model_len` has that.
            None: what the endpoints list.
        key: None takes the environment variable CORRAL_API_KEY, or none if it is not set. Never shown.
        encode: text → ids, for servers that return no ids. The completion is then known only as text: an answer comes
            whole, ends where the server ends it, is tokenised anew (other ids may make the same text), and has no
            log-probabilities. Without it the answers of such a server are refused.
        probe: ask for one token at first, to see what the server returns besides text: `encode` is used only if it returns
            no ids, and `features` says whether it gives log-probabilities. Without it a server is taken to give all of
            it, or only text if there is `encode`.
        concurrency: requests under way at once, over all URLs. None: as many as each endpoint lists that it runs at once
            (`max_requests`), and 64 at one that lists nothing.
        retries: how often a request waits because no endpoint takes it; the first time about `backoff_seconds`, then
            twice as long each time. With 0, `submit` raises EngineUnavailableError while all endpoints rest.
        timeout_seconds: the longest silence of an endpoint that has a request; the first token may take that long.
        check_seconds: how often to check endpoints that nobody asks, so that `ready` is up to date; None checks only
            those that failed.

    Raises:
        InputError: a URL cannot be used, or the endpoint does not list the model's context and `max_length` is not given.
        ModelError: no endpoint answers, the key is refused, the model is not there, or the server returns too little.
    """

    name = "remote"

    def __init__(
        self,
        urls: Sequence[str],
        *,
        model: str | None,
        vocabulary: int,
        max_length: int | None = None,
        key: str | None = None,
        encode: Encode | None = None,
        probe: bool = False,
        concurrency: int | None = None,
        retries: int = 8,
        backoff_seconds: float = 1.0,
        timeout_seconds: float = 600.0,
        check_seconds: float | None = None,
    ) -> None:
        self._refuses_while_resting = retries == 0
        self._endpoints = FailoverClient(
            urls,
            key=key or os.environ.get(KEY_VARIABLE) or None,
            timeout_seconds=timeout_seconds,
            retries=retries,
            backoff_seconds=backoff_seconds,
            check_seconds=check_seconds,
        )
        self._requests: set[_Request] = set()
        self._closing = threading.Lock()
        """Held while work is given to the loop, so that none arrives after `close`."""
        self._is_closed = False
        # Engines serve callers of several event loops; connections belong to one.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="corral-remote", daemon=True)
        self._thread.start()
        try:
            listed = self._run(self._endpoints.models()).result()
            models = discovery.find_model(listed, model)
            self.model = models[0].id
            length = discovery.shortest_context(models, max_length)
            returns_all = encode is None
            returned = Returned(returns_all, returns_all, returns_all, returns_all)
            if probe:
                returned = self._run(discovery.probe(self._endpoints, self.model)).result()
            if returned.ids:
                encode = None
            elif encode is None:
                raise ModelError("the endpoint gives back text and no token ids", where=listed[0][0], hint=_NO_IDS)
            elif probe:
                _log.warning(
                    "%s gives no token ids: its text is tokenised here, and there are no log-probabilities",
                    listed[0][0],
                )
            concurrency = concurrency or discovery.requests_at_once(models, len(self.replicas))
            self._run(self._endpoints.monitor(self.model, concurrency)).result()
        except BaseException:
            self._end()
            raise
        self._encode = encode
        self.features = Features(
            length,
            vocabulary,
            returned.logprobs,
            returned.scores,
            concurrency,
            honours=returned.honours,
            score_top=returned.scores and returned.tops,
        )

    @property
    def fault(self) -> str | None:
        """Closed, or no endpoint may be asked: not those that failed, until they list the model again."""
        if self._is_closed:
            return CLOSED
        replicas = self.replicas
        if any(each.fault is None for each in replicas):
            return None
        return (
            f"none of {len(replicas)} servers can be asked: {', '.join(sorted({str(each.fault) for each in replicas}))}"
        )

    @property
    def replicas(self) -> Sequence[ReplicaHealth]:  # noqa: D102 (see Engine)
        return self._endpoints.health

    def submit(self, ids: Sequence[int], sampling: Sampling) -> Generation:  # noqa: D102 (see Engine)
        self.check_submit(ids, sampling)
        if self._refuses_while_resting and not self._is_closed and (fault := self.fault):
            raise EngineUnavailableError(f"engine {self.name!r}: {fault}", hint="ask again later")
        request = _Request(tuple(map(int, ids)), sampling, self._encode)

        def cancel(choice: int | None) -> None:
            with contextlib.suppress(RuntimeError):  # the engine was closed, and its requests with it
                self._loop.call_soon_threadsafe(request.cancel, choice)

        request.generation = Generation(len(ids), sampling.n, cancel)
        self._run(self._complete(request))
        return request.generation

    async def score(self, ids: Sequence[int], start: int = 1) -> list[float]:  # noqa: D102
        self.check_score(ids, start)
        return [score.logprob for score in await self._start_score(ids, start, 0)]

    async def score_top(self, ids: Sequence[int], start: int = 1, top: int = 1) -> list[TokenScore]:  # noqa: D102
        self.check_score_top(ids, start, top)
        return await self._start_score(ids, start, top)

    async def _start_score(self, ids: Sequence[int], start: int, top: int) -> list[TokenScore]:
        return await asyncio.wrap_future(self._run(self._score([*map(int, ids)], start, top)))

    async def close(self) -> None:  # noqa: D102
        await asyncio.to_thread(self._end)

    def _run(self, work: Coroutine[Any, Any, T]) -> Any:
        """Run a coroutine on the engine's loop. Returns: its concurrent.futures.Future. Raises: EngineClosedError."""
        with self._closing:
            if self._is_closed:
                work.close()
                raise closed_error(self)
            return asyncio.run_coroutine_threadsafe(self._until_closed(work), self._loop)

    async def _until_closed(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return await work
        except asyncio.CancelledError:
            if self._is_closed:
                raise closed_error(self) from None
            raise

    def _end(self) -> None:
        with self._closing:
            first, self._is_closed = not self._is_closed, True
        if first:
            asyncio.run_coroutine_threadsafe(self._stop_work(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        if first:
            self._loop.close()

    async def _stop_work(self) -> None:
        for request in list(self._requests):
            request.generation.fail(closed_error(self))
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._endpoints.close()

    async def _complete(self, request: _Request) -> None:
        request.task = asyncio.current_task()
        if not request.unfinished:
            return  # cancelled before it began
        self._requests.add(request)
        try:
            await self._endpoints.post("/completions", request.body(self.model), request.read, request.may_repeat)
        except EngineError as error:
            request.generation.fail(error)
        except Exception as error:
            # The log must not show the message, which may quote the prompt or the answer.
            frame = traceback.extract_tb(error.__traceback__)[-1]
            kind = type(error).__name__
            _log.error("engine %r failed: %s at %s:%d", self.name, kind, frame.filename, frame.lineno)
            request.generation.fail(EngineError(f"engine {self.name!r}: {error!r}"))
        finally:
            self._requests.discard(request)

    async def _score(self, ids: list[int], start: int, top: int) -> list[TokenScore]:
        if start == len(ids):
            return []
        body: dict[str, Any] = {"model": self.model, "prompt": ids, "max_tokens": 0, "echo": True, "logprobs": top}
        if top:
            body |= RETURN_TOPS

        async def read(response: httpx2.Response) -> list[TokenScore]:
            given = Chunk.model_validate_json(await response.aread()).logprobs
            values = [value for value in given.token_logprobs[start : len(ids)] if value is not None]
            tops = given.alternatives(top)[start : len(ids)] if top else [()] * len(values)
            if len(given.token_logprobs) not in (len(ids), len(ids) + 1) or not (
                len(values) == len(tops) == len(ids) - start
            ):
                raise EngineError(
                    f"the endpoint gives {len(given.token_logprobs)} log-probabilities of a prompt of {len(ids)} ids",
                    hint="it must support `echo` with `logprobs`, as corral serve and vLLM do",
                )
            return list(map(TokenScore, values, tops))

        return await self._endpoints.post("/completions", body, read)


class _Request:
    """A generation under way. Used on the engine's loop only, once it has been handed over."""

    generation: Generation
    task: asyncio.Task[Any] | None = None

    def __init__(self, ids: tuple[int, ...], sampling: Sampling, encode: Encode | None) -> None:
        self.unfinished = set(range(sampling.n))
        self._ids = ids
        self._sampling = sampling
        self._encode = encode
        self._passed_on: list[list[int]] = [[] for _ in range(sampling.n)]
        """Ids of each choice, over all tries."""
        self._received = [0] * sampling.n
        """How many ids of each choice this try brought."""
        self._texts = [""] * sampling.n
        """What this try brought, from a server that returns no ids."""

    def body(self, model: str) -> dict[str, Any]:
        """The JSON body of the request."""
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
            # vLLM takes the last three from the model's generation_config.json unless they are given.
            body |= RETURN_IDS | {"stop_token_ids": list(s.stop_ids)}
            body |= {"top_k": s.top_k, "min_p": s.min_p, "repetition_penalty": s.repetition_penalty}
        elif s.top_k:
            body["top_k"] = s.top_k
        for name in ("frequency_penalty", "presence_penalty", "min_tokens"):
            if getattr(s, name):
                body[name] = getattr(s, name)
        if s.logit_bias:
            body["logit_bias"] = {str(id_): bias for id_, bias in s.logit_bias}
        if s.logprobs:
            body["logprobs"] = s.top_logprobs
        if s.top_logprobs:
            body |= RETURN_TOPS
        return body

    def may_repeat(self) -> bool:
        """Whether the request may be sent again: its answer must come out the same, or not have begun."""
        is_certain = self._sampling.temperature == 0 or self._sampling.seed is not None
        return is_certain or not any(self._passed_on[choice] for choice in self.unfinished)

    def cancel(self, choice: int | None) -> None:
        """End one choice, or all; once none is left, the connection is closed."""
        for each in [c for c in self.unfinished if choice is None or c == choice]:
            self._push(each, [], [], [], "cancelled")
        if not self.unfinished and self.task is not None:
            self.task.cancel()

    async def read(self, response: httpx2.Response) -> None:
        """Pass a stream on. Raises: TransientError, EngineError."""
        self._received = [0] * self._sampling.n
        self._texts = [""] * self._sampling.n
        computed = set(range(self._sampling.n))  # by the endpoint, which also computes choices that were cancelled here
        async with contextlib.aclosing(chunks(response)) as stream:
            async for chunk in stream:
                for choice in chunk.choices:
                    self._receive(choice)
                    if choice.finish_reason is not None:
                        computed.discard(choice.index)
                if not self.unfinished and computed:
                    return  # closing the connection ends the endpoint's work on cancelled choices
        if self.unfinished:
            raise TransientError("ended its answer too early")

    def _receive(self, new: Choice) -> None:
        if not 0 <= new.index < self._sampling.n:
            raise EngineError(f"the endpoint answers with a choice {new.index}, and {self._sampling.n} were asked for")
        if new.index not in self.unfinished:
            return
        finish = new.finish
        logprobs: list[float] = []
        tops: list[Alternatives] = []
        if self._encode is not None:
            self._texts[new.index] += new.text
            if finish is None:
                return
            ids = list(self._encode(self._texts[new.index]))[: self._sampling.max_tokens]
        elif new.token_ids is None and new.text:
            raise EngineError("the endpoint gives back text and no token ids", hint=_NO_IDS)
        else:
            ids = new.token_ids or []
            if self._sampling.logprobs and ids:
                given = new.logprobs or Logprobs()
                logprobs = [value for value in given.token_logprobs if value is not None]
                if len(logprobs) != len(ids):
                    raise EngineError(f"the endpoint gives {len(logprobs)} log-probabilities of {len(ids)} tokens")
                if count := self._sampling.top_logprobs:
                    tops = given.alternatives(count)
                    if len(tops) != len(ids):
                        raise EngineError(f"the endpoint gives the most likely ids at {len(tops)} of {len(ids)} places")
        # vLLM's ids end with the stop id, corral's before it.
        stop = next((i for i, id_ in enumerate(ids) if id_ in self._sampling.stop_ids), None)
        if stop is not None:
            ids, finish = ids[:stop], "stop"
        fresh = self._without_passed_on(new.index, ids)
        if fresh or finish is not None:
            known = len(ids) - len(fresh)
            self._push(new.index, fresh, logprobs[known : len(ids)], tops[known : len(ids)], finish)

    def _without_passed_on(self, choice: int, ids: list[int]) -> list[int]:
        """Those of the ids that no earlier try brought. Raises: EngineError (they differ from that try's, or are too many)."""
        passed_on, received = self._passed_on[choice], self._received[choice]
        self._received[choice] += len(ids)
        known = passed_on[received : received + len(ids)]
        if ids[: len(known)] != known:
            raise EngineError(
                f"asked again after it was lost, the endpoint began choice {choice} with other ids",
                hint="ask anew; with bfloat16, int8 and int4 weights a draw may depend on the other requests in the batch",
            )
        if len(passed_on) + len(ids) - len(known) > self._sampling.max_tokens:
            raise EngineError(f"the endpoint gives more than the {self._sampling.max_tokens} tokens asked for")
        return ids[len(known) :]

    def _push(
        self, choice: int, ids: list[int], logprobs: list[float], tops: list[Alternatives], finish: Finish | None
    ) -> None:
        self._passed_on[choice] += ids
        if finish is not None:
            self.unfinished.discard(choice)
        values = tuple(logprobs) if self._sampling.logprobs else None
        best = tuple(tops) if self._sampling.top_logprobs else None
        self.generation.push(Delta(choice, tuple(ids), values, finish, best))
