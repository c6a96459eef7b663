"""Engines by name: load a model folder into one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from corral.engines.base import Engine
from corral.errors import ModelError

if TYPE_CHECKING:
    from corral.model.loading import DType

LocalEngine: TypeAlias = Literal["transformers", "openvino", "vllm"]
"""Engines that compute a model folder on this machine."""
EngineName: TypeAlias = LocalEngine | Literal["remote"]
LOCAL_ENGINES: tuple[LocalEngine, ...] = get_args(LocalEngine)
ENGINE_NAMES: tuple[EngineName, ...] = (*LOCAL_ENGINES, "remote")


def default_engine(device: str, *, adapter: bool = False) -> LocalEngine:
    """The fastest installed engine for a device. `adapter`: it must compute an adapter that is not merged into its model."""
    if device == "cpu":
        return "openvino" if not adapter and find_spec("openvino_genai") else "transformers"
    return "vllm" if find_spec("vllm") else "transformers"


def load_engine(name: LocalEngine, folder: Path, *, dtype: DType, device: str, adapter: Path | None = None) -> Engine:
    """Load a model folder into the engine of that name.

    Args:
        dtype: `float32`, `bfloat16` or `float16`.
        device: `cpu` or `cuda`.
        adapter: folder of a PEFT LoRA adapter of that model, which is not merged into it.

    Raises:
        ModelError: the folder holds no model that can be loaded, the adapter does not fit it, or the engine does not compute
            on that device, or adapters.
        MissingExtraError: the engine's packages are not installed.
    """
    return load_engines(name, folder, dtype=dtype, device=device, adapters=[adapter])[0]


def load_engines(
    name: LocalEngine, folder: Path, *, dtype: DType, device: str, adapters: Sequence[Path | None]
) -> list[Engine]:
    """Load a model folder once and make an engine for each of several adapters of it; see `load_engine`.

    Args:
        adapters: all different; None is the model without an adapter.
    """
    if name == "openvino":
        return [_load_openvino(folder, dtype, device, adapters)]
    from corral.model.adapters import check_fit

    folders = [adapter for adapter in adapters if adapter is not None]
    for adapter in folders:
        check_fit(adapter, folder)
    if name == "vllm":
        from corral.engines.vllm import VllmEngine

        engine = VllmEngine(folder, dtype=dtype, device=device, adapters=folders)
        return [engine.with_adapter(adapter) for adapter in adapters]
    from corral.engines.transformers import TransformersEngine, default_cache_bytes
    from corral.model.loading import load_model

    model = load_model(folder, dtype=dtype, device=device)
    if not folders:
        return [TransformersEngine(model)]
    from corral.model.adapters import load

    adapted = load(model, *folders)
    if len(adapters) == 1:
        return [TransformersEngine(adapted)]
    from corral.engines.shared_model import SharedModel

    shared = SharedModel(adapted)
    names = dict(zip(folders, adapted.peft_config, strict=True))
    share = default_cache_bytes(model.device) // len(adapters)
    return [
        TransformersEngine(adapted, cache_bytes=share, turn=partial(shared.use, adapter and names[adapter]))
        for adapter in adapters
    ]


def _load_openvino(folder: Path, dtype: DType, device: str, adapters: Sequence[Path | None]) -> Engine:
    if device != "cpu":
        raise ModelError(
            f"the openvino engine computes on the CPU, not on {device!r}",
            hint='use engine = "transformers", or device = "cpu"',
        )
    if adapter := next(filter(None, adapters), None):
        raise ModelError(
            "the openvino engine computes only adapters that are merged into their model",
            where=str(adapter),
            hint="use the transformers engine, or name the merged model (a run keeps it beside the adapter, in merged)",
        )
    from corral.engines.openvino import OpenVinoEngine

    return OpenVinoEngine(folder, dtype=dtype)
