"""Causal attention within each sequence of a pack on a GPU.

One call of torch's variable-length kernel where there is one, with grouped heads as they are; without it (float32, GPUs before
Ampere), one call a sequence. What a pack needs is copied from pinned memory, so that nothing waits for the device. `attend`
runs on any device, which is how it is tested.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

_KernelUse: TypeAlias = Literal["grouped", "repeated"]
"""Whether the kernel takes fewer key heads than query heads, or key heads must be repeated."""


def copy_to(values: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on a device, without waiting for what the device has yet to do."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def sequence_ends(lengths: Sequence[int], device: torch.device) -> Tensor | None:
    """The `ends` that `attend` takes, to be made once a pack; None on a CPU, which does not need them."""
    if device.type != "cuda":
        return None
    return copy_to(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), device)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, lengths: Sequence[int], ends: Tensor) -> Tensor:
    """Causal attention within each of the sequences that lie end to end.

    Args:
        query: [tokens, heads, head size]; key and value with as many heads or fewer.
        scale: of the scores.
        lengths: of the sequences.
        ends: [0, where each sequence ends], int32, on the same device.

    Returns: as `query`.
    """
    kernel = _kernel(query.device.index, query.dtype, query.shape[-1]) if query.is_cuda else None
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and kernel != "grouped":
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if kernel:
        return _variable_length(query, key, value, scale, max(lengths), ends)
    sequences = zip(*(t.transpose(0, 1)[None].split(list(lengths), dim=2) for t in (query, key, value)), strict=True)
    parts = [F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale) for q, k, v in sequences]
    return torch.cat(parts, dim=2)[0].transpose(0, 1)


def _variable_length(query: Tensor, key: Tensor, value: Tensor, scale: float, longest: int, ends: Tensor) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # Before torch 2.12 the kernel takes grouped heads without this argument.
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    settings: dict[str, Any] = {"scale": scale, "window_size": (-1, 0), **grouped}
    result: Any = varlen_attn(query, key, value, ends, ends, longest, longest, **settings)
    return result


@cache
def _kernel(device: int, dtype: torch.dtype, head_size: int) -> _KernelUse | None:
    """How the variable-length kernel can be used there, tried on two short sequences; None if it cannot."""
    if dtype not in (torch.bfloat16, torch.float16) or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    uses: tuple[tuple[_KernelUse, int], ...] = (("grouped", 1), ("repeated", 2))
    for use, key_heads in uses:
        try:
            if _kernel_is_right(torch.device("cuda", device), dtype, head_size, key_heads):
                return use
        except (RuntimeError, ValueError, TypeError, ImportError):
            continue
    return None


def _kernel_is_right(device: torch.device, dtype: torch.dtype, head_size: int, key_heads: int) -> bool:
    lengths, heads = (3, 130), 2
    wave = torch.arange(sum(lengths) * heads * head_size, device=device).mul_(0.37).sin_()
    query = wave.view(-1, heads, head_size).to(dtype)
    key, value = (query[:, :key_heads].roll(by, dims=0).contiguous() for by in (1, 2))
    ends = torch.tensor([0, 3, 133], device=device, dtype=torch.int32)
    results: list[list[Tensor]] = []
    with torch.enable_grad():
        for exact in (True, False):
            q, k, v = (t.detach().to(torch.float32 if exact else dtype).requires_grad_() for t in (query, key, value))
            scale = head_size**-0.5
            out = attend(q, k, v, scale, lengths, ends) if exact else _variable_length(q, k, v, scale, 130, ends)
            results.append([out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
    pairs = zip(*results, strict=True)
    return all(torch.allclose(a, b.float(), rtol=0.05, atol=0.05 * a.abs().max().item()) for a, b in pairs)
