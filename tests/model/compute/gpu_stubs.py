"""Stands in for GPUs of several generations: what torch says of them, and a variable-length kernel that computes on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from corral.model.compute import gpu_attention

Kernel = Callable[..., Tensor]


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Tensor,
    key_ends: Tensor,
    longest: int,
    longest_key: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> Tensor:
    """torch's `varlen_attn`, as far as corral uses it: causal, in half precision, for gradients or not."""
    assert window_size == (-1, 0)
    assert query.dtype in (torch.bfloat16, torch.float16)
    assert ends.dtype == torch.int32
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise ValueError("enable_gqa must be set")
    lengths = ends.diff().tolist()
    assert longest == longest_key == max(lengths)
    sequences = zip(*(t.transpose(0, 1)[None].split(lengths, dim=2) for t in (query, key, value)), strict=True)
    parts = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=enable_gqa)
        for q, k, v in sequences
    ]
    return torch.cat(parts, dim=2)[0].transpose(0, 1)


def use_kernel(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], kernel: Kernel = varlen_attn
) -> list[tuple[int, ...]]:
    """Let tensors on the CPU take the way of a GPU with this compute capability and this kernel.

    Returns: the shape of the keys of each call of the kernel.
    """
    calls: list[tuple[int, ...]] = []

    def counted(query: Tensor, key: Tensor, *args: Any, enable_gqa: bool = False, **settings: Any) -> Tensor:
        calls.append(tuple(key.shape))
        return kernel(query, key, *args, enable_gqa=enable_gqa, **settings)

    def of(_: torch.device) -> tuple[int, int]:
        return capability

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", counted)
    monkeypatch.setattr(gpu_attention, "_capability", of)
    gpu_attention.choose_kernel.cache_clear()
    return calls


def show_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """Let torch say that there is a GPU with this compute capability, which like all emulates what it lacks."""
    properties = SimpleNamespace(major=capability[0], minor=capability[1], name=f"sm{capability[0]}{capability[1]}")

    def constant(value: Any) -> Any:
        return lambda *_, **__: value

    for name, value in {
        "init": None,
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": properties,
        "get_device_capability": capability,
        "_check_bf16_tensor_supported": True,
    }.items():
        monkeypatch.setattr(torch.cuda, name, constant(value))
