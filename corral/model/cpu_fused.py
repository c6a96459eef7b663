"""The same training computation in fewer passes over memory, by replacing the forward of a PEFT model's parts.

What is computed stays what transformers and PEFT compute, to rounding (`tests/model/test_cpu_fused.py`); what is saved for the
backward pass, and how often memory is gone through, shrinks:

- a pack's whole decoder layer goes through `decoder`, on a CPU in float32, and through `gpu` on a GPU;
- elsewhere, a LoRA layer forms W + s·BA once a pass (the cost of r tokens) and multiplies once, instead of through two
  branches; SwiGLU keeps its two inputs only; RMSNorm is torch's own.

Knows nothing about training. It leaves alone what it does not know to be equal: LoRA with dropout, layers with a bias,
other activations, norms in low precision; quantised layers are computed as `quantised` says.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corral.model import cpu_decoder_layer, gpu_layers, quantisation
from corral.model.cpu_gemm import is_plain_linear, lora_gradients, replace_forward, times_transposed


class _LoraLinear(torch.autograd.Function):
    """x (W + s·BA)ᵀ for a frozen W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return times_transposed(x, torch.addmm(weight, b, a, alpha=scale))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor, None]:
        x, weight, a, b = ctx.saved_tensors
        weights = (lambda: torch.addmm(weight, b, a, alpha=ctx.scale)) if ctx.needs_input_grad[0] else None
        of_x, of_a, of_b = lora_gradients(gradients[0], x, a, b, ctx.scale, weights)
        return of_x, None, of_a, of_b, None


class _SwiGlu(torch.autograd.Function):
    """silu(gate) · up, keeping only the two."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        of_up = F.silu(gate).mul_(gradients[0])
        of_gate = torch.ops.aten.silu_backward(gradients[0] * up, gate)
        return of_gate, of_up


def fuse(model: nn.Module) -> None:
    """Replace the forwards of a PEFT model's layers and their parts, where equality is known."""
    from peft.tuners.lora import Linear as LoraLayer
    from peft.tuners.lora import LoraLayer as LoraLayerOfAnyKind
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

    for module in model.modules():
        if isinstance(module, LlamaDecoderLayer):
            replace_forward(module, _layer_forward)
        elif isinstance(module, LoraLayer) and _is_plain(module):
            replace_forward(module, _lora_forward)
        elif isinstance(module, LoraLayer) and gpu_layers.is_low_precision(module):
            replace_forward(module, gpu_layers.lora_forward)
        elif isinstance(module, LoraLayerOfAnyKind):
            quantisation.fuse_adapter(module)
        elif isinstance(module, LlamaMLP) and cpu_decoder_layer.is_silu(module.act_fn):
            replace_forward(module, _mlp_forward)
        elif isinstance(module, LlamaRMSNorm) and (module.weight.is_cuda or module.weight.dtype == torch.float32):
            replace_forward(module, _norm_forward)


def _is_plain(layer: Any) -> bool:
    base = layer.get_base_layer()
    return (
        cpu_decoder_layer.is_exact(layer)
        and is_plain_linear(base)
        and layer.lora_A[layer.active_adapters[0]].weight.dtype == base.weight.dtype
    )


def _layer_forward(layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    # transformers gives these names; `lengths` is there when a pack is computed.
    lengths, rotation = kwargs.get("lengths"), kwargs.get("position_embeddings")
    if kwargs.get("ends") is not None and lengths is not None and rotation is not None:
        found = gpu_layers.layer_forward(layer, hidden_states, rotation, lengths, kwargs["ends"])
        if found is not None:
            return found
    fits = hidden_states.device.type == "cpu" and hidden_states.dtype == torch.float32 and len(hidden_states) == 1
    if not fits or lengths is None or rotation is None or args or kwargs.get("past_key_values") is not None:
        return type(layer).forward(layer, hidden_states, *args, **kwargs)
    parts = cpu_decoder_layer.parts(layer)
    if parts is None:
        return type(layer).forward(layer, hidden_states, **kwargs)
    forward = partial(cpu_decoder_layer.forward, parts, rotation=rotation, lengths=lengths)
    if layer.gradient_checkpointing and layer.training:
        return layer._gradient_checkpointing_func(forward, hidden_states)
    return forward(hidden_states)


def _lora_forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    # Whether the adapter is on may change between two passes (a reference policy is "adapter off"): PEFT decides then.
    if layer.disable_adapters or layer.merged or args or kwargs:
        return type(layer).forward(layer, x, *args, **kwargs)
    name = layer.active_adapters[0]
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    result: Any = _LoraLinear.apply(x, layer.get_base_layer().weight, a, b, layer.scaling[name])
    return result


def _mlp_forward(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down_proj(_SwiGlu.apply(mlp.gate_proj(x), mlp.up_proj(x)))


def _norm_forward(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)
