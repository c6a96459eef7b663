"""The same training computation in fewer passes over memory, by replacing the forward of a PEFT model's parts.

What is computed stays what transformers and PEFT compute, to rounding (`tests/model/test_fused.py`); what is saved for the
backward pass, and how often memory is gone through, shrinks:

- a LoRA layer forms W + s·BA once a pass (the cost of r tokens) and multiplies once, instead of through two branches;
- SwiGLU keeps its two inputs only;
- RMSNorm is torch's own.

Knows nothing about training. It leaves alone what it does not know to be equal: LoRA with dropout, layers with a bias,
quantised layers, other activations, norms in low precision.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corral.model.gemm import is_plain_linear, replace_forward, times_transposed


class _LoraLinear(torch.autograd.Function):
    """x (W + s·BA)ᵀ for a frozen W. Gradients of A and B need only products with r rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return times_transposed(x, torch.addmm(weight, b, a, alpha=scale))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor, None]:
        x, weight, a, b = ctx.saved_tensors
        gradient = gradients[0].flatten(0, -2)
        rows = x.flatten(0, -2)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = times_transposed(gradient, torch.addmm(weight, b, a, alpha=ctx.scale).T).view_as(x)
        of_a = ((gradient @ b).T @ rows).mul_(ctx.scale)
        of_b = (gradient.T @ (rows @ a.T)).mul_(ctx.scale)
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
    """Replace the forwards of a PEFT model's LoRA layers, MLPs and norms, where equality is known."""
    from peft.tuners.lora import Linear as LoraLayer
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

    for module in model.modules():
        if isinstance(module, LoraLayer) and _is_plain(module):
            replace_forward(module, _lora_forward)
        elif isinstance(module, LlamaMLP) and isinstance(module.act_fn, nn.SiLU | _silu_types()):
            replace_forward(module, _mlp_forward)
        elif isinstance(module, LlamaRMSNorm) and module.weight.dtype == torch.float32:
            replace_forward(module, _norm_forward)


def _silu_types() -> type[nn.Module]:
    from transformers.activations import ACT2FN

    return type(ACT2FN["silu"])


def _is_plain(layer: Any) -> bool:
    base = layer.get_base_layer()
    (name,) = layer.active_adapters if len(layer.active_adapters) == 1 else (None,)
    return (
        name is not None
        and is_plain_linear(base)
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and not layer.use_dora[name]
        and layer.lora_A[name].weight.dtype == base.weight.dtype
    )


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
