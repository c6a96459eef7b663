"""A Llama decoder layer over a pack on a CPU, as two functions that keep little for the backward pass.

What transformers and PEFT compute, to rounding, in fewer passes over memory:

- The attention half keeps its input, the rotated queries and keys, the values, and what attention gave; the MLP half its
  input and the two inputs of SwiGLU. Norms and products of elements are formed again, matrix products never.
- Queries, keys and values come from one product, as do their gradients.
- An adapter is added to its weight once a pass (W + s·BA, the cost of r tokens), so that there is one product.
- The residual is added by the product that comes before it.

A weight in NF4 is restored when it is needed and dropped. Knows nothing about packs' contents, losses or training, nor about
models that are not Llama's: `parts` says which layers it can compute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corral.model import quantisation
from corral.model.cpu_attention import attend, attend_backward, by_head, by_token
from corral.model.cpu_gemm import is_plain_linear, times_transposed


@dataclass(frozen=True, slots=True)
class Projection:
    """x (W + s·BA)ᵀ for a frozen W: a linear layer, and the adapter that is active on it if one is.

    Args:
        layer: holds W, [out, in], in float32 or NF4.
        adapter: A [r, in] and B [out, r], or nothing.
        scale: s.
    """

    layer: Any
    adapter: tuple[Tensor, ...]
    scale: float

    def weight(self) -> Tensor:
        """W + s·BA, which must not be written to."""
        weight = quantisation.dequantise_weight(self.layer) if quantisation.is_nf4(self.layer) else self.layer.weight
        if not self.adapter:
            return weight
        a, b = self.adapter
        return torch.addmm(weight, b, a, alpha=self.scale)

    def gradients(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
        """By A and B, given x [tokens, in] and the gradient by the result [tokens, out]; products with r rows only."""
        if not self.adapter:
            return ()
        a, b = self.adapter
        of_a = torch.mm((gradient @ b).mul_(self.scale).T, x)
        return of_a, torch.mm(gradient.T, (x @ a.T).mul_(self.scale))


@dataclass(frozen=True, slots=True)
class Norm:
    """x · w / √(mean x² + ε) over the last dimension."""

    weight: Tensor
    epsilon: float

    def inverse(self, x: Tensor) -> Tensor:
        """1 / √(mean x² + ε), [tokens, 1]."""
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return size.square_().div_(x.shape[-1]).add_(self.epsilon).rsqrt_()

    def gradient(self, x: Tensor, inverse: Tensor, of_result: Tensor, of_residual: Tensor) -> Tensor:
        """By x, of the norm's result and of the residual beside it; `of_result` is written over."""
        of_result.mul_(self.weight)
        along = torch.linalg.vecdot(of_result, x).unsqueeze(1).mul_(inverse.pow(3)).div_(x.shape[-1])
        return of_result.mul_(inverse).addcmul_(x, along, value=-1).add_(of_residual)

    def __call__(self, x: Tensor, inverse: Tensor) -> Tensor:
        """The norm of x, given `inverse(x)`."""
        return (x * inverse).mul_(self.weight)


@dataclass(frozen=True, slots=True)
class Parts:
    """What a decoder layer computes with."""

    first: Norm
    q: Projection
    k: Projection
    v: Projection
    o: Projection
    head_size: int
    scale: float
    second: Norm
    gate: Projection
    up: Projection
    down: Projection


def parts(layer: Any) -> Parts | None:
    """The parts of a decoder layer as they are now (adapters may be switched off and on), or None if there is anything among
    them that this module does not compute: see the conditions below."""
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

    attention, mlp = layer.self_attn, layer.mlp
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    known = (
        isinstance(layer, LlamaDecoderLayer)
        and isinstance(attention, LlamaAttention)
        and isinstance(mlp, LlamaMLP)
        and is_silu(mlp.act_fn)
        and all(isinstance(n, LlamaRMSNorm) and _is_frozen_float32(n.weight) for n in norms)
        and not (attention.training and attention.attention_dropout)
        # Whoever hangs hooks on a part wants the part to be called.
        and not any(m._forward_hooks or m._forward_pre_hooks for m in layer.modules() if m is not layer)  # pyright: ignore[reportPrivateUsage]
    )
    if not known:
        return None
    q, k, v, o = (projection(m) for m in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj))
    gate, up, down = (projection(m) for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    if not (q and k and v and o and gate and up and down):
        return None
    first, second = (Norm(n.weight, n.variance_epsilon) for n in norms)
    return Parts(first, q, k, v, o, attention.head_dim, attention.scaling, second, gate, up, down)


def is_silu(activation: Any) -> bool:
    """Whether an activation is x · sigmoid(x)."""
    from transformers.activations import ACT2FN

    return isinstance(activation, nn.SiLU | type(ACT2FN["silu"]))


def projection(layer: Any) -> Projection | None:
    """A linear layer, or PEFT's LoRA around one, as it is now; None if it has a bias, dropout or anything else besides."""
    from peft.tuners.lora import LoraLayer

    base: Any = layer
    adapter: tuple[Any, ...] = ()
    scale = 0.0
    if isinstance(layer, LoraLayer):
        base = layer.get_base_layer()
        if not (layer.disable_adapters or layer.merged):
            if not is_exact(layer):
                return None
            (name,) = layer.active_adapters
            adapter, scale = (layer.lora_A[name].weight, layer.lora_B[name].weight), layer.scaling[name]
    fits = is_plain_linear(base) and _is_frozen_float32(base.weight)
    fits |= quantisation.is_nf4(base) and base.bias is None and base.weight.quant_state.dtype == torch.float32
    if not fits or any(t.dtype != torch.float32 for t in adapter):
        return None
    return Projection(base, adapter, scale)


def is_exact(layer: Any) -> bool:
    """Whether PEFT's LoRA layer adds s·BA to its weight and does nothing else: one adapter, without dropout or DoRA."""
    (name,) = layer.active_adapters if len(layer.active_adapters) == 1 else (None,)
    return (
        name is not None
        and name in layer.lora_A
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and not layer.use_dora[name]
        and not layer.lora_bias[name]
    )


def _is_frozen_float32(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and not (weight.requires_grad and torch.is_grad_enabled())


def forward(layer: Parts, x: Tensor, rotation: tuple[Tensor, Tensor], lengths: tuple[int, ...]) -> Tensor:
    """The layer's result.

    Args:
        x: [1, tokens, hidden size], float32, on a CPU.
        rotation: cosines and sines as transformers gives them, [1, tokens, head size], both halves alike.
        lengths: of the sequences that lie end to end in x.

    Returns: [1, tokens, hidden size].
    """
    adapters = (p.adapter for p in (layer.q, layer.k, layer.v, layer.o))
    rows: Any = _AttentionHalf.apply(x.flatten(0, 1), layer, rotation, lengths, *(t for pair in adapters for t in pair))
    adapters = (p.adapter for p in (layer.gate, layer.up, layer.down))
    rows = _MlpHalf.apply(rows, layer, *(t for pair in adapters for t in pair))
    return rows.view_as(x)


class _AttentionHalf(torch.autograd.Function):
    """x + attention(norm(x)) for x [tokens, hidden size]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layer: Parts, rotation: tuple[Tensor, Tensor], lengths: tuple[int, ...], *adapters: Tensor
    ) -> Tensor:
        inverse = layer.first.inverse(x)
        projected = times_transposed(layer.first(x, inverse), _stacked(layer)).view(len(x), -1, layer.head_size)
        q, k, v = _split(projected, layer)
        rotated_q = torch.empty(q.transpose(0, 1).shape)
        rotated_k = torch.empty(k.transpose(0, 1).shape)
        _rotate(q, rotation, layer.scale, rotated_q.transpose(0, 1))
        _rotate(k, rotation, 1.0, rotated_k.transpose(0, 1))
        v = v.transpose(0, 1).contiguous()
        attended = by_token(attend(rotated_q, rotated_k, v, lengths)).flatten(1)
        result = times_transposed(attended, layer.o.weight(), x)
        ctx.save_for_backward(x, inverse, rotated_q, rotated_k, v, attended if layer.o.adapter else None, *adapters)
        ctx.layer, ctx.rotation, ctx.lengths = layer, rotation, lengths
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse, q, k, v, attended, *_ = ctx.saved_tensors
        layer: Parts = ctx.layer
        gradient = gradients[0].contiguous()
        of_attended = times_transposed(gradient, layer.o.weight().T)
        of_o = layer.o.gradients(attended, gradient)
        of_q, of_k, of_v = attend_backward(by_head(of_attended, q), q, k, v, ctx.lengths)
        of_projected = torch.empty(len(x), q.shape[0] * (q.shape[2] + 2), layer.head_size)
        to_q, to_k, to_v = _split(of_projected, layer)
        _rotate(of_q.transpose(0, 1), ctx.rotation, layer.scale, to_q, back=True)
        _rotate(of_k.transpose(0, 1), ctx.rotation, 1.0, to_k, back=True)
        to_v.copy_(of_v.transpose(0, 1))
        normed = layer.first(x, inverse)
        three = zip((layer.q, layer.k, layer.v), (to_q, to_k, to_v), strict=True)
        of_adapters = [g for p, of in three for g in p.gradients(normed, of.flatten(1))]
        of_x = None
        if ctx.needs_input_grad[0]:
            of_normed = times_transposed(of_projected.flatten(1), _stacked(layer).T)
            of_x = layer.first.gradient(x, inverse, of_normed, gradient)
        return of_x, None, None, None, *of_adapters, *of_o


class _MlpHalf(torch.autograd.Function):
    """x + down(silu(gate(norm(x))) · up(norm(x))) for x [tokens, hidden size]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Parts, *adapters: Tensor) -> Tensor:
        inverse = layer.second.inverse(x)
        normed = layer.second(x, inverse)
        gate = times_transposed(normed, layer.gate.weight())
        up = times_transposed(normed, layer.up.weight())
        ctx.save_for_backward(x, inverse, gate, up, *adapters)
        ctx.layer = layer
        return times_transposed(F.silu(gate).mul_(up), layer.down.weight(), x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse, gate, up, *_ = ctx.saved_tensors
        layer: Parts = ctx.layer
        gradient = gradients[0].contiguous()
        of_product = times_transposed(gradient, layer.down.weight().T)
        silu = F.silu(gate)
        of_down = layer.down.gradients(silu * up, gradient) if layer.down.adapter else ()
        of_up = silu.mul_(of_product)
        of_gate = torch.ops.aten.silu_backward(of_product.mul_(up), gate)
        of_adapters: tuple[Tensor, ...] = ()
        if layer.gate.adapter or layer.up.adapter:
            normed = layer.second(x, inverse)
            of_adapters = (*layer.gate.gradients(normed, of_gate), *layer.up.gradients(normed, of_up))
        of_x = None
        if ctx.needs_input_grad[0]:
            of_normed = times_transposed(of_gate, layer.gate.weight().T)
            of_normed = times_transposed(of_up, layer.up.weight().T, of_normed)
            of_x = layer.second.gradient(x, inverse, of_normed, gradient)
        return of_x, None, *of_adapters, *of_down


def _stacked(layer: Parts) -> Tensor:
    """The weights of queries, keys and values, one below the other."""
    return torch.cat([p.weight() for p in (layer.q, layer.k, layer.v)])


def _split(projected: Tensor, layer: Parts) -> tuple[Tensor, Tensor, Tensor]:
    """Views of [tokens, heads of all three, head size]: queries [tokens, key heads, group, head size], keys and values
    [tokens, key heads, head size]."""
    heads, key_heads = (p.layer.out_features // layer.head_size for p in (layer.q, layer.k))
    q, k, v = projected.split([heads, key_heads, key_heads], dim=1)
    return q.unflatten(1, (key_heads, -1)), k, v


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor], scale: float, out: Tensor, *, back: bool = False) -> None:
    """Writes x · scale, its pairs (i, i + half) turned by their positions' angles, into `out`; `back` turns back.

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
