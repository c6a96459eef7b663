"""OpenVINO GenAI on a CPU: continuous batching in a child process behind the async protocol.

This half keeps count of what was asked, hands it to the child (`openvino_child`) and turns the child's events into Deltas.
If the child dies, what was under way fails with EngineError, and the next request starts a new one. It knows nothing about
how OpenVINO computes, nor about text.
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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from corral.engines.base import Delta, Engine, Features, Generation, Sampling, closed_error
from corral.engines.openvino_process import BLOCK_TOKENS
from corral.errors import CorralError, EngineError, ModelError
from corral.export_forms import OPENVINO_MODEL, OpenVinoType
from corral.extras import require

if TYPE_CHECKING:
    from corral.model.loading import DType

MAX_SEQUENCES = 256
"""Sequences that OpenVINO computes together."""
_HINTS = {"float32": "f32", "bfloat16": "bf16"}


@dataclass
class _Asked:
    """A request under way: a Generation and its open choices, or a score."""

    generation: Generation | None
    open: set[int]
    score: asyncio.Future[list[float]] | None = None
    loop: asyncio.AbstractEventLoop | None = None

    def fail(self, error: EngineError) -> None:
        if self.generation is not None:
            self.generation.fail(error)
        elif self.loop is not None and self.score is not None:
            _settle(self.loop, self.score, error)


class OpenVinoEngine(Engine):
    """An OpenVINO folder (`openvino_model.xml`), or any Llama folder, which is converted once and kept in the cache.

    Args:
        folder: of the model.
        dtype: `float32` computes and caches in float32; `bfloat16` in bfloat16 where the processor has it.
        exact: do not round activations before products with int8 and int4 weights. Several times slower; a contract
            measures so whether the weights are those meant.

    Raises:
        MissingExtraError: the extra `openvino` is not installed.
        ModelError: the folder holds no model that OpenVINO can load, or dtype is another.
    """

    def __init__(self, folder: Path, *, dtype: DType = "float32", exact: bool = False, name: str = "openvino") -> None:
        require("openvino_genai", "openvino")
        if dtype not in _HINTS:
            raise ModelError(f"the openvino engine does not compute in {dtype}", hint="use float32 or bfloat16")
        self.name = name
        self._folder = folder
        self._is_form = (folder / OPENVINO_MODEL).is_file()
        self._precision: OpenVinoType = "f32" if dtype == "float32" else "f16"
        form = self._form()
        cache = _Cache.fitting(form, 4 if dtype == "float32" else 2)
        properties = {"INFERENCE_PRECISION_HINT": _HINTS[dtype], "KV_CACHE_PRECISION": _HINTS[dtype]}
        if exact:
            properties["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "0"
        self.features = Features(max_length=cache.longest, vocabulary=cache.vocabulary, logprobs=True, score=True)
        self._settings = {
            "properties": properties,
            "blocks": cache.blocks,
            "score_blocks": cache.score_blocks,
        }
        self._lock = threading.Lock()
        self._asked: dict[int, _Asked] = {}
        self._next = 0
        self._closed = False
        self._able = True
        self._child: _Child | None = self._start(wait=True)

    @property
    def ready(self) -> bool:
        """False when the child could not be started, until one could."""
        child = self._child
        return not self._closed and (self._able or (child is not None and child.ready))

    def submit(self, ids: Sequence[int], sampling: Sampling) -> Generation:
        """See Engine."""
        self._refuse_closed()
        self.check_submit(ids, sampling)
        with self._lock:
            self._refuse_closed()  # another thread may have closed it meanwhile
            child = self._alive()
            request = self._new_id()
            generation = Generation(len(ids), sampling.n, lambda choice: self._cancel(request, choice))
            self._asked[request] = _Asked(generation, set(range(sampling.n)))
            child.send(["submit", request, [*map(int, ids)], asdict(sampling), _seeds(sampling)])
        return generation

    async def score(self, ids: Sequence[int], start: int = 1) -> list[float]:
        """See Engine."""
        self._refuse_closed()
        self.check_score(ids, start)
        if start == len(ids):
            return []
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[float]] = loop.create_future()
        with self._lock:
            self._refuse_closed()
            child = self._alive()
            request = self._new_id()
            self._asked[request] = _Asked(None, set(), future, loop)
            child.send(["score", request, [*map(int, ids)]])
        try:
            return (await future)[start:]
        finally:
            with self._lock:
                if self._asked.pop(request, None) is not None:
                    self._send(["cancel", request, None])

    async def close(self) -> None:
        """See Engine."""
        with self._lock:
            self._closed = True
            child, self._child = self._child, None
            self._fail_all(closed_error(self))
        if child is not None:
            await asyncio.to_thread(child.stop)

    def _refuse_closed(self) -> None:
        if self._closed:
            raise closed_error(self)

    def _new_id(self) -> int:
        self._next += 1
        return self._next

    def _form(self) -> Path:
        from corral.model.openvino_graph import cached_form

        return self._folder if self._is_form else cached_form(self._folder, self._precision)

    def _start(self, *, wait: bool) -> _Child:
        # The form anew: the cache may have dropped it since.
        return _Child({**self._settings, "folder": str(self._form())}, self._events, self._died, wait=wait)

    def _alive(self) -> _Child:
        """With the lock held: the child, started anew if it died. Raises: EngineError (the model is gone)."""
        if self._child is None:
            try:
                self._child = self._start(wait=False)
            except CorralError as error:
                raise EngineError(f"engine {self.name!r} cannot be started again: {error.what}") from error
        return self._child

    def _send(self, command: list[Any]) -> None:
        """With the lock held, to a child that lives."""
        if self._child is not None:
            self._child.send(command)

    def _cancel(self, request: int, choice: int | None) -> None:
        with self._lock:
            asked = self._asked.get(request)
            if asked is None or asked.generation is None:
                return
            ended = [c for c in sorted(asked.open) if choice in (None, c)]
            if not ended:
                return
            asked.open.difference_update(ended)
            if not asked.open:
                del self._asked[request]
            for c in ended:
                asked.generation.push(Delta(c, (), None, "cancelled"))
            self._send(["cancel", request, choice])

    def _events(self, events: list[list[Any]]) -> None:
        """From the child's reader thread."""
        with self._lock:
            for kind, request, *rest in events:
                asked = self._asked.get(request)
                if asked is None:
                    continue
                if kind == "fail":
                    del self._asked[request]
                    asked.fail(EngineError(f"engine {self.name!r}: {rest[0]}"))
                    self._send(["cancel", request, None])
                elif kind == "score":
                    del self._asked[request]
                    if asked.loop is not None and asked.score is not None:
                        _settle(asked.loop, asked.score, cast("list[float]", rest[0]))
                elif asked.generation is not None and rest[0] in asked.open:
                    choice, ids, logprobs, finish = rest
                    delta = Delta(choice, tuple(ids), None if logprobs is None else tuple(logprobs), finish)
                    asked.generation.push(delta)
                    if finish:
                        asked.open.discard(choice)
                        if not asked.open:
                            del self._asked[request]

    def _died(self, child: _Child, why: str) -> None:
        """From the child's reader thread."""
        with self._lock:
            if self._child is not child:
                return
            self._child = None
            self._able = child.ready
            self._fail_all(
                EngineError(f"the process of engine {self.name!r} ended: {why}", hint="ask again: it is started anew")
            )

    def _fail_all(self, error: EngineError) -> None:
        """With the lock held, so that what is asked of the next child does not fail with this one."""
        asked, self._asked = self._asked, {}
        for each in asked.values():
            each.fail(error)


class _Child:
    """The child process and the two threads that talk with it.

    A pipe may be full while the child computes, so writing has a thread: nobody who asks is made to wait.
    """

    def __init__(self, settings: dict[str, Any], events: Any, died: Any, *, wait: bool) -> None:
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the child)
        # -P: a file `openvino.py` where the user stands must not be taken for the package.
        command = [sys.executable, "-P", "-m", "corral.engines.openvino_process", json.dumps(settings)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, env=_environment()
        )
        self._out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._stopping = False
        self.ready = wait and self._first_line()
        """Whether it has loaded the model."""
        if wait and not self.ready:
            why = self._end()
            cast("IO[bytes]", self.process.stdin).close()
            raise ModelError(f"OpenVINO cannot load the model: {why}", where=settings["folder"])
        threads = ((self._write, ()), (self._read, (events, died)))
        self._threads = [threading.Thread(target=f, args=a, name="corral-openvino", daemon=True) for f, a in threads]
        for thread in self._threads:
            thread.start()

    def send(self, command: list[Any]) -> None:
        self._out.put(json.dumps(command).encode() + b"\n")

    def stop(self) -> None:
        """End the process and wait for it; nothing in it is worth saving."""
        self._stopping = True
        self.process.kill()
        self._out.put(None)
        for thread in self._threads:
            thread.join()

    def _first_line(self) -> bool:
        return bool(cast("IO[bytes]", self.process.stdout).readline())

    def _write(self) -> None:
        pipe = cast("IO[bytes]", self.process.stdin)
        with contextlib.suppress(OSError):  # the reader learns of the death, and tells
            while (line := self._out.get()) is not None:
                pipe.write(line)
                pipe.flush()
        with contextlib.suppress(OSError):
            pipe.close()

    def _read(self, events: Any, died: Any) -> None:
        for line in cast("IO[bytes]", self.process.stdout):
            if line.endswith(b"\n"):
                self.ready = True
                events([event for event in json.loads(line) if event[0] != "ready"])
        why = self._end()
        self._out.put(None)
        if not self._stopping:
            died(self, why)

    def _end(self) -> str:
        """Wait for the process; what it said last."""
        code = self.process.wait()
        cast("IO[bytes]", self.process.stdout).close()
        with self._errors as file:
            file.seek(max(0, file.seek(0, 2) - 4000))
            lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
        said = f", saying: {lines[-1]}" if lines else ""
        return (f"signal {-code}" if code < 0 else f"exit code {code}") + said


@dataclass(frozen=True)
class _Cache:
    """How much room keys and values get, in blocks, and how long a text may be in it."""

    vocabulary: int
    longest: int
    blocks: int
    score_blocks: int

    @classmethod
    def fitting(cls, form: Path, width: int) -> _Cache:
        """A quarter of the memory that is free now, 4 GiB at most; never more than MAX_SEQUENCES texts of full length need."""
        import psutil

        try:
            config: dict[str, Any] = json.loads((form / "config.json").read_text("utf-8"))
            heads = config["num_attention_heads"]
            size = config.get("head_dim") or config["hidden_size"] // heads
            kept = config.get("num_key_value_heads") or heads
            block = config["num_hidden_layers"] * 2 * kept * size * BLOCK_TOKENS * width
            context, vocabulary = int(config["max_position_embeddings"]), int(config["vocab_size"])
        except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
            raise ModelError(f"config.json cannot be read: {error!r}", where=str(form)) from error
        whole = -(-context // BLOCK_TOKENS) + 1  # one to grow into
        room = max(2, int(min(4 * 2**30, psutil.virtual_memory().available / 4) // block))
        longest = min(context, (room - 1) * BLOCK_TOKENS)
        return cls(vocabulary, longest, min(room, whole * MAX_SEQUENCES), min(room, whole * 4))


def _seeds(sampling: Sampling) -> list[int]:
    """A seed for each choice, which follows from the request's and the choice's number."""
    if sampling.seed is None:
        return [int.from_bytes(os.urandom(4)) for _ in range(sampling.n)]
    made = (hashlib.sha256(f"{sampling.seed} {choice}".encode()).digest() for choice in range(sampling.n))
    return [int.from_bytes(digest[:4]) for digest in made]


def _settle(loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any], result: Any) -> None:
    def settle() -> None:
        if future.done():
            return
        if isinstance(result, BaseException):
            future.set_exception(result)
        else:
            future.set_result(result)

    with contextlib.suppress(RuntimeError):  # the loop that asked is gone
        loop.call_soon_threadsafe(settle)


def _environment() -> dict[str, str]:
    """The child finds corral where this process found it, and tells nobody that it was used."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OPENVINO_TELEMETRY": "0"}
