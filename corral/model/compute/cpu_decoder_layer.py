"""A Llama decoder layer over a pack on a CPU, in float32, as two functions that keep little for the backward pass.

They compute what transformers and PEFT compute, to rounding, in fewer passes over memory:

- The attention half keeps its input, the rotated queries and keys, the values, and the attention result. The MLP half keeps
  its input and the two inputs of SwiGLU. Norms and elementwise products are computed again in the backward pass, matrix
  products are not.
- Queries, keys and values come from one product, and so do their gradients.
- An adapter is merged into its weight once a pass, so that there is one product.
- The residual is added by the product before it.
- An NF4 weight is dequantised for each use and dropped.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from corral.model.compute.cpu_attention import Span, attend, attend_backward, by_head, by_token
from corral.model.compute.cpu_matmul import times_transposed
from corral.model.compute.decoder_layer import DecoderLayer, RmsNorm, read_decoder_layer


def read_float32_layer(layer: Any) -> DecoderLayer | None:
    """The parts of a decoder layer if `forward` can compute it: in float32, nothing trained but adapters. Else None."""
    parts = read_decoder_layer(layer)
    if parts is None:
        return None
    weights = [norm.weight for norm in parts.norms] + [linear.layer.weight for linear in parts.linears]
    dtypes = {norm.weight.dtype for norm in parts.norms} | {linear.dtype for linear in parts.linears}
    dtypes |= {t.dtype for linear in parts.linears for t in linear.adapter}
    frozen = not (torch.is_grad_enabled() and any(weight.requires_grad for weight in weights))
    return parts if frozen and dtypes == {torch.float32} else None


def forward(layer: DecoderLayer, x: Tensor, rotation: tuple[Tensor, Tensor], sequences: tuple[Span, ...]) -> Tensor:
    """The layer's result, differentiable in x and the adapters.

    Args:
        x: [1, tokens, hidden size], float32, on a CPU.
        rotation: cosines and sines as transformers gives them, [1, tokens, head size], both halves alike.
        sequences: see `attend`.

    Returns: [1, tokens, hidden size].
    """
    adapters = [t for linear in (layer.q, layer.k, layer.v, layer.o) for t in linear.adapter]
    rows: Any = _AttentionHalf.apply(x.flatten(0, 1), layer, rotation, sequences, *adapters)
    adapters = [t for linear in (layer.gate, layer.up, layer.down) for t in linear.adapter]
    rows = _MlpHalf.apply(rows, layer, *adapters)
    return rows.view_as(x)


class _AttentionHalf(torch.autograd.Function):
    """x + attention(norm(x)) for x [tokens, hidden size]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layer: DecoderLayer,
        rotation: tuple[Tensor, Tensor],
        sequences: tuple[Span, ...],
        *adapters: Tensor,
    ) -> Tensor:
        inverse = _inverse_rms(layer.attention_norm, x)
        normed = _normalise(layer.attention_norm, x, inverse)
        projected = times_transposed(normed, _stacked_qkv(layer)).view(len(x), -1, layer.head_size)
        q, k, v = _split_qkv(projected, layer)
        rotated_q = torch.empty(q.transpose(0, 1).shape)
        rotated_k = torch.empty(k.transpose(0, 1).shape)
        _rotate(q, rotation, layer.scale, rotated_q.transpose(0, 1))
        _rotate(k, rotation, 1.0, rotated_k.transpose(0, 1))
        v = v.transpose(0, 1).contiguous()
        attended = by_token(attend(rotated_q, rotated_k, v, sequences)).flatten(1)
        result = times_transposed(attended, layer.o.weight(), x)
        ctx.save_for_backward(x, inverse, rotated_q, rotated_k, v, attended if layer.o.adapter else None, *adapters)
        ctx.layer, ctx.rotation, ctx.sequences = layer, rotation, sequences
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse, q, k, v, attended, *_ = ctx.saved_tensors
        layer: DecoderLayer = ctx.layer
        gradient = gradients[0].contiguous()
        grad_attended = times_transposed(gradient, layer.o.weight().T)
        grad_o = layer.o.adapter_gradients(attended, gradient)
        grad_q, grad_k, grad_v = attend_backward(by_head(grad_attended, q), q, k, v, ctx.sequences)
        grad_projected = torch.empty(len(x), q.shape[0] * (q.shape[2] + 2), layer.head_size)
        to_q, to_k, to_v = _split_qkv(grad_projected, layer)
        _rotate(grad_q.transpose(0, 1), ctx.rotation, layer.scale, to_q, back=True)
        _rotate(grad_k.transpose(0, 1), ctx.rotation, 1.0, to_k, back=True)
        to_v.copy_(grad_v.transpose(0, 1))
        normed = _normalise(layer.attention_norm, x, inverse)
        qkv = zip((layer.q, layer.k, layer.v), (to_q, to_k, to_v), strict=True)
        grad_qkv = [g for linear, part in qkv for g in linear.adapter_gradients(normed, part.flatten(1))]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_normed = times_transposed(grad_projected.flatten(1), _stacked_qkv(layer).T)
            grad_x = _norm_gradient(layer.attention_norm, x, inverse, grad_normed, gradient)
        return grad_x, None, None, None, *grad_qkv, *grad_o


class _MlpHalf(torch.autograd.Function):
    """x + down(silu(gate(norm(x))) · up(norm(x))) for x [tokens, hidden size]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: DecoderLayer, *adapters: Tensor) -> Tensor:
        inverse = _inverse_rms(layer.mlp_norm, x)
        normed = _normalise(layer.mlp_norm, x, inverse)
        gate = times_transposed(normed, layer.gate.weight())
        up = times_transposed(normed, layer.up.weight())
        ctx.save_for_backward(x, inverse, gate, up, *adapters)
        ctx.layer = layer
        return times_transposed(F.silu(gate).mul_(up), layer.down.weight(), x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse, gate, up, *_ = ctx.saved_tensors
        layer: DecoderLayer = ctx.layer
        gradient = gradients[0].contiguous()
        grad_product = times_transposed(gradient, layer.down.weight().T)
        silu = F.silu(gate)
        grad_down = layer.down.adapter_gradients(silu * up, gradient) if layer.down.adapter else ()
        grad_up = silu.mul_(grad_product)
        grad_gate = torch.ops.aten.silu_backward(grad_product.mul_(up), gate)
        grad_gate_up: tuple[Tensor, ...] = ()
        if layer.gate.adapter or layer.up.adapter:
            normed = _normalise(layer.mlp_norm, x, inverse)
            grad_gate_up = layer.gate.adapter_gradients(normed, grad_gate) + layer.up.adapter_gradients(normed, grad_up)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_normed = times_transposed(grad_gate, layer.gate.weight().T)
            grad_normed = times_transposed(grad_up, layer.up.weight().T, grad_normed)
            grad_x = _norm_gradient(layer.mlp_norm, x, inverse, grad_normed, gradient)
        return grad_x, None, *grad_gate_up, *grad_down


# Both halves keep 1 / √(mean x² + ε) from the forward pass and normalise again in the backward pass; torch's own rms_norm
# keeps the normalised rows instead. Elsewhere torch's is used.


def _inverse_rms(norm: RmsNorm, x: Tensor) -> Tensor:
    """1 / √(mean x² + ε), [tokens, 1]."""
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return size.square_().div_(x.shape[-1]).add_(norm.epsilon).rsqrt_()


def _normalise(norm: RmsNorm, x: Tensor, inverse: Tensor) -> Tensor:
    return (x * inverse).mul_(norm.weight)


def _norm_gradient(norm: RmsNorm, x: Tensor, inverse: Tensor, grad_normed: Tensor, grad_residual: Tensor) -> Tensor:
    """Gradient of x, which goes through the norm and the residual beside it; `grad_normed` is overwritten."""
    grad_normed.mul_(norm.weight)
    along_x = torch.linalg.vecdot(grad_normed, x).unsqueeze(1).mul_(inverse.pow(3)).div_(x.shape[-1])
    return grad_normed.mul_(inverse).addcmul_(x, along_x, value=-1).add_(grad_residual)


def _stacked_qkv(layer: DecoderLayer) -> Tensor:
    """The weights of queries, keys and values, one below the other."""
    return torch.cat([linear.weight() for linear in (layer.q, layer.k, layer.v)])


def _split_qkv(projected: Tensor, layer: DecoderLayer) -> tuple[Tensor, Tensor, Tensor]:
    """Views of [tokens, heads of all three, head size]: queries [tokens, key heads, group, head size], keys and values
    [tokens, key heads, head size]."""
    heads, key_heads = (linear.layer.out_features // layer.head_size for linear in (layer.q, layer.k))
    q, k, v = projected.split([heads, key_heads, key_heads], dim=1)
    return q.unflatten(1, (key_heads, -1)), k, v


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor], scale: float, out: Tensor, *, back: bool = False) -> None:
    """Write x · scale, with its pairs (i, i + half) rotated by the angles of their positions, to `out`; `back` rotates back.

    Args:
        x, out: [tokens, …, head size].
    """
    half = x.shape[-1] // 2
    shape = (len(x), *(1 for _ in x.shape[1:-1]), half)
    cos, sin = (t[0, :, :half].mul(scale).view(shape) for t in rotation)
    left, right = x[..., :half], x[..., half:]
    sign = -1 if back else 1
    torch.mul(left, cos, out=out[..., :half]).addcmul_(right, sin, value=-sign)
    torch.mul(right, cos, out=out[..., half:]).addcmul_(left, sin, value=sign)
