"""OpenVINO GenAI on a CPU: continuous batching in a child process (`openvino_process`).

This side keeps track of requests, sends them to the child and turns the child's events into Deltas. If the child dies, the
requests under way fail with EngineError, and the next request starts a new child.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias, cast

from corral.engines.base import Delta, Engine, Features, Generation, Sampling, closed_error
from corral.engines.openvino_process import BLOCK_TOKENS, Event
from corral.errors import CorralError, EngineError, ModelError, require
from corral.export_forms import OPENVINO_MODEL, OpenVinoType

if TYPE_CHECKING:
    from corral.model.loading import DType

MAX_SEQUENCES = 256
"""Sequences that OpenVINO computes together."""
_EventHandler: TypeAlias = Callable[[list[Event]], None]
_ExitHandler: TypeAlias = "Callable[[_Child, str], None]"
_PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}


@dataclass
class _Pending:
    """A request under way: a generation and its unfinished choices, or a score."""

    generation: Generation | None = None
    unfinished: set[int] = field(default_factory=set[int])
    score: Future[list[float]] = field(default_factory=Future[list[float]])

    def fail(self, error: EngineError) -> None:
        if self.generation is not None:
            self.generation.fail(error)
        else:
            self.score.set_exception(error)


class OpenVinoEngine(Engine):
    """Computes an OpenVINO folder (`openvino_model.xml`), or any Llama folder, which is converted once into the cache.

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
        self._is_converted = (folder / OPENVINO_MODEL).is_file()
        self._precision: OpenVinoType = "f32" if dtype == "float32" else "f16"
        self._lock = threading.Lock()
        self._pending: dict[int, _Pending] = {}
        self._next_id = 0
        self._closed = False
        self._can_start = True
        """Whether the last child that died had loaded the model."""
        self._child: _Child | None = None
        # Where it computes in bfloat16, OpenVINO 2026.4 wants keys and values in bfloat16 on some processors and in float32 on
        # others, and does not say which before it loads a model.
        first_error: ModelError | None = None
        for cache_type in ("f32",) if dtype == "float32" else ("bf16", "f32"):
            self._use_cache(cache_type, _PRECISIONS[dtype], exact)
            try:
                self._child = self._start_child(wait=True)
                break
            except ModelError as error:
                first_error = first_error or error
        if self._child is None and first_error is not None:
            raise first_error

    def _use_cache(self, cache_type: str, precision: str, exact: bool) -> None:
        """Set how the child loads the model: the types of its key-value cache and of its computations."""
        cache = _CacheSize.fitting(self._converted(), 4 if cache_type == "f32" else 2)
        properties = {"INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": cache_type}
        if exact:
            properties["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "0"
        self.features = Features(max_length=cache.longest, vocabulary=cache.vocabulary, logprobs=True, score=True)
        self._settings = {"properties": properties, "blocks": cache.blocks, "score_blocks": cache.score_blocks}

    @property
    def ready(self) -> bool:
        """False when the child could not be started, until one could."""
        child = self._child
        return not self._closed and (self._can_start or (child is not None and child.ready))

    def submit(self, ids: Sequence[int], sampling: Sampling) -> Generation:  # noqa: D102 (see Engine)
        self._raise_if_closed()
        self.check_submit(ids, sampling)
        generation = Generation(len(ids), sampling.n, lambda choice: self._cancel(request, choice))
        pending = _Pending(generation, set(range(sampling.n)))
        request = self._start_request(pending, "submit", [*map(int, ids)], asdict(sampling), _choice_seeds(sampling))
        return generation

    async def score(self, ids: Sequence[int], start: int = 1) -> list[float]:  # noqa: D102
        self._raise_if_closed()
        self.check_score(ids, start)
        if start == len(ids):
            return []
        pending = _Pending()
        pending.score.set_running_or_notify_cancel()  # from here on a cancelled task cannot cancel it under the reader
        request = self._start_request(pending, "score", [*map(int, ids)])
        try:
            return (await asyncio.wrap_future(pending.score))[start:]
        finally:
            with self._lock:
                if self._pending.pop(request, None) is not None:
                    self._send(["cancel", request, None])

    async def close(self) -> None:  # noqa: D102
        with self._lock:
            self._closed = True
            child, self._child = self._child, None
            self._fail_all(closed_error(self))
        if child is not None:
            await asyncio.to_thread(child.stop)

    def _raise_if_closed(self) -> None:
        if self._closed:
            raise closed_error(self)

    def _start_request(self, pending: _Pending, command: str, *arguments: Any) -> int:
        """Send a request to the child, starting one if it died. Returns: the request's number.

        Raises:
            EngineClosedError, EngineError (no child can be started).
        """
        with self._lock:
            self._raise_if_closed()  # another thread may have closed it since the first check
            if self._child is None:
                try:
                    self._child = self._start_child(wait=False)
                except CorralError as error:
                    raise EngineError(f"engine {self.name!r} cannot be started again: {error.what}") from error
            self._next_id += 1
            self._pending[self._next_id] = pending
            self._send([command, self._next_id, *arguments])
            return self._next_id

    def _converted(self) -> Path:
        """The OpenVINO folder; converts again if the cache has dropped it."""
        from corral.model.openvino_graph import cached_form

        return self._folder if self._is_converted else cached_form(self._folder, self._precision)

    def _start_child(self, *, wait: bool) -> _Child:
        return _Child(
            {**self._settings, "folder": str(self._converted())}, self._handle_events, self._handle_exit, wait=wait
        )

    def _send(self, command: list[Any]) -> None:
        """Send to the child, if it lives. The lock must be held."""
        if self._child is not None:
            self._child.send(command)

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
            self._send(["cancel", request, choice])

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
                    self._send(["cancel", request, None])
                elif kind == "score":
                    del self._pending[request]
                    pending.score.set_result(rest[0])
                elif pending.generation is not None and rest[0] in pending.unfinished:
                    choice, ids, logprobs, finish = rest
                    delta = Delta(choice, tuple(ids), None if logprobs is None else tuple(logprobs), finish)
                    pending.generation.push(delta)
                    if finish:
                        self._finish_choice(request, pending, choice)

    def _handle_exit(self, child: _Child, reason: str) -> None:
        """Called by the child's reader thread."""
        with self._lock:
            if self._child is not child:
                return
            self._child = None
            self._can_start = child.ready
            self._fail_all(
                EngineError(
                    f"the process of engine {self.name!r} ended: {reason}", hint="ask again: it is started anew"
                )
            )

    def _fail_all(self, error: EngineError) -> None:
        """The lock must be held, so that requests to the next child do not fail with this one."""
        pending, self._pending = self._pending, {}
        for each in pending.values():
            each.fail(error)


class _Child:
    """The child process and the two threads that write to it and read from it.

    Writing has a thread of its own, as the pipe may be full while the child computes: no caller must wait for that. With
    `wait` it waits until the child has loaded the model. Raises: ModelError (the child could not).
    """

    def __init__(
        self, settings: dict[str, Any], handle_events: _EventHandler, handle_exit: _ExitHandler, *, wait: bool
    ) -> None:
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the child)
        # -P: a file `openvino.py` in the current directory must not be imported in place of the package.
        command = [sys.executable, "-P", "-m", "corral.engines.openvino_process", json.dumps(settings)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, env=_environment()
        )
        self._stdin, self._stdout = cast("IO[bytes]", self.process.stdin), cast("IO[bytes]", self.process.stdout)
        self._commands: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._stopping = False
        self.ready = wait and bool(self._stdout.readline())
        """Whether it has loaded the model."""
        if wait and not self.ready:
            reason = self._wait_for_exit()
            self._stdin.close()
            raise ModelError(f"OpenVINO cannot load the model: {reason}", where=settings["folder"])
        threads = ((self._write, ()), (self._read, (handle_events, handle_exit)))
        self._threads = [threading.Thread(target=f, args=a, name="corral-openvino", daemon=True) for f, a in threads]
        for thread in self._threads:
            thread.start()

    def send(self, command: list[Any]) -> None:
        self._commands.put(json.dumps(command).encode() + b"\n")

    def stop(self) -> None:
        """Kill the process, which has nothing to save, and wait for it."""
        self._stopping = True
        self.process.kill()
        self._commands.put(None)
        for thread in self._threads:
            thread.join()

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # the reader reports that the child died
            while (line := self._commands.get()) is not None:
                self._stdin.write(line)
                self._stdin.flush()
        with contextlib.suppress(OSError):
            self._stdin.close()

    def _read(self, handle_events: _EventHandler, handle_exit: _ExitHandler) -> None:
        for line in self._stdout:
            if line.endswith(b"\n"):
                self.ready = True
                handle_events([event for event in json.loads(line) if event[0] != "ready"])
        reason = self._wait_for_exit()
        self._commands.put(None)
        if not self._stopping:
            handle_exit(self, reason)

    def _wait_for_exit(self) -> str:
        """Wait for the process to end. Returns: its exit code and its last line of errors."""
        code = self.process.wait()
        self._stdout.close()
        with self._errors as file:
            file.seek(max(0, file.seek(0, 2) - 4000))
            lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
        last_words = f", saying: {lines[-1]}" if lines else ""
        return (f"signal {-code}" if code < 0 else f"exit code {code}") + last_words


@dataclass(frozen=True)
class _CacheSize:
    """The size of the key-value caches, in blocks, and the longest text that fits."""

    vocabulary: int
    longest: int
    blocks: int
    score_blocks: int

    @classmethod
    def fitting(cls, folder: Path, itemsize: int) -> _CacheSize:
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
        except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
            raise ModelError(f"config.json cannot be read: {error!r}", where=str(folder)) from error
        context_blocks = -(-context // BLOCK_TOKENS) + 1  # one to grow into
        blocks = max(2, int(min(4 * 2**30, psutil.virtual_memory().available / 4) // block_bytes))
        longest = min(context, (blocks - 1) * BLOCK_TOKENS)
        return cls(vocabulary, longest, min(blocks, context_blocks * MAX_SEQUENCES), min(blocks, context_blocks * 4))


def _choice_seeds(sampling: Sampling) -> list[int]:
    """A seed for each choice, from the request's seed and the number of the choice."""
    if sampling.seed is None:
        return [int.from_bytes(os.urandom(4)) for _ in range(sampling.n)]
    digests = (hashlib.sha256(f"{sampling.seed} {choice}".encode()).digest() for choice in range(sampling.n))
    return [int.from_bytes(digest[:4]) for digest in digests]


def _environment() -> dict[str, str]:
    """The child's: it imports corral from where this process did, and OpenVINO sends no telemetry."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OPENVINO_TELEMETRY": "0"}
