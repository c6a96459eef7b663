"""One model with several adapters, shared by several engines, each with its own adapter: they take turns in order of arrival.

An adapter is a switch in the model's layers, so two adapters cannot be computed at once, and each engine has its own batch.
Adapters are loaded and unloaded between two turns, while the engines of the others go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections import deque
from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corral.engines.base import Engine
from corral.engines.transformers import TransformersEngine
from corral.errors import ModelError, RequestError
from corral.model import adapters
from corral.model.adapter_files import AdapterFiles

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class SharedModel:
    """A lock on a model, which also switches its adapters.

    Args:
        model: with its adapters, if it has any. Nothing else may compute with it.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        self.model = model
        get_base_model: Any = getattr(model, "get_base_model", lambda: model)
        self.causal: PreTrainedModel = get_base_model()
        """The model in which the adapters are layers."""
        self._layers: list[Any] = []
        self._active: str | None = None
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._in_use = False
        self._waiting: deque[threading.Event] = deque()
        self._find_layers()

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

    def load(self, folder: Path) -> str:
        """Load one more adapter. Returns: its name. Raises: ModelError."""
        name = f"loaded-{next(self._numbers)}"
        with self.use(None):
            try:
                self.model = adapters.add(self.model, folder, name)
                self.model.eval()
            except ModelError:
                self._delete(name)
                raise
            finally:
                self._find_layers()
        return name

    def unload(self, name: str) -> None:
        """Free the weights of an adapter, which no engine uses any more."""
        with self.use(None):
            self._delete(name)
            self._find_layers()

    def _delete(self, name: str) -> None:
        model: Any = self.model
        if name in getattr(model, "peft_config", {}):
            for layer in self._layers:
                layer._active_adapter = []  # or PEFT would look for another one to switch on
            model.delete_adapter(name)

    def _find_layers(self) -> None:
        """Find the layers that adapters change, and switch all adapters off."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        self._switch(None)

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


class SharedEngine(TransformersEngine):
    """A TransformersEngine on a model that others share.

    Args:
        adapter: the name of its adapter there, which belongs to this engine; None: none.
        cache_bytes: as in TransformersEngine.
    """

    def __init__(self, shared: SharedModel, adapter: str | None, cache_bytes: int | None = None) -> None:
        super().__init__(shared.causal, cache_bytes=cache_bytes, turn=partial(shared.use, adapter))
        self._shared = shared
        self._adapter = adapter
        self._cache_bytes = cache_bytes

    def with_adapter(self, folder: Path) -> Engine:  # noqa: D102 (see Engine)
        if not AdapterFiles.read(folder).shares_base:
            raise RequestError(
                f"this adapter changes its base, so that engine {self.name!r} cannot load it while others use the base",
                hint="start the server with it",
            )
        return SharedEngine(self._shared, self._shared.load(folder), self._cache_bytes)

    async def close(self) -> None:  # noqa: D102
        await super().close()
        adapter, self._adapter = self._adapter, None
        if adapter is not None:
            await asyncio.to_thread(self._shared.unload, adapter)
