"""Training computes the same in fewer passes over memory: `fuse` replaces the forwards of a model's layers.

- Over a pack, a decoder layer goes through `cpu_decoder_layer` (float32) or `gpu_decoder_layer`.
- Elsewhere a LoRA layer goes through `lora_linear`, SwiGLU keeps its two inputs only, and RMSNorm is torch's own.

What is not known to give the same result to rounding keeps its forward: LoRA with dropout, layers with a bias, other
activations, norms in low precision on a CPU. Tests compare losses and gradients with those of transformers and PEFT.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corral.model.compute import cpu_decoder_layer, gpu_decoder_layer
from corral.model.compute.decoder_layer import is_silu
from corral.model.compute.lora_linear import fuse_lora, replace_forward


def fuse(model: nn.Module) -> None:
    """Replace the forwards of a model's layers and their parts, where the result is known to stay the same."""
    from peft.tuners.lora import LoraLayer
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

    for module in model.modules():
        if isinstance(module, LlamaDecoderLayer):
            replace_forward(module, _layer_forward)
        elif isinstance(module, LoraLayer):
            fuse_lora(module)
        elif isinstance(module, LlamaMLP) and is_silu(module.act_fn):
            replace_forward(module, _mlp_forward)
        elif isinstance(module, LlamaRMSNorm) and (
            module.weight.device.type != "cpu" or module.weight.dtype == torch.float32
        ):
            replace_forward(module, _norm_forward)


def _layer_forward(layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    # The names are those that transformers passes on; `sequences` is there when a pack is computed.
    sequences, rotation, ends = (kwargs.get(name) for name in ("sequences", "position_embeddings", "ends"))
    if sequences is None or rotation is None:
        return type(layer).forward(layer, hidden_states, *args, **kwargs)
    forward: Any = None
    if ends is not None:
        parts = gpu_decoder_layer.read_layer(layer, hidden_states.device)
        forward = parts and partial(
            gpu_decoder_layer.forward, parts, rotation=rotation, lengths=[s.length for s in sequences], ends=ends
        )
    float32_on_cpu = hidden_states.device.type == "cpu" and hidden_states.dtype == torch.float32
    one_pack = len(hidden_states) == 1 and not args and kwargs.get("past_key_values") is None
    if forward is None and float32_on_cpu and one_pack:
        parts = cpu_decoder_layer.read_float32_layer(layer)
        forward = parts and partial(cpu_decoder_layer.forward, parts, rotation=rotation, sequences=sequences)
    if forward is None:
        return type(layer).forward(layer, hidden_states, *args, **kwargs)
    if layer.gradient_checkpointing and layer.training:
        return layer._gradient_checkpointing_func(forward, hidden_states)
    return forward(hidden_states)


class _SwiGlu(torch.autograd.Function):
    """silu(gate) · up, keeping the two only."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_up = F.silu(gate).mul_(gradients[0])
        grad_gate = torch.ops.aten.silu_backward(gradients[0] * up, gate)
        return grad_gate, grad_up


def _mlp_forward(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down_proj(_SwiGlu.apply(mlp.gate_proj(x), mlp.up_proj(x)))


def _norm_forward(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)
