"""vLLM's settings: for a model and its adapters when it starts, and for each request."""

from __future__ import annotations

import random
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from corral.engines.base import Alternatives, Sampling
from corral.errors import ModelError
from corral.model.adapter_files import EMBEDDINGS, AdapterFiles

if TYPE_CHECKING:
    from corral.model.loading import DType

_CPU_CACHE_BYTES = 2 * 2**30
_LATER_RANK = 64  # room is made for adapters of this rank when vLLM starts


def model_settings(folder: Path, dtype: DType, device: str, memory_share: float = 1) -> dict[str, Any]:
    """Engine arguments for a model folder. Raises: ModelError (this build of vLLM is for another device).

    Args:
        memory_share: the most of the GPU's memory that it takes; nine tenths of what is free in any case.
    """
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
        settings["gpu_memory_utilization"] = min(0.9 * free / total, memory_share)
    if current_platform.device_type == "cpu":
        import psutil

        settings["kv_cache_memory_bytes"] = int(min(_CPU_CACHE_BYTES, psutil.virtual_memory().available / 4))
        settings["enforce_eager"] = True  # compiling takes minutes; the fast engine on a CPU is openvino
    return settings


def lora_settings(adapters: Sequence[Path], later: int = 0) -> dict[str, Any]:
    """Engine arguments for adapters, and for so many that are loaded later.

    Raises: ModelError (vLLM cannot compute one of them, or would leave a part of it out).
    """
    if not adapters and not later:
        return {}
    files = [AdapterFiles.read(adapter) for adapter in adapters]
    for each in files:
        _check_computed(each)
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

    # Its CPU kernels use the last slot for a request without an adapter in a batch with others, so one slot must stay empty.
    spare = 1 if current_platform.device_type == "cpu" else 0
    rank = max([*map(_rank, files), *([_LATER_RANK] if later else [])])
    return {"enable_lora": True, "max_loras": len(adapters) + later + spare, "max_lora_rank": rank}


def check_later_adapter(folder: Path, max_rank: int) -> None:
    """Raises: ModelError (vLLM, which was started for adapters up to this rank, cannot compute this one)."""
    adapter = AdapterFiles.read(folder)
    _check_computed(adapter)
    if _rank(adapter) > max_rank:
        raise ModelError(
            f"this server loads adapters up to rank {max_rank}",
            where=str(folder),
            hint="start the server with it",
        )


def _check_computed(adapter: AdapterFiles) -> None:
    """Raises ModelError unless an adapter is plain LoRA of one rank and scale on linear layers: the rest vLLM ignores."""
    config = adapter.config
    reason = "DoRA" if config.get("use_dora") else None
    for key in ("rank_pattern", "alpha_pattern", "target_parameters"):
        if config.get(key):
            reason = f"{key} = {config[key]}"
    if not adapter.shares_base and config.get("init_lora_weights") not in (None, True, False):
        reason = f"init_lora_weights = {config['init_lora_weights']!r}, which changes the base"
    for module, part in adapter.shapes:
        if part not in ("lora_A.weight", "lora_B.weight") or module in EMBEDDINGS:
            reason = reason or f"a part of an adapter such as {module}.{part}"
    if reason:
        raise ModelError(f"vLLM does not compute {reason}", where=str(adapter.folder), hint=_way_out(adapter))


def _way_out(adapter: AdapterFiles) -> str:
    return f"use --engine transformers, or merge it: corral merge {adapter.folder} --out FOLDER"


def _rank(adapter: AdapterFiles) -> int:
    """The smallest rank of vLLM's that an adapter fits in. Raises: ModelError (vLLM has none)."""
    from vllm.config.lora import MaxLoRARanks  # pyright: ignore[reportMissingImports]

    needed = max(shape[0] for (_, part), shape in adapter.shapes.items() if part == "lora_A.weight")
    ranks = [rank for rank in get_args(MaxLoRARanks) if rank >= needed]
    if not ranks:
        raise ModelError(
            f"vLLM computes no adapters of rank {needed}", where=str(adapter.folder), hint=_way_out(adapter)
        )
    return min(ranks)


def request_params(sampling: Sampling, choice: int, vocabulary: int) -> Any:
    """vLLM's SamplingParams for one choice of a request."""
    return sampling_params(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        logit_bias=dict(sampling.logit_bias) or None,
        min_tokens=sampling.min_tokens,
        seed=None if sampling.seed is None else random.Random(f"{sampling.seed}:{choice}").getrandbits(63),
        # min_tokens masks their logits, and the whole batch fails at one that the model does not have.
        stop_token_ids=[id_ for id_ in sampling.stop_ids if id_ < vocabulary],
        logprobs=sampling.top_logprobs if sampling.logprobs else None,
    )


def most_likely(by_id: Mapping[int, Any], count: int) -> Alternatives:
    """The most likely ids, of vLLM's log-probabilities by id, which hold the sampled or the given id besides."""
    ranked = sorted(by_id.items(), key=lambda item: item[1].logprob, reverse=True)
    return tuple((id_, each.logprob) for id_, each in ranked[:count])


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
