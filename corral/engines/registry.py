"""Engines by name: load a model folder into one."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

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
    name: LocalEngine,
    folder: Path,
    *,
    dtype: DType,
    device: str,
    adapters: Sequence[Path | None],
    later_adapters: int = 0,
    memory_share: float = 1,
) -> list[Engine]:
    """Load a model folder once and make an engine for each of several adapters of it; see `load_engine`.

    Args:
        adapters: all different; None is the model without an adapter.
        later_adapters, memory_share: as in `VllmEngine`; other engines need no such plans.
    """
    if name == "openvino":
        return [_load_openvino(folder, dtype, device, adapters)]
    from corral.model.adapter_files import AdapterFiles

    files = [AdapterFiles.read(adapter) for adapter in adapters if adapter is not None]
    for each in files:
        each.check_fit(folder)
        each.check_trained()
    if name == "vllm":
        from corral.engines.vllm import VllmEngine

        engine = VllmEngine(
            folder,
            dtype=dtype,
            device=device,
            adapters=[each.folder for each in files],
            later_adapters=later_adapters,
            memory_share=memory_share,
        )
        return [engine.view(adapter) for adapter in adapters]
    return _load_transformers(folder, dtype, device, adapters, [each.folder for each in files if not each.shares_base])


def _load_transformers(
    folder: Path, dtype: DType, device: str, adapters: Sequence[Path | None], alone: Sequence[Path]
) -> list[Engine]:
    """One copy of the model for each adapter of `alone`, which changes it, and one that the others share."""
    from corral.engines.shared_model import SharedEngine, SharedModel
    from corral.engines.transformers import TransformersEngine, default_cache_bytes
    from corral.model.adapters import load
    from corral.model.loading import load_model

    def loaded(folders: Sequence[Path]) -> Any:
        model = load_model(folder, dtype=dtype, device=device)
        return load(model, *folders) if folders else model

    changed = {adapter: loaded([adapter]) for adapter in alone}
    sharing = [adapter for adapter in adapters if adapter not in changed]
    folders = [adapter for adapter in sharing if adapter is not None]
    shared = SharedModel(loaded(folders)) if sharing else None
    cache_bytes = None
    if len(adapters) > 1:
        any_model = shared.model if shared is not None else changed[alone[0]]
        cache_bytes = default_cache_bytes(any_model.device) // len(adapters)
    if shared is None:
        return [TransformersEngine(changed[adapter], cache_bytes=cache_bytes) for adapter in alone]
    names: dict[Path | None, str] = dict(zip(folders, getattr(shared.model, "peft_config", ()), strict=True))
    return [
        TransformersEngine(changed[adapter], cache_bytes=cache_bytes)
        if adapter in changed
        else SharedEngine(shared, names.get(adapter), cache_bytes)
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
            hint="use the transformers engine, or name the merged model: a run keeps it beside the adapter, in merged; else "
            f"corral merge {adapter} --out FOLDER",
        )
    from corral.engines.openvino import OpenVinoEngine

    return OpenVinoEngine(folder, dtype=dtype)
