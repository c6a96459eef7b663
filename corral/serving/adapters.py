"""`/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, as in vLLM: LoRA adapters that come and go while the server runs.

Only who administers the server may do so, and only with adapters in the folder that it was started with: what a client names
is looked for inside it, also after links are followed.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, Field

from corral.answering.open_model import open_adapter
from corral.engines.embedding import Embedder
from corral.errors import CorralError
from corral.serving.model_loading import build_served_model
from corral.serving.models import ServedModels
from corral.serving.protocol import Refused

_MAX_ADAPTERS = 32
AdapterName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$")]


class LoadAdapter(BaseModel):
    """The body of `/v1/load_lora_adapter`."""

    lora_name: AdapterName
    """The name that clients use for it as a model."""
    lora_path: Annotated[str, Field(min_length=1, max_length=1024)]
    """Its folder, inside the server's folder of adapters."""


class UnloadAdapter(BaseModel):
    """The body of `/v1/unload_lora_adapter`."""

    lora_name: AdapterName


class AdapterFolder:
    """Loads adapters of one folder beside the models of a server."""

    def __init__(self, models: ServedModels, folder: Path) -> None:
        self._models = models
        self._folder = folder.resolve()
        self._loaded: set[str] = set()
        self._lock = asyncio.Lock()

    async def load(self, name: str, path: str) -> None:
        """Serve the adapter in a folder as a model of that name.

        Raises: Refused (400: it cannot be loaded, or the name is taken; 404: the folder has no such adapter).
        """
        # A client that goes away must leave nothing half loaded.
        await asyncio.shield(self._load(name, path))

    async def unload(self, name: str) -> None:
        """Serve an adapter no longer; its running requests end as usual.

        Raises: Refused (404: none of that name was loaded while the server ran).
        """
        async with self._lock:
            if name not in self._loaded:
                what = f"no adapter called {name!r} was loaded while this server runs"
                raise Refused(404, what, param="lora_name", code="model_not_found")
            self._loaded.remove(name)
            self._models.remove(name)

    async def _load(self, name: str, path: str) -> None:
        async with self._lock:
            if self._models.has_name(name):
                raise Refused(400, f"there is a model called {name!r} already", param="lora_name")
            if len(self._loaded) == _MAX_ADAPTERS:
                raise Refused(400, f"at most {_MAX_ADAPTERS} adapters are loaded: unload one first", param="lora_name")
            folder = await asyncio.to_thread(self._find, path)
            (first, *_) = served_models = self._models.all()
            models = [each.opened for each in served_models if each.opened is not None]
            try:
                opened = await asyncio.to_thread(open_adapter, folder, models)
                try:
                    served = await asyncio.to_thread(
                        build_served_model, name, str(folder), opened, Embedder(), first.limits
                    )
                except BaseException:
                    await opened.answerer.engine.close()
                    raise
            except CorralError as error:
                raise Refused(400, error.what, param="lora_path") from error
            self._models.add(served)
            self._loaded.add(name)

    def _find(self, path: str) -> Path:
        """Raises: Refused (it is not inside the folder; what is outside is not told from what does not exist)."""
        try:
            found = (self._folder / path).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):
            found = None
        if found is None or not found.is_relative_to(self._folder):
            raise Refused(404, f"there is no {path!r} in this server's folder of adapters", param="lora_path")
        return found


def build_router(models: ServedModels, folder: Path) -> APIRouter:
    """The routes of a server that was started with this folder of adapters."""
    router = APIRouter(prefix="/v1")
    adapters = AdapterFolder(models, folder)

    @router.post("/load_lora_adapter")
    async def load(body: LoadAdapter, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        _check_admin(request)
        await adapters.load(body.lora_name, body.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post("/unload_lora_adapter")
    async def unload(body: UnloadAdapter, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        _check_admin(request)
        await adapters.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return router


def _check_admin(request: Request) -> None:
    """Raises: Refused (403: the key is not an administrator's)."""
    if not request.state.caller.is_admin:
        raise Refused(403, "only a key that was added with --admin may load and unload adapters", code="not_admin")
