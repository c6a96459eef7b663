"""What vLLM is told: of a model and its adapters when it starts, of each request. Knows nothing of how it is asked."""

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
    """Of a model folder. Raises: ModelError (this build of vLLM is for another device)."""
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
        "generation_config": "vllm",  # not the model's own ideas of sampling
        "dtype": dtype,
        "max_model_len": -1,  # as long as model and memory allow
        "logprobs_mode": "raw_logprobs",
        "enable_prefix_caching": True,
        "seed": secrets.randbits(31),  # of draws without one
        "disable_log_stats": True,
    }
    if current_platform.device_type == "cuda":
        import torch

        torch.cuda.empty_cache()  # of what was trained in this process before
        free, total = torch.cuda.mem_get_info()
        settings["gpu_memory_utilization"] = (
            0.9 * free / total
        )  # it counts in shares of the whole, and refuses more than is free
    if current_platform.device_type == "cpu":
        import psutil

        settings["kv_cache_memory_bytes"] = int(min(_CPU_CACHE_BYTES, psutil.virtual_memory().available / 4))
        settings["enforce_eager"] = True  # compiling takes minutes; who wants speed on a CPU takes openvino
    return settings


def lora_settings(adapters: Sequence[Path]) -> dict[str, Any]:
    """Of adapters. Raises: ModelError (vLLM cannot compute one of them)."""
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    # Its kernels for CPUs take the last slot for a request without an adapter that is beside others: one that stays empty.
    spare = 1 if current_platform.device_type == "cpu" else 0
    rank = max(map(_rank, adapters))
    return {"enable_lora": True, "max_loras": len(adapters) + spare, "max_lora_rank": rank}


def _rank(adapter: Path) -> int:
    """The smallest rank that vLLM has and that holds an adapter. Raises: ModelError (vLLM cannot compute it)."""
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
    """Of a request: vLLM's SamplingParams, with these changes."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams  # pyright: ignore[reportMissingImports]

    return SamplingParams(
        n=1,
        ignore_eos=True,  # a choice ends at the stop ids that were asked for
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        **changes,
    )
