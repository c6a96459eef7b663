"""vLLM's settings: for a model and its adapters when it starts, and for each request."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from corral.errors import ModelError

if TYPE_CHECKING:
    from corral.model.loading import DType

_CPU_CACHE_BYTES = 2 * 2**30


def model_settings(folder: Path, dtype: DType, device: str) -> dict[str, Any]:
    """Engine arguments for a model folder. Raises: ModelError (this build of vLLM is for another device)."""
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    if current_platform.device_type != device.partition(":")[0]:
        raise ModelError(
            f"this build of vLLM computes on {current_platform.device_type!r}, not on {device!r}",
            hint='install the build for that device, or use engine = "transformers"',
        )
    settings: dict[str, Any] = {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "load_format": "safetensors",
        "generation_config": "vllm",  # not the sampling defaults of the model's folder
        "dtype": dtype,
        "max_model_len": -1,  # as long as model and memory allow
        "logprobs_mode": "raw_logprobs",
        "enable_prefix_caching": True,
        "seed": secrets.randbits(31),  # for requests without one
        "disable_log_stats": True,
    }
    if current_platform.device_type == "cuda":
        import torch

        torch.cuda.empty_cache()  # a model may have been trained in this process before
        free, total = torch.cuda.mem_get_info()
        # A share of the total memory; vLLM refuses more than is free.
        settings["gpu_memory_utilization"] = 0.9 * free / total
    if current_platform.device_type == "cpu":
        import psutil

        settings["kv_cache_memory_bytes"] = int(min(_CPU_CACHE_BYTES, psutil.virtual_memory().available / 4))
        settings["enforce_eager"] = True  # compiling takes minutes; the fast engine on a CPU is openvino
    return settings


def lora_settings(adapters: Sequence[Path]) -> dict[str, Any]:
    """Engine arguments for adapters. Raises: ModelError (vLLM cannot compute one of them)."""
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    # Its CPU kernels use the last slot for a request without an adapter in a batch with others, so one slot must stay empty.
    spare = 1 if current_platform.device_type == "cpu" else 0
    rank = max(map(_rank, adapters))
    return {"enable_lora": True, "max_loras": len(adapters) + spare, "max_lora_rank": rank}


def _rank(adapter: Path) -> int:
    """The smallest rank of vLLM's that an adapter fits in. Raises: ModelError (vLLM cannot compute it)."""
    from vllm.config.lora import MaxLoRARanks  # pyright: ignore[reportMissingImports]

    try:
        config: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
        needed = max(config["r"], *(config.get("rank_pattern") or {}).values(), 1)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"adapter_config.json cannot be read: {error!r}", where=str(adapter)) from error
    merge = "merge it into its base model, and name the merged model"
    if config.get("use_dora"):
        raise ModelError("vLLM does not compute DoRA adapters", where=str(adapter), hint=merge)
    ranks = [rank for rank in get_args(MaxLoRARanks) if rank >= needed]
    if not ranks:
        raise ModelError(f"vLLM computes no adapters of rank {needed}", where=str(adapter), hint=merge)
    return min(ranks)


def sampling_params(**changes: Any) -> Any:
    """vLLM's SamplingParams for a request, with these changes."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams  # pyright: ignore[reportMissingImports]

    return SamplingParams(
        n=1,
        ignore_eos=True,  # a choice ends at its own stop ids
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        **changes,
    )
