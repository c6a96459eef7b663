"""vLLM: the engine for GPUs, with vLLM's scheduler, paged cache and kernels.

vLLM computes in processes of its own. The engine talks to it through an event loop in a thread, so that it serves callers of
any number of loops. A request for n choices is n requests to vLLM, which computes their common prompt once (prefix cache).
vLLM's own n does the same, but its choice 1 of seed 7 is choice 0 of seed 8, and no choice can be cancelled alone.

Limits of vLLM: temperatures over 0 and under 0.01 are refused (it would silently take 0.01), so are DoRA adapters, and scores
with adapters on a CPU (in a batch with another request its CPU kernels end its processes). It does not start again after its
processes died (`fault` then says so), and does not notice logits that are not finite. No tokenizer is loaded.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from corral.engines.base import (
    CLOSED,
    OPTIONAL_SAMPLING,
    Delta,
    Engine,
    Features,
    Generation,
    Sampling,
    TokenScore,
    closed_error,
)
from corral.engines.vllm_settings import (
    check_later_adapter,
    lora_settings,
    model_settings,
    most_likely,
    request_params,
    sampling_params,
)
from corral.errors import EngineError, EngineUnavailableError, ModelError, RequestError, require
from corral.model.folder import check_folder

if TYPE_CHECKING:
    from corral.model.loading import DType

T = TypeVar("T")

_MIN_TEMPERATURE = 0.01
_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",  # no report about the machine and the model to its makers
}


class VllmEngine(Engine):
    """Computes a Llama folder in vLLM, with the first of its adapters if there are any; for the others see `view`.

    `features.max_length` is less than the model's context if its keys and values do not fit in memory.

    Args:
        folder: of the model.
        dtype: of the computation, and of keys and values.
        device: `cuda`, or `cpu` with a build of vLLM for CPUs.
        adapters: folders of PEFT LoRA adapters of that model, which are not merged into its weights.
        later_adapters: room for so many that `with_adapter` loads later; 0: it loads none.
        memory_share: the most of the GPU's memory that it takes.

    Raises:
        MissingExtraError: vLLM is not installed.
        ModelError: the folder holds no model that vLLM can load, vLLM cannot apply an adapter, or this build of vLLM is for
            another device.
    """

    name = "vllm"

    def __init__(
        self,
        folder: Path,
        *,
        dtype: DType = "bfloat16",
        device: str = "cuda",
        adapters: Sequence[Path] = (),
        later_adapters: int = 0,
        memory_share: float = 1,
    ) -> None:
        for variable, value in _ENVIRONMENT.items():
            os.environ.setdefault(variable, value)
        check_folder(folder)
        require("vllm", "vllm")
        self._lock = threading.Lock()
        self._closed = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._numbers = itertools.count()
        self._llm: Any = None
        self._loras: dict[Path, Any] = {}
        self._adapter_numbers = itertools.count(1)
        self._adapter = adapters[0] if adapters else None
        self._is_open = True
        self._views = 1  # this engine and those of `view` and `with_adapter`; after the last, vLLM ends
        settings = model_settings(folder, dtype, device, memory_share) | lora_settings(adapters, later_adapters)
        self._max_rank: int = settings.get("max_lora_rank", 0) if later_adapters else 0
        started: Future[None] = Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve(settings, adapters, started)), name="corral-vllm", daemon=True
        )
        self._thread.start()
        try:
            started.result()
        except Exception as error:
            raise ModelError(
                f"vLLM cannot load the model: {type(error).__name__}: {error}",
                where=str(self._adapter or folder),
                hint="see its messages above; with VLLM_LOGGING_LEVEL=INFO there are more",
            ) from error
        config = self._llm.model_config
        scores = not (adapters or later_adapters) or device != "cpu"
        self.features = Features(
            max_length=config.max_model_len,
            vocabulary=config.get_vocab_size(),
            logprobs=True,
            score=scores,
            honours=frozenset(OPTIONAL_SAMPLING),
            score_top=scores,
        )
        atexit.register(self._end)

    @property
    def fault(self) -> str | None:  # noqa: D102 (see Engine)
        if self._closed:
            return CLOSED
        return None if self._alive() else "vLLM's processes have ended, and are not started again: restart this program"

    def view(self, adapter: Path | None) -> Engine:
        """This engine with another of the adapters that it was made with, or with none."""
        return self if adapter == self._adapter else self._view(adapter)

    def with_adapter(self, folder: Path) -> Engine:  # noqa: D102 (see Engine)
        if not self._max_rank:
            return super().with_adapter(folder)
        check_later_adapter(folder, self._max_rank)
        with self._lock:
            self._raise_if_closed()
            loading = asyncio.run_coroutine_threadsafe(self._add_adapter(folder), self._loop)
        loading.result()
        return self._view(folder)

    def _view(self, adapter: Path | None) -> Engine:
        with self._lock:
            self._raise_if_closed()
            self._views += 1
        return _WithAdapter(self, adapter)

    def release(self, adapter: Path | None = None) -> None:
        """One view of this engine is closed, and its adapter is needed no longer."""
        with self._lock:
            self._views -= 1
            is_last = self._views == 0
        if is_last:
            self._end()
            atexit.unregister(self._end)
        elif adapter is not None and not self._closed:
            asyncio.run_coroutine_threadsafe(self._remove_adapter(adapter), self._loop).result()

    def submit(self, ids: Sequence[int], sampling: Sampling) -> Generation:  # noqa: D102 (see Engine)
        return self.submit_with(self._adapter, ids, sampling)

    def submit_with(self, adapter: Path | None, ids: Sequence[int], sampling: Sampling) -> Generation:
        """`submit`, computed with that adapter."""
        self.check_submit(ids, sampling)
        if 0 < sampling.temperature < _MIN_TEMPERATURE:
            raise RequestError(
                f"temperature = {sampling.temperature}: engine {self.name!r} samples at {_MIN_TEMPERATURE} or more",
                hint="take 0 for the most likely token",
            )
        request: _Request

        def cancel(choice: int | None) -> None:
            with contextlib.suppress(RuntimeError):  # the engine was closed, and its requests with it
                self._loop.call_soon_threadsafe(request.cancel, choice)

        request = _Request([*map(int, ids)], sampling, Generation(len(ids), sampling.n, cancel), adapter)
        with self._lock:
            self._raise_if_closed()
            self._loop.call_soon_threadsafe(self._begin, request)
        return request.generation

    async def score(self, ids: Sequence[int], start: int = 1) -> list[float]:  # noqa: D102
        return await self.score_with(self._adapter, ids, start)

    async def score_top(self, ids: Sequence[int], start: int = 1, top: int = 1) -> list[TokenScore]:  # noqa: D102
        return await self.score_top_with(self._adapter, ids, start, top)

    async def score_with(self, adapter: Path | None, ids: Sequence[int], start: int) -> list[float]:
        """`score`, computed with that adapter."""
        self.check_score(ids, start)
        return [score.logprob for score in await self._start_score(adapter, ids, start, 0)]

    async def score_top_with(self, adapter: Path | None, ids: Sequence[int], start: int, top: int) -> list[TokenScore]:
        """`score_top`, computed with that adapter."""
        self.check_score_top(ids, start, top)
        return await self._start_score(adapter, ids, start, top)

    async def _start_score(self, adapter: Path | None, ids: Sequence[int], start: int, top: int) -> list[TokenScore]:
        with self._lock:
            self._raise_if_closed()
            scores = asyncio.run_coroutine_threadsafe(self._score([*map(int, ids)], adapter, top), self._loop)
        return (await asyncio.wrap_future(scores))[start - 1 :]

    async def close(self) -> None:  # noqa: D102
        was_open, self._is_open = self._is_open, False
        if was_open:
            await asyncio.to_thread(self.release)

    def _end(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _raise_if_closed(self) -> None:
        if self._closed:
            raise closed_error(self)

    # The methods below run in the engine's own thread and loop.

    async def _serve(self, settings: dict[str, Any], adapters: Sequence[Path], started: Future[None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        try:
            self._llm = _start_vllm(settings)
            for adapter in adapters:
                await self._add_adapter(adapter)
        except BaseException as error:
            self._shut_down()
            started.set_exception(error)
            return
        started.set_result(None)
        await self._stop.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._shut_down()

    async def _add_adapter(self, adapter: Path) -> None:
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        if adapter in self._loras:
            raise RequestError(f"the adapter in {adapter.name!r} is loaded already", hint="use the name that it has")
        # The number makes the names of adapters in folders of the same name differ.
        number = next(self._adapter_numbers)
        lora = LoRARequest(f"{number}-{adapter.name}", number, str(adapter.absolute()))
        await self._llm.add_lora(lora)
        self._loras[adapter] = lora

    async def _remove_adapter(self, adapter: Path) -> None:
        await self._llm.remove_lora(self._loras.pop(adapter).lora_int_id)

    def _shut_down(self) -> None:
        llm, self._llm = self._llm, None  # it needs parts of the interpreter to shut down, so it must not outlive them
        if llm is not None:
            llm.shutdown()

    def _alive(self) -> bool:
        llm = self._llm
        return llm is not None and not llm.errored

    def _start_task(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task that `close` cancels."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _begin(self, request: _Request) -> None:
        for choice in range(request.sampling.n):
            request.tasks[choice] = self._start_task(self._complete(request, choice))

    async def _complete(self, request: _Request, choice: int) -> None:
        """Pass the ids of one choice on as they come."""
        sampling = request.sampling
        try:
            parameters = request_params(sampling, choice, self.features.vocabulary)
            async with contextlib.aclosing(self._generate(request.ids, parameters, request.adapter)) as outputs:
                async for output in outputs:
                    request.push(choice, output.outputs[0])
        except asyncio.CancelledError:
            if self._closed:
                request.fail(closed_error(self))
            raise
        except Exception as error:
            request.fail(self._failure(error))

    async def _score(self, ids: list[int], adapter: Path | None, top: int) -> list[TokenScore]:
        """Scores of ids[1:]."""
        work = self._start_task(self._compute_score(ids, adapter, top))
        try:
            return await work
        except asyncio.CancelledError:
            self._raise_if_closed()
            work.cancel()
            raise

    async def _compute_score(self, ids: list[int], adapter: Path | None, top: int) -> list[TokenScore]:
        *prompt, last = ids
        if not prompt:
            return []
        # vLLM needs room for one more id, so the last id is not part of the prompt but a candidate for the next one.
        own = {"logprobs": 1, "logprob_token_ids": [last]}
        try:
            given, after = await self._logprobs(
                prompt, adapter, prompt_logprobs=top, **({"logprobs": top} if top else own)
            )
            alternatives = after if top else {}
            if last not in after:
                _, after = await self._logprobs(prompt, adapter, **own)
        except Exception as error:
            raise self._failure(error) from None
        scores = [
            TokenScore(by_id[id_].logprob, most_likely(by_id, top))
            for id_, by_id in zip(prompt[1:], given, strict=True)
        ]
        return [*scores, TokenScore(after[last].logprob, most_likely(alternatives, top))]

    async def _logprobs(
        self, prompt: list[int], adapter: Path | None, **changes: Any
    ) -> tuple[list[Any], dict[int, Any]]:
        """vLLM's log-probabilities by id: at each position of prompt[1:] if requested, and after the prompt."""
        given: list[Any] = []
        after: dict[int, Any] = {}
        parameters = sampling_params(max_tokens=1, temperature=0, **changes)
        async with contextlib.aclosing(self._generate(prompt, parameters, adapter)) as outputs:
            async for output in outputs:
                given += (output.prompt_logprobs or [])[1:]
                after = output.outputs[0].logprobs[0]
        return given, after

    def _generate(self, ids: list[int], params: Any, adapter: Path | None) -> Any:
        from vllm.inputs import tokens_input  # pyright: ignore[reportMissingImports]

        self._raise_if_closed()
        lora = None if adapter is None else self._loras[adapter]
        return self._llm.generate(tokens_input(ids), params, str(next(self._numbers)), lora_request=lora)

    def _failure(self, error: Exception) -> EngineError:
        if isinstance(error, EngineError):
            return error
        if not self._alive():
            return EngineUnavailableError(
                f"the processes of engine {self.name!r} have ended", hint="load the engine again"
            )
        cause = error.__cause__ or error
        return EngineError(f"engine {self.name!r}: {type(cause).__name__}: {cause}")


class _WithAdapter(Engine):
    """A VllmEngine with another adapter than its first. The adapter is unloaded when this is closed."""

    def __init__(self, engine: VllmEngine, adapter: Path | None) -> None:
        self.name = engine.name
        self.features = engine.features
        self._engine = engine
        self._adapter = adapter
        self._is_open = True

    @property
    def fault(self) -> str | None:
        return self._engine.fault

    def submit(self, ids: Sequence[int], sampling: Sampling) -> Generation:
        return self._engine.submit_with(self._adapter, ids, sampling)

    async def score(self, ids: Sequence[int], start: int = 1) -> list[float]:
        return await self._engine.score_with(self._adapter, ids, start)

    def with_adapter(self, folder: Path) -> Engine:
        return self._engine.with_adapter(folder)

    async def score_top(self, ids: Sequence[int], start: int = 1, top: int = 1) -> list[TokenScore]:
        return await self._engine.score_top_with(self._adapter, ids, start, top)

    async def close(self) -> None:
        was_open, self._is_open = self._is_open, False
        if was_open:
            await asyncio.to_thread(self._engine.release, self._adapter)


@dataclass(slots=True, eq=False)
class _Request:
    ids: list[int]
    sampling: Sampling
    generation: Generation
    adapter: Path | None
    tasks: dict[int, asyncio.Task[None]] = field(default_factory=dict[int, "asyncio.Task[None]"])
    """Of the unfinished choices."""

    def cancel(self, choice: int | None) -> None:
        for each in [c for c in sorted(self.tasks) if choice in (None, c)]:
            self.tasks.pop(each).cancel()
            self.generation.push(Delta(each, (), None, "cancelled"))

    def fail(self, error: EngineError) -> None:
        if self.tasks:
            self.generation.fail(error)
        while self.tasks:
            self.tasks.popitem()[1].cancel()

    def push(self, choice: int, new: Any) -> None:
        """Pass on vLLM's output for one choice."""
        if new.finish_reason not in (None, "stop", "length"):
            raise EngineError(f"vLLM ended the request: {new.finish_reason}")
        ids = [*new.token_ids]
        if new.finish_reason == "stop":
            ids = ids[:-1]  # the stop id
        logprobs = tops = None
        if self.sampling.logprobs:
            given = (new.logprobs or [])[: len(ids)]
            logprobs = tuple(by_id[id_].logprob for id_, by_id in zip(ids, given, strict=True))
            if count := self.sampling.top_logprobs:
                tops = tuple(most_likely(by_id, count) for by_id in given)
        if new.finish_reason:
            del self.tasks[choice]
        self.generation.push(Delta(choice, tuple(ids), logprobs, new.finish_reason, tops))


def _start_vllm(settings: dict[str, Any]) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs  # pyright: ignore[reportMissingImports]
    from vllm.v1.engine.async_llm import AsyncLLM  # pyright: ignore[reportMissingImports]

    # Ctrl-C in a terminal reaches every process, but only ours decides what becomes of requests under way: SIGINT is blocked
    # in the processes that this thread starts. Starting the resource tracker would unblock it, so it is started before.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**settings))
