"""One model with several adapters, shared by several engines, each with its own adapter: they take turns in order of arrival.

An adapter is a switch in the model's layers, so two adapters cannot be computed at once, and each engine has its own batch.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftModel


class SharedModel:
    """A lock on a PEFT model, which also switches its adapters.

    Args:
        model: with its adapters. Nothing else may compute with it.
    """

    def __init__(self, model: PeftModel) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        self._active: str | None = None
        self._lock = threading.Lock()
        self._in_use = False
        self._waiting: deque[threading.Event] = deque()
        self._switch(None)

    @contextlib.contextmanager
    def use(self, adapter: str | None) -> Generator[None]:
        """Use the model alone, with that adapter, or with none. Waits for earlier callers."""
        self._acquire()
        try:
            if adapter != self._active:
                self._switch(adapter)
            yield
        finally:
            self._release()

    def _acquire(self) -> None:
        with self._lock:
            if not self._in_use:
                self._in_use = True
                return
            # A threading.Lock is not fair: most often the thread that released it gets it again.
            turn = threading.Event()
            self._waiting.append(turn)
        turn.wait()

    def _release(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._in_use = False

    def _switch(self, adapter: str | None) -> None:
        # PEFT's own switches walk through the whole model and also set gradients, which takes half as long as a step.
        for layer in self._layers:
            layer._disable_adapters = adapter is None
            if adapter is not None:
                layer._active_adapter = [adapter]
        self._active = adapter
