"""The engine protocol: token ids in, token ids out.

An engine takes the ids of one prompt and a Sampling, and yields Deltas: new ids of one of the n choices. It knows no text, no
template and no conversation. `features` says what it can do; a request for anything else is refused with RequestError before
any work. Every engine passes the tests in `tests/engines/conformance.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias, TypeVar

from corral.errors import EngineClosedError, EngineError, InputError, RequestError

T = TypeVar("T")
Finish: TypeAlias = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample completions of one prompt."""

    max_tokens: int = 256
    """The most tokens per choice."""
    n: int = 1
    """Completions of the prompt, which is computed once for all of them."""
    temperature: float = 0.0
    """0 takes the most likely token at each step."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens whose probability reaches this; 1 samples from all."""
    top_k: int = 0
    """Sample from this many most likely tokens; 0 samples from all."""
    min_p: float = 0.0
    """Sample from tokens with at least this share of the most likely one's probability; 0 samples from all."""
    repetition_penalty: float = 1.0
    """Divides positive logits, and multiplies negative ones, of tokens in the prompt or the answer so far; 1 changes none."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit as often as it stands in the answer so far."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that stand in the answer so far."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(id, what is added to its logit)."""
    min_tokens: int = 0
    """No stop id is sampled before the answer has this many tokens."""
    seed: int | None = None
    """The same seed gives the same ids, alone or in a batch, if weights and products are float32. With a lower precision,
    rounding depends on the other rows of the batch, and may change an id. None gives other ids each time."""
    stop_ids: tuple[int, ...] = ()
    """A choice ends when one of these is sampled. The stop id is not part of the completion."""
    logprobs: bool = False
    """Whether Deltas carry the log-probability of each id under the model (before temperature and top-p)."""
    top_logprobs: int = 0
    """How many of the most likely ids at each position, with their log-probabilities, Deltas carry too; needs `logprobs`."""

    def for_row(self, row: str | int) -> Sampling:
        """With a seed of its own for one of many rows. Rows with one seed draw the same random numbers, so that their answers
        go wrong together, and the spread between rows says nothing of the spread between seeds."""
        if self.seed is None:
            return self
        digest = hashlib.sha256(f"{self.seed} {row}".encode()).digest()
        return replace(self, seed=int.from_bytes(digest[:4]))


OPTIONAL_SAMPLING: Mapping[str, Any] = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "logit_bias": (),
    "min_tokens": 0,
    "top_logprobs": 0,
}
"""Fields of Sampling that not every engine supports → the value that changes nothing."""

CHAT_SAMPLING = {"max_tokens": 512, "temperature": 0.7, "top_p": 0.9}
"""Default sampling for chat, and for clients that give no settings. It belongs to no run."""


@dataclass(frozen=True, slots=True)
class Features:
    """What an engine can do."""

    max_length: int
    """Most tokens of prompt and completion together."""
    vocabulary: int
    """Ids are in range(vocabulary)."""
    logprobs: bool
    """Whether Sampling.logprobs is supported."""
    score: bool
    """Whether `score` works."""
    requests: int | None = None
    """How many requests it computes at once, if that depends on servers, which say so."""
    honours: frozenset[str] = frozenset()
    """Which of `OPTIONAL_SAMPLING` it supports."""
    score_top: bool = False
    """Whether `score_top` works."""


Alternatives: TypeAlias = tuple[tuple[int, float], ...]
"""The most likely ids at one position with their log-probabilities, the most likely first."""


MAX_ALTERNATIVES = 20
"""The most alternatives that a request may have of each position."""


@dataclass(frozen=True, slots=True)
class TokenScore:
    """How likely one given id is after all ids before it, and what would have been more likely."""

    logprob: float
    """Natural log of its probability."""
    top: Alternatives


@dataclass(frozen=True, slots=True)
class Delta:
    """New ids of one choice. The last Delta of a choice carries `finish`, perhaps with no ids."""

    choice: int
    ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None
    finish: Finish | None = None
    top_logprobs: tuple[Alternatives, ...] | None = None
    """Of each id, if `Sampling.top_logprobs` asks for them."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished choice, without its stop id."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    finish: Finish
    top_logprobs: tuple[Alternatives, ...] | None = None


class Generation:
    """A request under way: an async iterator of Deltas, which may be cancelled whole or by choice.

    The caller iterates (once) or awaits `completions()`; if that ends early (a break, an error, a cancelled task), the
    unfinished choices are cancelled. The engine calls `push` and `fail`, from any thread.
    """

    def __init__(self, prompt_tokens: int, n: int, on_cancel: Callable[[int | None], None]) -> None:
        self.prompt_tokens = prompt_tokens
        self.n = n
        self._on_cancel = on_cancel
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Delta | EngineError] = asyncio.Queue()
        self._unfinished = set(range(n))

    def push(self, delta: Delta) -> None:
        """For engines: hand over new ids. Thread-safe; dropped if the caller's event loop is closed."""
        self._put(delta)

    def fail(self, error: EngineError) -> None:
        """For engines: end the request with an error, which the caller's iteration raises. Thread-safe."""
        self._put(error)

    def _put(self, item: Delta | EngineError) -> None:
        # The caller's loop may close at any moment, and the engine's thread must not die of it.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    def cancel(self, choice: int | None = None) -> None:
        """Stop one choice, or all. Each stopped choice still gets a last Delta with finish "cancelled"."""
        self._on_cancel(choice)

    async def __aiter__(self) -> AsyncGenerator[Delta, None]:
        try:
            while self._unfinished:
                item = await self._queue.get()
                if isinstance(item, EngineError):
                    self._unfinished.clear()
                    raise item
                if item.finish is not None:
                    self._unfinished.discard(item.choice)
                yield item
                if not self._queue.empty():
                    await asyncio.sleep(0)  # `get` would not let others run, however much has piled up
        finally:
            if self._unfinished:
                self.cancel()

    async def completions(self) -> list[Completion]:
        """Wait for all choices; cancels them if the waiting task is cancelled.

        Returns: n Completions, in the order of their choice index.
        """
        deltas: list[list[Delta]] = [[] for _ in range(self.n)]
        async for delta in self:
            deltas[delta.choice].append(delta)
        return [_join(parts) for parts in deltas]


def _join(deltas: Sequence[Delta]) -> Completion:
    """All Deltas of one choice as a Completion."""
    logprobs = [delta.logprobs for delta in deltas if delta.logprobs is not None]
    tops = [delta.top_logprobs for delta in deltas if delta.top_logprobs is not None]
    finishes: list[Finish] = [delta.finish for delta in deltas if delta.finish]
    return Completion(
        tuple(chain.from_iterable(delta.ids for delta in deltas)),
        tuple(chain.from_iterable(logprobs)) if logprobs else None,
        finishes[0] if finishes else "cancelled",
        tuple(chain.from_iterable(tops)) if tops else None,
    )


@dataclass(frozen=True, slots=True)
class ReplicaHealth:
    """The state of one of the servers behind a remote engine."""

    url: str
    fault: str | None
    """Why it is left alone, as in "unreachable" or "HTTP 500"; None while it may be asked."""


class Engine(ABC):
    """A loaded model that completes and scores token ids. Safe to share between tasks; close it when done."""

    name: str
    features: Features

    @property
    def fault(self) -> str | None:
        """Why it cannot compute now, as far as it knows without trying; None if it can. It names no prompt, path or address,
        so anybody may see it."""
        return None

    @property
    def ready(self) -> bool:
        """Whether it can compute now: it has no fault."""
        return self.fault is None

    @property
    def restarts(self) -> int:
        """How often its process was started again."""
        return 0

    @property
    def replicas(self) -> Sequence[ReplicaHealth]:
        """The servers that compute for it; empty if it computes itself."""
        return ()

    @abstractmethod
    def submit(self, ids: Sequence[int], sampling: Sampling) -> Generation:
        """Start completions of a prompt. Returns at once; must be called in a running event loop.

        Raises:
            RequestError: the engine cannot do this (too long, id outside the vocabulary, feature it lacks).
            EngineClosedError: the engine was closed.
            EngineUnavailableError: it cannot compute now. The generation may raise this later instead.
        """

    @abstractmethod
    async def score(self, ids: Sequence[int], start: int = 1) -> list[float]:
        """Log-probabilities (natural log) of ids[start:], each given all ids before it; len(ids) − start values.

        Raises:
            RequestError: `features.score` is false, start < 1 (nothing precedes the first id), or ids too long.
            EngineClosedError: the engine was closed.
        """

    async def score_top(self, ids: Sequence[int], start: int = 1, top: int = 1) -> list[TokenScore]:
        """`score`, with the `top` most likely ids at each position; len(ids) − start values.

        Raises:
            RequestError: as `score`, or `features.score_top` is false, or `top` is not from 1 to MAX_ALTERNATIVES.
            EngineClosedError: the engine was closed.
        """
        raise RequestError(f"engine {self.name!r} gives no alternatives of given ids")

    @abstractmethod
    async def close(self) -> None:
        """Stop; requests under way fail with EngineClosedError. Closing twice is allowed."""

    def with_adapter(self, folder: Path) -> Engine:
        """Another engine on the same weights, with the LoRA adapter of a folder in place of this one's, if it has one.

        Blocks until the adapter is loaded. Closing that engine unloads the adapter, and this one goes on.

        Raises:
            RequestError: this engine loads no adapters while it serves, or not this kind.
            ModelError: the adapter does not fit the model.
        """
        raise RequestError(
            f"engine {self.name!r} loads no adapters while it serves", hint="merge it, or use the transformers engine"
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def check_submit(self, ids: Sequence[int], sampling: Sampling) -> None:
        """For implementations of `submit`: raises RequestError if no engine, or not this one, can serve the request."""
        limit = self.features.max_length
        faults = (
            (sampling.n < 1, f"n = {sampling.n}: at least one choice is needed"),
            (sampling.max_tokens < 1, f"max_tokens = {sampling.max_tokens}: at least one token is needed"),
            (not 0 <= sampling.temperature < float("inf"), f"temperature = {sampling.temperature}: must be 0 or more"),
            (not 0 < sampling.top_p <= 1, f"top_p = {sampling.top_p}: must be over 0 and at most 1"),
            (sampling.top_k < 0, f"top_k = {sampling.top_k}: must be 0 (off) or more"),
            (sampling.logprobs and not self.features.logprobs, f"engine {self.name!r} gives no log-probabilities"),
        )
        for is_fault, message in (*faults, *_optional_faults(sampling, self.features.vocabulary)):
            if is_fault:
                raise RequestError(message)
        for name, neutral in OPTIONAL_SAMPLING.items():
            if getattr(sampling, name) != neutral and name not in self.features.honours:
                raise RequestError(f"{name}: engine {self.name!r} does not support it")
        self._check_ids(ids)
        if len(ids) + sampling.max_tokens > limit:
            raise RequestError(
                f"{len(ids)} prompt + {sampling.max_tokens} new tokens exceed the {limit} of engine {self.name!r}",
                hint="shorten the prompt or lower max_tokens",
            )

    def check_score(self, ids: Sequence[int], start: int) -> None:
        """For implementations of `score`: raises RequestError if the request cannot be served."""
        if not self.features.score:
            raise RequestError(f"engine {self.name!r} cannot score given ids")
        if not 1 <= start <= len(ids):
            raise RequestError(f"start = {start}: must be from 1 to the number of ids ({len(ids)})")
        self._check_ids(ids)
        if len(ids) > self.features.max_length:
            raise RequestError(f"{len(ids)} ids exceed the {self.features.max_length} of engine {self.name!r}")

    def check_score_top(self, ids: Sequence[int], start: int, top: int) -> None:
        """For implementations of `score_top`: raises RequestError if the request cannot be served."""
        if not self.features.score_top:
            raise RequestError(f"engine {self.name!r} gives no alternatives of given ids")
        if not 1 <= top <= MAX_ALTERNATIVES:
            raise RequestError(f"top = {top}: must be from 1 to {MAX_ALTERNATIVES}")
        self.check_score(ids, start)

    def _check_ids(self, ids: Sequence[int]) -> None:
        if not ids:
            raise RequestError("the prompt has no tokens")
        worst = max(ids) if min(ids) >= 0 else min(ids)
        if not 0 <= worst < self.features.vocabulary:
            raise RequestError(f"token id {worst} is outside the vocabulary of {self.features.vocabulary}")


def _optional_faults(sampling: Sampling, vocabulary: int) -> Iterator[tuple[bool, str]]:
    """(whether it is one, the message) for the fields of OPTIONAL_SAMPLING. The ranges are OpenAI's and vLLM's; within them
    no logit overflows."""
    s = sampling
    yield not 0 <= s.min_p <= 1, f"min_p = {s.min_p}: must be from 0 to 1"
    yield (
        not 0.01 <= s.repetition_penalty <= 100,
        f"repetition_penalty = {s.repetition_penalty}: must be from 0.01 to 100",
    )
    yield not -2 <= s.frequency_penalty <= 2, f"frequency_penalty = {s.frequency_penalty}: must be from -2 to 2"
    yield not -2 <= s.presence_penalty <= 2, f"presence_penalty = {s.presence_penalty}: must be from -2 to 2"
    for id_, bias in s.logit_bias:
        yield not 0 <= id_ < vocabulary, f"logit_bias: token id {id_} is outside the vocabulary of {vocabulary}"
        yield not -100 <= bias <= 100, f"logit_bias of token id {id_} = {bias}: must be from -100 to 100"
    yield (
        not 0 <= s.min_tokens <= s.max_tokens,
        f"min_tokens = {s.min_tokens}: must be from 0 to max_tokens ({s.max_tokens})",
    )
    yield (
        not 0 <= s.top_logprobs <= MAX_ALTERNATIVES,
        f"top_logprobs = {s.top_logprobs}: must be from 0 to {MAX_ALTERNATIVES}",
    )
    yield s.top_logprobs > 0 and not s.logprobs, f"top_logprobs = {s.top_logprobs}: needs logprobs"


def run_engine(engine: Engine, use: Callable[[Engine], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine that uses an engine, on an event loop of its own, and close the engine."""

    async def run() -> T:
        async with engine:
            return await use(engine)

    return asyncio.run(run())


STEP_VARIABLE = "CORRAL_STEP_SECONDS"
"""Environment variable: seconds after which a step of an engine counts as hung, in place of `longest_step`."""


def longest_step(tokens: int, parameters: int) -> float:
    """Seconds after which an engine's step counts as hung.

    30, and what a step of so many tokens takes a model of so many parameters at 20 billion operations a second, which is a
    fifth of what two cores of a laptop do. Raises: InputError (the environment variable is no such number).
    """
    text = os.environ.get(STEP_VARIABLE)
    if text is None:
        return 30 + 2 * tokens * parameters / 20e9
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) < float("inf"):
            return seconds
    raise InputError(f"{text!r} is not a number of seconds over 0", where=STEP_VARIABLE, hint="unset it, or set 60")


CLOSED = "it was closed"
"""The fault of an engine after `close`."""


def closed_error(engine: Engine) -> EngineClosedError:
    """The error for a request to an engine that was closed."""
    return EngineClosedError(f"engine {engine.name!r} is closed", hint="load the engine again")
