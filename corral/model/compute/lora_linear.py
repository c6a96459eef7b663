"""x (W + s·BA)ᵀ: a linear layer with or without a LoRA adapter, read from a model and computed with W frozen.

There are two ways to compute it:

- Merged: form W + s·BA once (at the cost of r more tokens) and multiply once. Exact where the adapter has W's precision.
- Branched: x Wᵀ + s (x Aᵀ) Bᵀ, for W in bfloat16 or float16. W + s·BA rounded to W's dtype would lose every update that is
  smaller than 1/256 of a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corral.model.compute.cpu_matmul import times_transposed
from corral.model.compute.quantised_weights import dequantise_weight, is_nf4


@dataclass(frozen=True, slots=True)
class LoraLinear:
    """A linear layer without bias, and the LoRA adapter that is active on it.

    Args:
        layer: holds W [out, in], plain or in NF4.
        adapter: A [r, in] and B [out, r], or empty.
        scale: s.
    """

    layer: Any
    adapter: tuple[Tensor, ...] = ()
    scale: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        """Of W; if it is in NF4, of the weight it was quantised from."""
        weight = self.layer.weight
        return weight.quant_state.dtype if is_nf4(self.layer) else weight.dtype

    def weight(self) -> Tensor:
        """W + s·BA. The caller must not write to it."""
        nf4 = is_nf4(self.layer)
        weight = dequantise_weight(self.layer) if nf4 else self.layer.weight
        if not self.adapter:
            return weight
        a, b = self.adapter
        return weight.addmm_(b, a, alpha=self.scale) if nf4 else torch.addmm(weight, b, a, alpha=self.scale)

    def adapter_gradients(self, x: Tensor, gradient: Tensor, inner: Tensor | None = None) -> tuple[Tensor, ...]:
        """Gradients of A and B, in their dtype; empty without an adapter. No product is larger than r tokens'.

        Args:
            x: [tokens, in].
            gradient: of the result, [tokens, out].
            inner: x Aᵀ, if it was kept.
        """
        if not self.adapter:
            return ()
        a, b = (t.to(x.dtype) for t in self.adapter)
        inner = x @ a.T if inner is None else inner
        both = (gradient @ b).T @ x, gradient.T @ inner
        return tuple(g.to(t.dtype).mul_(self.scale) for g, t in zip(both, self.adapter, strict=True))

    def merged(self, x: Tensor) -> Tensor:
        """The result for x [..., in] through one product; differentiable in x, A and B."""
        result: Any = _Merged.apply(x, self, *self.adapter)
        return result

    def branched(self, x: Tensor) -> Tensor:
        """The result for x [..., in] of W's dtype, with the adapter as a branch; differentiable in x, A and B.

        A and B, and with them their gradients, may be in float32. Products are in W's dtype, as under mixed precision.
        """
        result: Any = _Branched.apply(x, self, *self.adapter)
        return result


# The backward passes read W from the layer instead of saving it. W + s·BA, or W out of NF4, is a new tensor as large as W:
# saved, one for every linear layer would be held until the backward pass reaches it (under gradient checkpointing, one for
# every linear layer of the block that is computed again). The price is that autograd does not notice if W is changed in place
# between the two passes: the gradients are then those of the new W. A and B are saved, so changing those is an error.


class _Merged(torch.autograd.Function):
    """Keeps x if there is an adapter, and no merged or dequantised weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: LoraLinear, *adapter: Tensor) -> Tensor:
        ctx.linear = linear
        ctx.save_for_backward(*((x, *adapter) if adapter else ()))
        return times_transposed(x, linear.weight())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        linear: LoraLinear = ctx.linear
        gradient = gradients[0].contiguous()
        grad_x = times_transposed(gradient, linear.weight().T) if ctx.needs_input_grad[0] else None
        saved = ctx.saved_tensors
        grad_adapter = linear.adapter_gradients(saved[0].flatten(0, -2), gradient.flatten(0, -2)) if saved else ()
        return grad_x, None, *grad_adapter


class _Branched(torch.autograd.Function):
    """Keeps x and x Aᵀ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: LoraLinear, a: Tensor, b: Tensor) -> Tensor:
        inner = F.linear(x, a.to(x.dtype))
        result = linear.layer(x)
        result.flatten(0, -2).addmm_(inner.flatten(0, -2), b.to(x.dtype).T, alpha=linear.scale)
        ctx.linear = linear
        ctx.save_for_backward(x, inner, a, b)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        linear: LoraLinear = ctx.linear
        x, inner, a, b = ctx.saved_tensors
        gradient = gradients[0].flatten(0, -2)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = gradient @ LoraLinear(linear.layer).weight()
            grad_x = grad_x.addmm_(gradient @ b.to(x.dtype), a.to(x.dtype), alpha=linear.scale).view_as(x)
        return grad_x, None, *linear.adapter_gradients(x.flatten(0, -2), gradient, inner.flatten(0, -2))


def read_lora_linear(layer: Any) -> LoraLinear | None:
    """A linear layer, or PEFT's LoRA around one, as it is at this moment: adapters may be switched off and on.

    Returns: None if the layer computes anything more: a bias, dropout, DoRA, several adapters, another quantisation.
    """
    from peft.tuners.lora import LoraLayer

    base: Any = layer
    adapter: tuple[Any, ...] = ()
    scale = 0.0
    if isinstance(layer, LoraLayer):
        base = layer.get_base_layer()
        if not (layer.disable_adapters or layer.merged):
            if not _only_adds_lora(layer):
                return None
            (name,) = layer.active_adapters
            adapter, scale = (layer.lora_A[name].weight, layer.lora_B[name].weight), layer.scaling[name]
    readable = is_plain_linear(base) or (is_nf4(base) and base.bias is None)
    return LoraLinear(base, adapter, scale) if readable else None


def _only_adds_lora(layer: Any) -> bool:
    """Whether PEFT's LoRA layer adds s·BA to its weight and does nothing else: one adapter, without dropout or DoRA."""
    (name,) = layer.active_adapters if len(layer.active_adapters) == 1 else (None,)
    return (
        name is not None
        and name in layer.lora_A
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and not layer.use_dora[name]
        and not layer.lora_bias[name]
    )


def is_plain_linear(module: Any) -> bool:
    """Whether a layer is torch's own linear layer (not a quantised or adapted one), without a bias."""
    return type(module) is nn.Linear and cast("Any", module).bias is None


def replace_forward(module: Any, forward: Callable[..., Tensor]) -> None:
    """Make `forward(module, …)` what the module computes."""
    module.forward = partial(forward, module)


def accelerate(model: nn.Module) -> None:
    """Compute a model's plain linear layers through oneDNN, wherever their weights are not being trained."""
    for module in model.modules():
        if is_plain_linear(module):
            replace_forward(module, _linear_forward)


def _linear_forward(layer: nn.Linear, x: Tensor) -> Tensor:
    weight = layer.weight
    float32_on_cpu = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if not float32_on_cpu or (weight.requires_grad and torch.is_grad_enabled()):
        return F.linear(x, weight)
    return LoraLinear(layer).merged(x)


def fuse_lora(layer: Any) -> bool:
    """Compute a PEFT LoRA layer merged or branched, if `read_lora_linear` can read it. Returns whether it can."""
    readable = read_lora_linear(layer) is not None
    if readable:
        replace_forward(layer, _lora_forward)
    return readable


def _lora_forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    linear = None if args or kwargs else read_lora_linear(layer)
    if linear is not None and linear.adapter:
        same_dtype = linear.adapter[0].dtype == linear.dtype
        on_cpu, fits = x.device.type == "cpu", bool(x.numel()) and x.dtype == linear.dtype
        if same_dtype and (not is_nf4(linear.layer) or (on_cpu and fits)):
            return linear.merged(x)
        # PEFT's own forward keeps a float32 copy of the input for each of the layers that share it.
        if not on_cpu and fits and x.dtype in (torch.bfloat16, torch.float16):
            return linear.branched(x)
    return type(layer).forward(layer, x, *args, **kwargs)
