"""A Llama decoder layer over a pack on a GPU: what transformers and PEFT compute, to rounding, in fewer and larger steps.

Attention is one call (`gpu_attention`). What comes before it and after it are two functions of tensors, which `torch.compile`
turns into few kernels, once for all layers and all lengths of packs. The functions run on any device, which is how they are
tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from corral.model.compute import gpu_attention, gpu_compile
from corral.model.compute.decoder_layer import DecoderLayer, read_decoder_layer
from corral.model.compute.lora_linear import LoraLinear
from corral.model.compute.quantised_weights import is_nf4

_Linear: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None, float]
"""W [out, in]; A [r, in] and B [out, r], or neither; the adapter's scale."""


def read_layer(layer: Any, device: torch.device) -> DecoderLayer | None:
    """The parts of transformers' decoder layer if `forward` can compute it on that device, else None.

    Its weights must be in one dtype and not quantised; adapters may be in another.
    """
    parts = read_decoder_layer(layer) if gpu_compile.can_compile(device) else None
    if parts is None or any(is_nf4(linear.layer) for linear in parts.linears):
        return None
    dtypes = {linear.dtype for linear in parts.linears} | {norm.weight.dtype for norm in parts.norms}
    return parts if len(dtypes) == 1 else None


def forward(
    layer: DecoderLayer, x: Tensor, rotation: tuple[Tensor, Tensor], lengths: Sequence[int], ends: Tensor
) -> Tensor:
    """The layer's result.

    Args:
        x: [1, tokens, hidden size].
        rotation: cosines and sines as transformers gives them, [1, tokens, head size].
        lengths, ends: see `gpu_attention.attend`.

    Returns: as `x`.
    """
    rows, cos, sin = (gpu_compile.of_any_length(t[0]) for t in (x, *rotation))
    first, second = layer.norms
    q, k, v, o, gate, up, down = (_tensors(linear) for linear in layer.linears)
    before, after = gpu_compile.compiled(before_attention), gpu_compile.compiled(after_attention)
    query, key, value = before(rows, first.weight, first.epsilon, cos, sin, q, k, v)
    attended = gpu_attention.attend(query, key, value, layer.scale, lengths, ends).flatten(1)
    attended = gpu_compile.of_any_length(attended)
    return after(rows, attended, o, second.weight, second.epsilon, gate, up, down)[None]


def _tensors(linear: LoraLinear) -> _Linear:
    a, b = linear.adapter or (None, None)
    return linear.layer.weight, a, b, linear.scale


def before_attention(
    x: Tensor, norm: Tensor, epsilon: float, cos: Tensor, sin: Tensor, q: _Linear, k: _Linear, v: _Linear
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys (both rotated by the angles of their positions) and values of a decoder layer.

    Args:
        x: [tokens, hidden size].
        norm, epsilon: of the norm before attention.
        cos, sin: [tokens, head size], both halves alike.

    Returns: each [tokens, its heads, head size].
    """
    normed = _rms_norm(x, norm, epsilon)
    size = cos.shape[-1]
    query, key, value = (_linear(normed, p).unflatten(-1, (-1, size)) for p in (q, k, v))
    return _rotated(query, cos, sin), _rotated(key, cos, sin), value


def after_attention(
    x: Tensor,
    attended: Tensor,
    o: _Linear,
    norm: Tensor,
    epsilon: float,
    gate: _Linear,
    up: _Linear,
    down: _Linear,
) -> Tensor:
    """The layer's result, [tokens, hidden size], from its input and the attention result, [tokens, heads · head size]."""
    x = x + _linear(attended, o)
    normed = _rms_norm(x, norm, epsilon)
    return x + _linear(F.silu(_linear(normed, gate)) * _linear(normed, up), down)


# `torch.compile` fuses the elementwise operations of these three with their neighbours and derives their gradients. So they
# are written out here, not shared with `lora_linear` (its backward pass is its own) or torch's rms_norm (a separate kernel).


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    wide = x.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()).to(x.dtype) * weight


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-right, left), dim=-1) * sin[:, None]


def _linear(x: Tensor, linear: _Linear) -> Tensor:
    weight, a, b, scale = linear
    result = F.linear(x, weight)
    if a is None or b is None:
        return result
    return result + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * scale
