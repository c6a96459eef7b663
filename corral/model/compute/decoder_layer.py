"""The parts of a Llama decoder layer, read for the functions that compute it in fewer steps than transformers does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from corral.model.compute.lora_linear import LoraLinear, read_lora_linear


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """x · w / √(mean x² + ε) over the last dimension."""

    weight: Tensor
    epsilon: float


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """What a decoder layer computes with."""

    attention_norm: RmsNorm
    q: LoraLinear
    k: LoraLinear
    v: LoraLinear
    o: LoraLinear
    head_size: int
    scale: float
    """Of the attention scores."""
    mlp_norm: RmsNorm
    gate: LoraLinear
    up: LoraLinear
    down: LoraLinear

    @property
    def norms(self) -> tuple[RmsNorm, RmsNorm]:
        """Both norms."""
        return self.attention_norm, self.mlp_norm

    @property
    def linears(self) -> tuple[LoraLinear, ...]:
        """All seven projections, in the order of the fields."""
        return self.q, self.k, self.v, self.o, self.gate, self.up, self.down


def read_decoder_layer(layer: Any) -> DecoderLayer | None:
    """The parts of a layer as they are at this moment; None if it computes anything that the parts do not say."""
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

    attention, mlp = layer.self_attn, layer.mlp
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    readable = (
        isinstance(layer, LlamaDecoderLayer)
        and isinstance(attention, LlamaAttention)
        and isinstance(mlp, LlamaMLP)
        and is_silu(mlp.act_fn)
        and all(isinstance(norm, LlamaRMSNorm) for norm in norms)
        and not (attention.training and attention.attention_dropout)
        # A hook on a part expects the part to be called.
        and not any(m._forward_hooks or m._forward_pre_hooks for m in layer.modules() if m is not layer)  # pyright: ignore[reportPrivateUsage]
    )
    if not readable:
        return None
    q, k, v, o = (read_lora_linear(m) for m in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj))
    gate, up, down = (read_lora_linear(m) for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    if not (q and k and v and o and gate and up and down):
        return None
    first, second = (RmsNorm(norm.weight, norm.variance_epsilon) for norm in norms)
    return DecoderLayer(first, q, k, v, o, attention.head_dim, attention.scaling, second, gate, up, down)


def is_silu(activation: Any) -> bool:
    """Whether an activation is x · sigmoid(x)."""
    from transformers.activations import ACT2FN

    return isinstance(activation, nn.SiLU | type(ACT2FN["silu"]))
