"""Continuous batching: the worker thread of the transformers engine.

Each running choice has one row of a key-value cache; every step computes one token for all rows. A request joins between two
steps and a finished or cancelled row leaves at once. A prompt, without its last token,
is computed once and copied to the rows of its choices; the last token is their first step, so that all logits are computed in
the same way. Scores are computed by `corral.model.packed_forward`.

The cache of one request is not reused for the next, and there is no speculative decoding.
"""

from __future__ import annotations

import logging
import queue
import random
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from transformers import DynamicCache, PreTrainedModel

from corral.engines.base import Alternatives, Delta, Finish, Generation, Sampling, TokenScore
from corral.engines.kv_cache import RowCache
from corral.engines.token_sampling import LogitChanges, changed, sample
from corral.errors import EngineClosedError, EngineError
from corral.model import packed_forward
from corral.model.compute.token_logprobs import most_likely

FORWARD_TOKENS = 4096
"""Prompt or scored tokens in one forward pass, which cancelling may have to wait for."""

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Request:
    """A request for completions, until all choices have ended."""

    ids: tuple[int, ...]
    sampling: Sampling
    generation: Generation
    waiting: list[int] = field(init=False)
    """Choices that have no row yet."""
    unfinished: set[int] = field(init=False)
    seed: int = field(init=False)

    def __post_init__(self) -> None:
        self.waiting = list(range(self.sampling.n))
        self.unfinished = set(self.waiting)
        self.seed = secrets.randbits(63) if self.sampling.seed is None else self.sampling.seed

    @property
    def longest(self) -> int:
        """Most tokens of prompt and completion."""
        return len(self.ids) + self.sampling.max_tokens

    def end(self, choice: int, finish: Finish) -> None:
        """End one choice."""
        self.unfinished.discard(choice)
        self.generation.push(Delta(choice, (), () if self.sampling.logprobs else None, finish))

    def fail(self, error: EngineError) -> None:
        """End all choices with an error."""
        self.unfinished.clear()
        self.generation.fail(error)


@dataclass(slots=True, eq=False)
class Score:
    """A request for the log-probabilities of ids[start:], with the `top` most likely ids at each position."""

    ids: tuple[int, ...]
    start: int
    top: int = 0
    result: Future[list[TokenScore]] = field(default_factory=Future[list[TokenScore]])


@dataclass(slots=True, eq=False)
class Cancel:
    """Cancels one choice of a request, or all."""

    request: Request
    choice: int | None


Command: TypeAlias = Request | Score | Cancel


@dataclass(slots=True, eq=False)
class _Row:
    """A running choice."""

    request: Request
    choice: int
    last: int
    """The id that the next step computes."""
    position: int
    """Of that id, in the sequence and in the cache."""
    random: random.Random
    changes: LogitChanges | None = None
    """None if its Sampling changes no logits."""
    sampled: int = 0
    """Ids so far."""

    @property
    def live(self) -> bool:
        return self.choice in self.request.unfinished


@dataclass(slots=True)
class _Next:
    """The next id of a row."""

    id: int
    logprob: float
    """Under the model; 0 if not requested."""
    top: Alternatives
    is_finite: bool
    """Whether the logits are finite numbers."""


class Worker:
    """Runs in the engine's thread. Other threads may call `enqueue` and `stop` only."""

    def __init__(
        self,
        model: PreTrainedModel,
        name: str,
        max_rows: int,
        max_cache_tokens: int,
        turn: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._model: Any = model
        self._backbone: Any = model.base_model
        self._name = name
        self._max_rows = max_rows
        self._max_cache_tokens = max_cache_tokens
        self._turn = turn
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._waiting: deque[Request] = deque()
        self._scores: deque[Score] = deque()
        self._rows: list[_Row] = []
        self._cache = RowCache(self._model.config.num_hidden_layers)
        self._step_began: float | None = None
        """On the monotonic clock; None while it waits for work."""

    @property
    def has_ended(self) -> bool:
        """Whether it takes no more work."""
        return self._closed

    @property
    def step_seconds(self) -> float:
        """How long it has been computing the present step; 0 between steps."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    def enqueue(self, command: Command) -> bool:
        """Hand over work, which is always answered. Returns: false if the worker has ended."""
        with self._lock:
            if not self._closed:
                self._inbox.put(command)
            return not self._closed

    def stop(self) -> None:
        """End after the current step; requests under way fail."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._inbox.put(None)

    def run(self) -> None:
        """Compute until stopped."""
        try:
            with torch.inference_mode():
                while self._receive():
                    self._step_began = time.monotonic()
                    self._drop_finished()
                    with self._turn():
                        self._admit()
                        self._step()
                        self._score()
                    self._step_began = None
        finally:
            self.stop()
            self._fail_everything()

    def _receive(self) -> bool:
        """Take the commands that have come, or wait for one if there is no work. Returns: whether to go on."""
        idle = not (self._rows or self._waiting or self._scores)
        while True:
            try:
                command = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            idle = False
            match command:
                case None:
                    return False
                case Request():
                    self._waiting.append(command)
                case Score():
                    self._scores.append(command)
                case Cancel(request, choice):
                    for each in sorted(request.unfinished) if choice is None else {choice} & request.unfinished:
                        request.end(each, "cancelled")

    def _drop_finished(self) -> None:
        """Remove finished rows: rows from the end move into their places."""
        live = [i for i, row in enumerate(self._rows) if row.live]
        if len(live) == len(self._rows):
            return
        free = [i for i in range(len(live)) if not self._rows[i].live]
        movers = [i for i in live if i >= len(live)]
        if movers:
            self._cache.move_rows(movers, free)
        for target, mover in zip(free, movers, strict=True):
            self._rows[target] = self._rows[mover]
        del self._rows[len(live) :]
        if not self._rows:
            self._cache.clear()

    def _admit(self) -> None:
        """Give rows to waiting choices: of the oldest request, and of others whose prompts are about as long."""
        group: list[tuple[Request, list[int]]] = []
        taken = len(self._rows)
        longest = max((row.request.longest for row in self._rows), default=0)
        for request in self._waiting:
            choices = [choice for choice in request.waiting if choice in request.unfinished]
            lengths = [len(request.ids), *(len(other.ids) for other, _ in group)]
            if choices and (not group or _fit_one_forward(lengths)):
                free = min(self._max_rows, self._max_cache_tokens // max(longest, request.longest)) - taken
                free = max(free, 0 if taken else 1)  # one row runs, however long
                if free <= 0:
                    break
                longest = max(longest, request.longest)
                choices, request.waiting = choices[:free], choices[free:]
                taken += len(choices)
                group.append((request, choices))
        self._waiting = deque(request for request in self._waiting if request.unfinished.intersection(request.waiting))
        if group:
            try:
                self._prefill(group)
            except Exception as error:
                self._fail([request for request, _ in group], error)

    def _prefill(self, group: list[tuple[Request, list[int]]]) -> None:
        """Compute the prompts, but for their last tokens, and fill the rows of their choices."""
        width = max(len(request.ids) for request, _ in group) - 1
        prompts = DynamicCache()
        if width:
            # Padded on the right, which causal attention does not see: no mask is needed, and positions start at 0.
            padded = [[*request.ids[:-1], *[0] * (width + 1 - len(request.ids))] for request, _ in group]
            ids = torch.tensor(padded, device=self._model.device)
            self._backbone(input_ids=ids, past_key_values=prompts, use_cache=True)
        rows = [self._new_row(request, choice) for request, choices in group for choice in choices]
        start = len(self._rows)
        self._cache.reserve(start + len(rows), 1 + max(row.position for row in (*self._rows, *rows)))
        for source, (request, choices) in enumerate(group):
            if len(request.ids) > 1:
                self._cache.copy_prompt(prompts, source, len(request.ids) - 1, slice(start, start + len(choices)))
            start += len(choices)
        self._rows += rows

    def _new_row(self, request: Request, choice: int) -> _Row:
        sampling, changes = request.sampling, None
        if LogitChanges.needed(sampling):
            changes = LogitChanges(sampling, request.ids, self._model.config.vocab_size, self._model.device)
        numbers = random.Random(f"{request.seed}:{choice}")
        return _Row(request, choice, request.ids[-1], len(request.ids) - 1, numbers, changes)

    def _step(self) -> None:
        """One token for every row."""
        if not self._rows:
            return
        try:
            sampled = self._next_ids()
        except Exception as error:
            failed, self._rows = {row.request for row in self._rows}, []
            self._cache.clear()
            self._fail(failed, error)
            return
        for row, each in zip(self._rows, sampled, strict=True):
            if row.live and each.is_finite:
                self._push(row, each)
            elif row.live:
                row.request.fail(EngineError(f"engine {self._name!r}: the model's logits are not finite numbers"))
        if broken := [i for i, each in enumerate(sampled) if not each.is_finite]:
            self._cache.zero_rows(broken)

    def _next_ids(self) -> list[_Next]:
        """Compute every row's last token, and sample the next."""
        device = self._model.device
        span = 1 + max(row.position for row in self._rows)
        columns = torch.tensor([row.position for row in self._rows], device=device)
        self._cache.reserve(len(self._rows), span)
        self._cache.set_columns(columns, span)
        visible = torch.arange(span, device=device) <= columns[:, None]
        output = self._model(
            input_ids=torch.tensor([[row.last] for row in self._rows], device=device),
            position_ids=columns[:, None],
            attention_mask=visible[:, None, None, :],
            past_key_values=self._cache,
            use_cache=True,
        )
        logits = output.logits[:, -1].float()
        finite = logits.amax(-1).isfinite()
        if not finite.all():
            logits = logits.where(finite[:, None], 0)
        samplings = [row.request.sampling for row in self._rows]
        # 1 − u: `sample` takes numbers that may be 1 but not 0.
        uniforms = [1 - row.random.random() for row in self._rows]
        ids = sample(changed(logits, [row.changes for row in self._rows]), samplings, uniforms)
        sampled = [_Next(id_, 0.0, (), ok) for id_, ok in zip(ids.tolist(), finite.tolist(), strict=True)]
        if needed := [i for i, sampling in enumerate(samplings) if sampling.logprobs]:
            logprobs = logits[needed].log_softmax(-1)
            for i, value in zip(needed, logprobs.gather(1, ids[needed, None]).squeeze(1).tolist(), strict=True):
                sampled[i].logprob = value
            if count := max(samplings[i].top_logprobs for i in needed):
                for i, top in zip(needed, most_likely(logprobs, count), strict=True):
                    sampled[i].top = tuple(top[: samplings[i].top_logprobs])
        return sampled

    def _push(self, row: _Row, new: _Next) -> None:
        """Pass a sampled id on, or end the choice."""
        request, sampling = row.request, row.request.sampling
        if new.id in sampling.stop_ids:
            request.end(row.choice, "stop")
            return
        row.last, row.position, row.sampled = new.id, row.position + 1, row.sampled + 1
        if row.changes is not None:
            row.changes.add(new.id)
        finish: Finish | None = "length" if row.sampled == sampling.max_tokens else None
        logprobs = (new.logprob,) if sampling.logprobs else None
        tops = (new.top,) if sampling.top_logprobs else None
        request.generation.push(Delta(row.choice, (new.id,), logprobs, finish, tops))
        if finish:
            request.unfinished.discard(row.choice)

    def _score(self) -> None:
        """Compute waiting scores, as many as fit in one forward pass: with alternatives, or without."""
        jobs: list[Score] = []
        tokens = 0
        while self._scores and (not jobs or tokens + len(self._scores[0].ids) <= FORWARD_TOKENS):
            if jobs and bool(jobs[0].top) != bool(self._scores[0].top):
                break
            job = self._scores.popleft()
            if job.result.set_running_or_notify_cancel():
                jobs.append(job)
                tokens += len(job.ids)
        if not jobs:
            return
        sequences, starts, top = [job.ids for job in jobs], [job.start for job in jobs], max(job.top for job in jobs)
        try:
            if top:
                scores = packed_forward.score_top(self._model, sequences, starts, top)
            else:
                plain = packed_forward.score(self._model, sequences, starts)
                scores = [[(value, list[tuple[int, float]]()) for value in each] for each in plain]
        except Exception as error:
            for job in jobs:
                job.result.set_exception(self._failure(error))
            return
        for job, each in zip(jobs, scores, strict=True):
            job.result.set_result([TokenScore(value, tuple(best[: job.top])) for value, best in each])

    def _fail(self, requests: Iterable[Request], error: Exception) -> None:
        for request in requests:
            request.fail(self._failure(error))
        self._waiting = deque(request for request in self._waiting if request.unfinished)

    def _failure(self, error: Exception) -> EngineError:
        # Not `from error`: its traceback would keep the tensors of the failed step alive.
        _log.debug("engine %r failed", self._name, exc_info=error)
        return EngineError(f"engine {self._name!r}: {type(error).__name__}: {error}")

    def _fail_everything(self) -> None:
        """Fail all requests that are not finished."""
        message = f"engine {self._name!r} was closed while it worked"
        rows, self._rows = self._rows, []
        requests = {row.request for row in rows} | set(self._waiting)
        scores = [*self._scores]
        while not self._inbox.empty():
            command = self._inbox.get()
            if isinstance(command, Request):
                requests.add(command)
            elif isinstance(command, Score):
                scores.append(command)
        self._cache.clear()
        for request in requests:
            if request.unfinished:
                request.fail(EngineClosedError(message))
        for job in scores:
            if job.result.set_running_or_notify_cancel():
                job.result.set_exception(EngineClosedError(message))


def _fit_one_forward(lengths: Sequence[int]) -> bool:
    """Whether prompts of these lengths are computed in one forward pass: they fit, and little is padding."""
    longest = max(lengths)
    return longest * len(lengths) <= FORWARD_TOKENS and longest <= 2 * min(lengths) + 64
