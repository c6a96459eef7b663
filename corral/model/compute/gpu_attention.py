"""Causal attention within each sequence of a pack on a GPU.

One call of torch's variable-length kernel where there is one, with grouped heads as they are; without it (float32, GPUs before
Ampere), one call a sequence. What a pack needs is copied from pinned memory, so that nothing waits for the device. `attend`
runs on any device, which is how it is tested.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

_log = logging.getLogger(__name__)

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
    use, _ = choose_kernel(query.device, query.dtype, query.shape[-1])
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and use != "grouped":
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if use is not None:
        return _variable_length(query, key, value, scale, max(lengths), ends)
    return _one_by_one(query, key, value, scale, lengths)


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, scale: float, lengths: Sequence[int]) -> Tensor:
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
def choose_kernel(device: torch.device, dtype: torch.dtype, head_size: int) -> tuple[_KernelUse | None, str | None]:
    """How the variable-length kernel is used there, tried on two short sequences; None if it cannot be used.

    Returns: the use, and why it is not "grouped", which is logged once for a GPU.
    """
    capability = _capability(device)
    if capability is None:
        return None, f"there is no variable-length kernel for {device.type!r}"
    use: _KernelUse | None = None
    faults: list[str] = []
    if dtype not in (torch.bfloat16, torch.float16):
        faults.append(f"it does not take {str(dtype).removeprefix('torch.')}")
    elif capability < (8, 0):
        faults.append(f"it needs compute capability 8.0 (Ampere), and this GPU has {capability[0]}.{capability[1]}")
    else:
        use = _first_right_use(device, dtype, head_size, faults)
    if not faults:
        return use, None
    instead = "key heads are repeated for" if use else "attention runs sequence by sequence, more slowly, without"
    message = f"{instead} torch's variable-length kernel: {'; '.join(dict.fromkeys(faults))}"
    _log.warning(message)
    return use, message


def _first_right_use(device: torch.device, dtype: torch.dtype, head_size: int, faults: list[str]) -> _KernelUse | None:
    """How the kernel gives right results there; adds to `faults` why not otherwise."""
    uses: tuple[tuple[_KernelUse, int], ...] = (("grouped", 1), ("repeated", 2))
    for use, key_heads in uses:
        fault = _kernel_fault(device, dtype, head_size, key_heads)
        if fault is None:
            return use
        faults.append(fault)
    return None


def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _kernel_fault(device: torch.device, dtype: torch.dtype, head_size: int, key_heads: int) -> str | None:
    """What is wrong with the kernel there, compared with float32; None if nothing is."""
    lengths, heads, scale = (3, 130), 2, head_size**-0.5
    results: list[list[Tensor]] = []
    try:
        # The first pack may be computed without gradients, or in inference mode, and the answer is kept for all others.
        with torch.inference_mode(mode=False), torch.enable_grad():
            count = sum(lengths) * heads * head_size
            wave = torch.arange(count, device=device, dtype=torch.float32).mul_(0.37).sin_()
            query = wave.view(-1, heads, head_size).to(dtype)
            key, value = (query[:, :key_heads].roll(by, dims=0).contiguous() for by in (1, 2))
            ends = torch.tensor([0, 3, 133], device=device, dtype=torch.int32)
            for exact in (True, False):
                q, k, v = (
                    t.to(torch.float32 if exact else dtype, copy=True).requires_grad_() for t in (query, key, value)
                )
                if exact:
                    wide_k, wide_v = (t.repeat_interleave(heads // key_heads, dim=1) for t in (k, v))
                    out = _one_by_one(q, wide_k, wide_v, scale, lengths)
                else:
                    out = _variable_length(q, k, v, scale, 130, ends)
                results.append([out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
    except (RuntimeError, ValueError, TypeError, ImportError) as error:
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    pairs = list(zip(*results, strict=True))
    right = all(torch.allclose(a, b.float(), rtol=0.05, atol=0.05 * a.abs().max().item()) for a, b in pairs)
    return None if right else "its results differ from those in float32"
