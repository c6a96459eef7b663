"""The engine without a model: what it answers is written beforehand. For tests, and for trying what stands on an engine.

It keeps the whole protocol (choices, streaming, stop ids, cancelling, scores, failure) on the event loop of the caller, with
no threads and no heavy imports. It knows no probabilities: every id has the same made-up one.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeAlias

from corral.engines.base import Delta, Engine, Features, Finish, Generation, Sampling, closed_error
from corral.errors import EngineError

Reply: TypeAlias = Callable[[Sequence[int], Sampling, int], Iterable[int]]
"""(prompt ids, sampling, choice) → the ids to answer. An exception it raises, also half-way, fails the request."""

_EVERYTHING = Features(max_length=8192, vocabulary=2**20, logprobs=True, score=True)


class ScriptedEngine(Engine):
    """Answers what `reply` says.

    >>> engine = ScriptedEngine([5, 6, 7])                                     # the same to everybody
    >>> engine = ScriptedEngine(lambda ids, sampling, choice: reversed(ids))   # by prompt, sampling and choice

    Stop ids and `max_tokens` cut the reply as they cut a model's; a reply that ends by itself finishes with "stop".

    Args:
        reply: the ids of every answer, or a function that gives (or generates) those of one choice.
        name: what errors and records call this engine.
        features: what it claims to be able to do; it refuses the rest.
        logprob: the log-probability of every id, in completions and in scores.
        chunk: ids in one Delta.
        delay_seconds: how long each Delta, and each score, takes.
    """

    def __init__(
        self,
        reply: Reply | Sequence[int],
        *,
        name: str = "scripted",
        features: Features = _EVERYTHING,
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
        self._open: set[_Request] = set()

    def submit(self, ids: Sequence[int], sampling: Sampling) -> Generation:  # noqa: D102 (the protocol says it)
        self.check_submit(ids, sampling)
        if self._closed:
            raise closed_error(self)
        request = _Request(tuple(ids), sampling, self._logprob if sampling.logprobs else None)
        request.task = asyncio.create_task(self._answer(request))
        self._open.add(request)
        request.task.add_done_callback(lambda _: self._open.discard(request))
        return request.generation

    async def score(self, ids: Sequence[int], start: int = 1) -> list[float]:  # noqa: D102
        self.check_score(ids, start)
        if not self._closed:
            await asyncio.sleep(self._delay)
        if self._closed:
            raise closed_error(self)
        return [self._logprob] * (len(ids) - start)

    async def close(self) -> None:  # noqa: D102
        self._closed = True
        for request in list(self._open):
            request.generation.fail(closed_error(self))
            request.stop()

    async def _answer(self, request: _Request) -> None:
        try:
            replies = {choice: iter(self._reply(request.ids, request.sampling, choice)) for choice in request.left}
            while request.left:
                await asyncio.sleep(self._delay)
                for choice in sorted(request.left):
                    request.give(choice, replies[choice], self._chunk)
        except Exception as error:
            failure = error if isinstance(error, EngineError) else EngineError(f"engine {self.name!r}: {error!r}")
            request.generation.fail(failure)


class _Request:
    task: asyncio.Task[None]

    def __init__(self, ids: tuple[int, ...], sampling: Sampling, logprob: float | None) -> None:
        self.ids = ids
        self.sampling = sampling
        self.generation = Generation(len(ids), sampling.n, self.cancel)
        self.left = dict.fromkeys(range(sampling.n), sampling.max_tokens)
        """Unfinished choices: the tokens they may still take."""
        self._logprob = logprob

    def give(self, choice: int, reply: Iterator[int], count: int) -> None:
        """Take up to `count` ids of the reply, and see whether it ends there."""
        ids: list[int] = []
        finish: Finish | None = None
        for id_ in islice(reply, min(count, self.left[choice])):
            if id_ in self.sampling.stop_ids:
                finish = "stop"
                break
            ids.append(id_)
        self.left[choice] -= len(ids)
        if finish is None and self.left[choice] == 0:
            finish = "length"
        elif len(ids) < count:
            finish = "stop"
        self._push(choice, ids, finish)

    def cancel(self, choice: int | None) -> None:
        for each in [c for c in self.left if choice is None or c == choice]:
            self._push(each, [], "cancelled")
        if not self.left:
            self.stop()

    def stop(self) -> None:
        # Closing may come from another loop, and the request's own may be gone.
        with contextlib.suppress(RuntimeError):
            self.task.get_loop().call_soon_threadsafe(self.task.cancel)

    def _push(self, choice: int, ids: list[int], finish: Finish | None) -> None:
        if finish is not None:
            del self.left[choice]
        logprobs = None if self._logprob is None else (self._logprob,) * len(ids)
        self.generation.push(Delta(choice, tuple(ids), logprobs, finish))
