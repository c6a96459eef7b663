"""An engine without a model, which returns scripted ids: for tests, and to try code that uses an engine.

It keeps the whole engine protocol (choices, streaming, stop ids, cancelling, scores, failures) on the caller's event loop. It
uses no threads and imports nothing heavy. Every id has the same log-probability, and its successors are the alternatives.
Of the optional fields of Sampling it computes `min_tokens` and `top_logprobs`; the others are the reply's to honour.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeAlias

from corral.engines.base import (
    CLOSED,
    OPTIONAL_SAMPLING,
    Alternatives,
    Delta,
    Engine,
    Features,
    Finish,
    Generation,
    Sampling,
    TokenScore,
    closed_error,
)
from corral.errors import EngineError

Reply: TypeAlias = Callable[[Sequence[int], Sampling, int], Iterable[int]]
"""(prompt ids, sampling, choice) → the ids of the completion. An exception fails the request, also half-way."""

_ALL_FEATURES = Features(
    max_length=8192,
    vocabulary=2**20,
    logprobs=True,
    score=True,
    honours=frozenset(OPTIONAL_SAMPLING),
    score_top=True,
)


class ScriptedEngine(Engine):
    """Completes every prompt with the ids of `reply`.

    >>> engine = ScriptedEngine([5, 6, 7])                                     # the same for every prompt
    >>> engine = ScriptedEngine(lambda ids, sampling, choice: reversed(ids))   # by prompt, sampling and choice

    Stop ids and `max_tokens` cut the reply as they cut a model's; a reply that ends by itself finishes with "stop".

    Args:
        reply: the ids of every completion, or a function that returns (or generates) those of one choice.
        name: what errors and records call this engine.
        features: what it says it can do; it refuses the rest.
        logprob: the log-probability of every id, in completions and in scores. The alternatives to an id are those after it,
            each less likely by 1.
        chunk: ids per Delta.
        delay_seconds: how long each Delta, and each score, takes.
    """

    def __init__(
        self,
        reply: Reply | Sequence[int],
        *,
        name: str = "scripted",
        features: Features = _ALL_FEATURES,
        logprob: float = -0.5,
        chunk: int = 1,
        delay_seconds: float = 0.0,
    ) -> None:
        self.name = name
        self.features = features
        self._reply: Reply = reply if callable(reply) else lambda ids, sampling, choice: reply
        self._logprob = logprob
        self._chunk = chunk
        self._delay = delay_seconds
        self._closed = False
        self._requests: set[_Request] = set()

    @property
    def fault(self) -> str | None:  # noqa: D102 (see Engine)
        return CLOSED if self._closed else None

    def submit(self, ids: Sequence[int], sampling: Sampling) -> Generation:  # noqa: D102 (see Engine)
        self.check_submit(ids, sampling)
        if self._closed:
            raise closed_error(self)
        request = _Request(tuple(ids), sampling, self._logprob, self._alternatives)
        request.task = asyncio.create_task(self._complete(request))
        self._requests.add(request)
        request.task.add_done_callback(lambda _: self._requests.discard(request))
        return request.generation

    async def score(self, ids: Sequence[int], start: int = 1) -> list[float]:  # noqa: D102
        self.check_score(ids, start)
        if not self._closed:
            await asyncio.sleep(self._delay)
        if self._closed:
            raise closed_error(self)
        return [self._logprob] * (len(ids) - start)

    async def score_top(self, ids: Sequence[int], start: int = 1, top: int = 1) -> list[TokenScore]:  # noqa: D102
        self.check_score_top(ids, start, top)
        scores = await self.score(ids, start)
        return [TokenScore(p, self._alternatives(id_, top)) for p, id_ in zip(scores, ids[start:], strict=True)]

    async def close(self) -> None:  # noqa: D102
        self._closed = True
        for request in list(self._requests):
            request.generation.fail(closed_error(self))
            request.stop()

    def _alternatives(self, id_: int, count: int) -> Alternatives:
        vocabulary = self.features.vocabulary
        return tuple(((id_ + i) % vocabulary, self._logprob - i) for i in range(min(count, vocabulary)))

    async def _complete(self, request: _Request) -> None:
        try:
            replies = {
                choice: iter(self._reply(request.ids, request.sampling, choice)) for choice in request.unfinished
            }
            while request.unfinished:
                await asyncio.sleep(self._delay)
                for choice in sorted(request.unfinished):
                    request.advance(choice, replies[choice], self._chunk)
        except Exception as error:
            failure = error if isinstance(error, EngineError) else EngineError(f"engine {self.name!r}: {error!r}")
            request.generation.fail(failure)


class _Request:
    task: asyncio.Task[None]

    def __init__(
        self,
        ids: tuple[int, ...],
        sampling: Sampling,
        logprob: float,
        alternatives: Callable[[int, int], Alternatives],
    ) -> None:
        self.ids = ids
        self.sampling = sampling
        self.generation = Generation(len(ids), sampling.n, self.cancel)
        self.unfinished = dict.fromkeys(range(sampling.n), sampling.max_tokens)
        """Unfinished choice → how many tokens it may still get."""
        self._logprob = logprob
        self._alternatives = alternatives

    def advance(self, choice: int, reply: Iterator[int], count: int) -> None:
        """Push up to `count` ids of the reply, and finish the choice if it ends there."""
        ids: list[int] = []
        finish: Finish | None = None
        is_early = self.sampling.max_tokens - self.unfinished[choice] < self.sampling.min_tokens
        allowed = (id_ for id_ in reply if not is_early or id_ not in self.sampling.stop_ids)
        for id_ in islice(allowed, min(count, self.unfinished[choice])):
            if id_ in self.sampling.stop_ids:
                finish = "stop"
                break
            ids.append(id_)
        self.unfinished[choice] -= len(ids)
        if finish is None and self.unfinished[choice] == 0:
            finish = "length"
        elif len(ids) < count:
            finish = "stop"
        self._push(choice, ids, finish)

    def cancel(self, choice: int | None) -> None:
        for each in [c for c in self.unfinished if choice is None or c == choice]:
            self._push(each, [], "cancelled")
        if not self.unfinished:
            self.stop()

    def stop(self) -> None:
        # `close` may run on another loop, and the request's own may be closed.
        with contextlib.suppress(RuntimeError):
            self.task.get_loop().call_soon_threadsafe(self.task.cancel)

    def _push(self, choice: int, ids: list[int], finish: Finish | None) -> None:
        if finish is not None:
            del self.unfinished[choice]
        count = self.sampling.top_logprobs
        logprobs = (self._logprob,) * len(ids) if self.sampling.logprobs else None
        tops = tuple(self._alternatives(id_, count) for id_ in ids) if count else None
        self.generation.push(Delta(choice, tuple(ids), logprobs, finish, tops))
