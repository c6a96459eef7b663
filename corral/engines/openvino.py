"""OpenVINO GenAI on a CPU: continuous batching in a child process (`openvino_process`).

This side keeps track of requests, sends them to the child and turns the child's events into Deltas. If the child ends or
hangs, the requests under way fail with EngineUnavailableError, and so do new ones until it is started again
(`child_process`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corral.engines.base import (
    CLOSED,
    OPTIONAL_SAMPLING,
    Alternatives,
    Delta,
    Engine,
    Features,
    Generation,
    Sampling,
    TokenScore,
    closed_error,
    longest_step,
)
from corral.engines.child_process import ChildProcess, Event
from corral.engines.openvino_process import BLOCK_TOKENS, STEP_TOKENS
from corral.errors import EngineError, EngineUnavailableError, ModelError, require
from corral.export_forms import OPENVINO_MODEL, OpenVinoType

if TYPE_CHECKING:
    from corral.model.loading import DType

MAX_SEQUENCES = 256
"""Sequences that OpenVINO computes together."""
_PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}


@dataclass
class _Pending:
    """A request under way: a generation and its unfinished choices, or a score."""

    generation: Generation | None = None
    unfinished: set[int] = field(default_factory=set[int])
    score: Future[list[TokenScore]] = field(default_factory=Future[list[TokenScore]])
    scores: list[TokenScore] = field(default_factory=list[TokenScore])
    """Those that have come."""

    def fail(self, error: EngineError) -> None:
        if self.generation is not None:
            self.generation.fail(error)
        else:
            self.score.set_exception(error)


class OpenVinoEngine(Engine):
    """Computes an OpenVINO folder (`openvino_model.xml`), or any Llama folder, which is converted once into the cache.

    Scores, `top_logprobs`, biases, and frequency and presence penalties take the memory of the weights a second time, from
    when they are first requested (see `openvino_inference`). `top_logprobs` costs a pass over prompt and answer for each
    choice, and its answer comes whole; with the others, choices are not computed together (see `openvino_stepping`).

    Args:
        folder: of the model.
        dtype: `float32` computes and caches in float32; `bfloat16` in bfloat16 where the processor has it.
        exact: do not round activations before products with int8 and int4 weights. Several times slower; a contract check
            uses it to tell whether the weights are right.

    Raises:
        MissingExtraError: the extra `openvino` is not installed.
        ModelError: the folder holds no model that OpenVINO can load, or dtype is another.
    """

    name = "openvino"

    def __init__(self, folder: Path, *, dtype: DType = "float32", exact: bool = False) -> None:
        require("openvino_genai", "openvino")
        if dtype not in _PRECISIONS:
            raise ModelError(f"the openvino engine does not compute in {dtype}", hint="use float32 or bfloat16")
        self._folder = folder
        self._form: Path | None = folder if (folder / OPENVINO_MODEL).is_file() else None
        self._precision: OpenVinoType = "f32" if dtype == "float32" else "f16"
        self._lock = threading.Lock()
        self._pending: dict[int, _Pending] = {}
        self._next_id = 0
        self._closed = False
        # Where it computes in bfloat16, OpenVINO 2026.4 wants keys and values in bfloat16 on some processors and in float32 on
        # others, and does not say which before it loads a model.
        first_error: EngineError | None = None
        for cache_type in ("f32",) if dtype == "float32" else ("bf16", "f32"):
            try:
                self._child = self._start_child(cache_type, _PRECISIONS[dtype], exact)
                return
            except EngineError as error:
                first_error = first_error or error
        assert first_error is not None
        raise ModelError(f"OpenVINO cannot load the model: {first_error.what}", where=str(folder))

    def _start_child(self, cache_type: str, precision: str, exact: bool) -> ChildProcess:
        """Start the child with these types of its key-value cache and of its computations. Raises: EngineError."""
        size = _ModelSize.fitting(self._converted(), 4 if cache_type == "f32" else 2)
        properties = {"INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": cache_type}
        if exact:
            properties["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "0"
        self.features = Features(
            max_length=size.longest,
            vocabulary=size.vocabulary,
            logprobs=True,
            score=True,
            honours=frozenset(OPTIONAL_SAMPLING),
            score_top=True,
        )
        settings = {"properties": properties, "blocks": size.blocks, "vocabulary": size.vocabulary}

        def command() -> list[str]:
            arguments = json.dumps({**settings, "folder": str(self._converted())})
            # -P: a file `openvino.py` in the current directory must not be imported in place of the package.
            return [sys.executable, "-P", "-m", "corral.engines.openvino_process", arguments]

        return ChildProcess(
            self.name,
            command,
            _environment(),
            self._handle_events,
            self._fail_all,
            longest_step=longest_step(STEP_TOKENS, size.parameters),
        )

    @property
    def fault(self) -> str | None:  # noqa: D102 (see Engine)
        return CLOSED if self._closed else self._child.fault

    @property
    def restarts(self) -> int:  # noqa: D102
        return self._child.restarts

    def submit(self, ids: Sequence[int], sampling: Sampling) -> Generation:  # noqa: D102 (see Engine)
        self._raise_if_closed()
        self.check_submit(ids, sampling)
        generation = Generation(len(ids), sampling.n, lambda choice: self._cancel(request, choice))
        pending = _Pending(generation, set(range(sampling.n)))
        fields = asdict(sampling)
        if sampling.min_tokens:  # OpenVINO writes to their places, also beyond the vocabulary
            fields["stop_ids"] = [id_ for id_ in sampling.stop_ids if id_ < self.features.vocabulary]
        request = self._start_request(pending, "submit", [*map(int, ids)], fields, _choice_seeds(sampling))
        return generation

    async def score(self, ids: Sequence[int], start: int = 1) -> list[float]:  # noqa: D102
        self._raise_if_closed()
        self.check_score(ids, start)
        return [score.logprob for score in await self._score(ids, start, 0)]

    async def score_top(self, ids: Sequence[int], start: int = 1, top: int = 1) -> list[TokenScore]:  # noqa: D102
        self._raise_if_closed()
        self.check_score_top(ids, start, top)
        return await self._score(ids, start, top)

    async def _score(self, ids: Sequence[int], start: int, top: int) -> list[TokenScore]:
        if start == len(ids):
            return []
        pending = _Pending()
        pending.score.set_running_or_notify_cancel()  # from here on a cancelled task cannot cancel it under the reader
        request = self._start_request(pending, "score", [*map(int, ids)], start, top)
        try:
            return await asyncio.wrap_future(pending.score)
        finally:
            with self._lock:
                if self._pending.pop(request, None) is not None:
                    self._cancel_in_child(request)

    async def close(self) -> None:  # noqa: D102
        self._closed = True
        self._fail_all(closed_error(self))
        await asyncio.to_thread(self._child.close)

    def _raise_if_closed(self) -> None:
        if self._closed:
            raise closed_error(self)

    def _start_request(self, pending: _Pending, command: str, *arguments: Any) -> int:
        """Send a request to the child. Returns: the request's number. Raises: EngineClosedError, EngineUnavailableError."""
        with self._lock:  # so that no request is added after all have failed
            self._raise_if_closed()  # another thread may have closed it since the first check
            self._next_id += 1
            self._child.send([command, self._next_id, *arguments])
            self._pending[self._next_id] = pending
            return self._next_id

    def _converted(self) -> Path:
        """The OpenVINO folder, also after the model's own has moved; converts again if the cache has dropped it."""
        from corral.model.openvino_graph import cached_form

        form = self._form
        if form is None or (form != self._folder and not (form / OPENVINO_MODEL).is_file()):
            form = self._form = cached_form(self._folder, self._precision)
        return form

    def _cancel_in_child(self, request: int, choice: int | None = None) -> None:
        with contextlib.suppress(
            EngineUnavailableError
        ):  # the request is lost, and with it what it would still compute
            self._child.send(["cancel", request, choice])

    def _cancel(self, request: int, choice: int | None) -> None:
        with self._lock:
            pending = self._pending.get(request)
            if pending is None or pending.generation is None:
                return
            cancelled = [c for c in sorted(pending.unfinished) if choice in (None, c)]
            if not cancelled:
                return
            for c in cancelled:
                self._finish_choice(request, pending, c)
                pending.generation.push(Delta(c, (), None, "cancelled"))
            self._cancel_in_child(request, choice)

    def _finish_choice(self, request: int, pending: _Pending, choice: int) -> None:
        pending.unfinished.discard(choice)
        if not pending.unfinished:
            del self._pending[request]

    def _handle_events(self, events: list[Event]) -> None:
        """Called by the child's reader thread."""
        with self._lock:
            for kind, request, *rest in events:
                pending = self._pending.get(request)
                if pending is None:
                    continue
                if kind == "fail":
                    del self._pending[request]
                    pending.fail(EngineError(f"engine {self.name!r}: {rest[0]}"))
                    self._cancel_in_child(request)
                elif kind == "score":
                    logprobs, tops, is_last = rest
                    pending.scores += map(TokenScore, logprobs, _alternatives(tops or [()] * len(logprobs)))
                    if is_last:
                        del self._pending[request]
                        pending.score.set_result(pending.scores)
                elif pending.generation is not None and rest[0] in pending.unfinished:
                    choice, ids, logprobs, finish, tops = rest
                    values = None if logprobs is None else tuple(logprobs)
                    pending.generation.push(
                        Delta(choice, tuple(ids), values, finish, None if tops is None else _alternatives(tops))
                    )
                    if finish:
                        self._finish_choice(request, pending, choice)

    def _fail_all(self, error: EngineError) -> None:
        with self._lock:
            pending, self._pending = self._pending, {}
            for each in pending.values():
                each.fail(error)


@dataclass(frozen=True)
class _ModelSize:
    """The size of a model and of its key-value caches, in blocks, and the longest text that fits."""

    vocabulary: int
    longest: int
    blocks: int
    parameters: int
    """About how many."""

    @classmethod
    def fitting(cls, folder: Path, itemsize: int) -> _ModelSize:
        """A quarter of the free memory, 4 GiB at most; never more than MAX_SEQUENCES texts of full length need.

        `itemsize`: bytes of a number in the cache. Raises: ModelError (config.json cannot be read).
        """
        import psutil

        try:
            config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
            heads = config["num_attention_heads"]
            head_size = config.get("head_dim") or config["hidden_size"] // heads
            kv_heads = config.get("num_key_value_heads") or heads
            block_bytes = config["num_hidden_layers"] * 2 * kv_heads * head_size * BLOCK_TOKENS * itemsize
            context, vocabulary = int(config["max_position_embeddings"]), int(config["vocab_size"])
            hidden = config["hidden_size"]
            layer = hidden * (2 * (heads + kv_heads) * head_size + 3 * config["intermediate_size"])
            parameters = config["num_hidden_layers"] * layer + hidden * vocabulary
        except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
            raise ModelError(f"config.json cannot be read: {error!r}", where=str(folder)) from error
        context_blocks = -(-context // BLOCK_TOKENS) + 1  # one to grow into
        blocks = max(2, int(min(4 * 2**30, psutil.virtual_memory().available / 4) // block_bytes))
        longest = min(context, (blocks - 1) * BLOCK_TOKENS)
        return cls(vocabulary, longest, min(blocks, context_blocks * MAX_SEQUENCES), parameters)


def _alternatives(tops: Sequence[Any]) -> tuple[Alternatives, ...]:
    return tuple(tuple((id_, logprob) for id_, logprob in top) for top in tops)


def _choice_seeds(sampling: Sampling) -> list[int]:
    """A seed for each choice, from the request's seed and the number of the choice."""
    if sampling.seed is None:
        return [int.from_bytes(os.urandom(4)) for _ in range(sampling.n)]
    digests = (hashlib.sha256(f"{sampling.seed} {choice}".encode()).digest() for choice in range(sampling.n))
    return [int.from_bytes(digest[:4]) for digest in digests]


def _environment() -> dict[str, str]:
    """The child's: it imports corral from where this process did, and OpenVINO sends no telemetry."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OPENVINO_TELEMETRY": "0"}
