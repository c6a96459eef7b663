"""One model that several engines compute with, each with its own adapter: they take turns, first come, first served.

An adapter is a switch in the model's layers, so two of them cannot be computed at once, and each engine has a batch of its
own. It knows PEFT's switches; it does not know what is computed in a turn.
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
    """Who may compute with a model that holds several adapters.

    Args:
        model: with its adapters; none but the engines of these turns may use it.
    """

    def __init__(self, model: PeftModel) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        self._on: str | None = None
        self._lock = threading.Lock()
        self._taken = False
        self._waiting: deque[threading.Event] = deque()
        self._switch(None)

    @contextlib.contextmanager
    def use(self, adapter: str | None) -> Generator[None]:
        """The model for oneself, with that adapter on; None: with none. Waits for those who asked earlier."""
        self._take()
        try:
            if adapter != self._on:
                self._switch(adapter)
            yield
        finally:
            self._give()

    def _take(self) -> None:
        with self._lock:
            if not self._taken:
                self._taken = True
                return
            # A lock of Python's would go to whoever asks at the right moment: most often to the one that just had it.
            turn = threading.Event()
            self._waiting.append(turn)
        turn.wait()

    def _give(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._taken = False

    def _switch(self, adapter: str | None) -> None:
        # PEFT's own switches walk through all the model and set gradients besides, which takes half as long as a step.
        for layer in self._layers:
            layer._disable_adapters = adapter is None
            if adapter is not None:
                layer._active_adapter = [adapter]
        self._on = adapter
