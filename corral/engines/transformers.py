"""The reference engine: a transformers model in this process, on any device, with continuous batching.

One worker thread (`continuous_batching`) owns the model, or takes turns with the workers of other engines.
"""

from __future__ import annotations

import asyncio
import atexit
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from corral.engines.base import (
    CLOSED,
    OPTIONAL_SAMPLING,
    Engine,
    Features,
    Generation,
    Sampling,
    TokenScore,
    closed_error,
    longest_step,
)
from corral.engines.continuous_batching import FORWARD_TOKENS, Cancel, Request, Score, Worker
from corral.engines.kv_cache import bytes_per_token
from corral.errors import EngineUnavailableError
from corral.model import packed_forward
from corral.model.device import memory_limit

_CPU_CACHE_BYTES = 2**31


class TransformersEngine(Engine):
    """Completes and scores with a loaded causal language model.

    The model belongs to the engine until it is closed: it is put into evaluation mode and its attention implementation is
    set to `packed_forward.ATTENTION`. Adapters are used as they are switched at the time of the call.

    Args:
        model: a causal language model of the Llama kind (full attention in every layer, one cache of keys and values), on
            any device, or a PEFT model that changes its layers (LoRA and its kin; not prompt tuning).
        max_batch: most choices computed at a time; others wait.
        cache_bytes: most memory for keys and values. None: half of what is free on a GPU, 2 GiB elsewhere. A choice
            that needs more runs alone.
        turn: entered around each step, if other engines compute with the same model (`SharedModel.use`).
    """

    name = "transformers"

    def __init__(
        self,
        model: nn.Module,
        *,
        max_batch: int = 128,
        cache_bytes: int | None = None,
        turn: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        get_base_model: Any = getattr(model, "get_base_model", None)
        causal: Any = get_base_model() if get_base_model is not None else model
        model.eval()
        causal.set_attn_implementation(packed_forward.ATTENTION_NAME)
        context: int = causal.config.max_position_embeddings
        # Sliding attention is full attention for texts up to its window.
        window: int | None = getattr(causal.config, "sliding_window", None)
        self.features = Features(
            max_length=min(context, window or context),
            vocabulary=causal.get_input_embeddings().weight.shape[0],
            logprobs=True,
            score=True,
            honours=frozenset(OPTIONAL_SAMPLING),
            score_top=True,
        )
        tokens = max(1, (cache_bytes or default_cache_bytes(causal.device)) // bytes_per_token(causal))
        self._longest_step = longest_step(FORWARD_TOKENS, sum(each.numel() for each in causal.parameters()))
        self._worker = Worker(causal, self.name, max_batch, tokens, turn)
        # A program that does not close its engine must still end: a daemon thread, as the interpreter does not wait for
        # one, which `atexit` stops, as the interpreter would crash if it computed during shutdown.
        self._thread = threading.Thread(target=self._worker.run, name="corral-transformers", daemon=True)
        self._thread.start()
        atexit.register(self._end)

    @property
    def fault(self) -> str | None:
        """A step that does not end, besides having been closed. It cannot be ended from within the process."""
        if self._worker.has_ended:
            return CLOSED
        seconds = self._worker.step_seconds
        if seconds <= self._longest_step:
            return None
        return f"it computes one step for {seconds:.0f} s, and only a restart of this program can end that"

    def submit(self, ids: Sequence[int], sampling: Sampling) -> Generation:  # noqa: D102 (see Engine)
        self.check_submit(ids, sampling)
        self._raise_if_hung()
        request: Request

        def cancel(choice: int | None) -> None:
            self._worker.enqueue(Cancel(request, choice))

        request = Request(tuple(ids), sampling, Generation(len(ids), sampling.n, cancel))
        if not self._worker.enqueue(request):
            raise closed_error(self)
        return request.generation

    async def score(self, ids: Sequence[int], start: int = 1) -> list[float]:  # noqa: D102
        self.check_score(ids, start)
        return [score.logprob for score in await self._score(Score(tuple(ids), start))]

    async def score_top(self, ids: Sequence[int], start: int = 1, top: int = 1) -> list[TokenScore]:  # noqa: D102
        self.check_score_top(ids, start, top)
        return await self._score(Score(tuple(ids), start, top))

    async def _score(self, job: Score) -> list[TokenScore]:
        self._raise_if_hung()
        if job.start == len(job.ids):
            return []
        if not self._worker.enqueue(job):
            raise closed_error(self)
        return await asyncio.wrap_future(job.result)

    async def close(self) -> None:  # noqa: D102
        await asyncio.to_thread(self._end)
        atexit.unregister(self._end)

    def _raise_if_hung(self) -> None:
        if not self._worker.has_ended and (fault := self.fault):
            raise EngineUnavailableError(f"engine {self.name!r}: {fault}")

    def _end(self) -> None:
        self._worker.stop()
        self._thread.join()


def default_cache_bytes(device: torch.device) -> int:
    """Memory for keys and values by default."""
    limit = memory_limit(str(device)) if device.type == "cuda" else None
    return limit.free // 2 if limit else _CPU_CACHE_BYTES
