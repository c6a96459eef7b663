"""Matrix products on a CPU through oneDNN.

torch sends float32 products on x86 to MKL, which on AMD processors leaves out their AVX-512 units; oneDNN, which torch
carries as well, uses them: 440 against 200 GFLOP/s measured on two Zen 5 cores, and as fast on others. Everything else
(GPUs, other types, other processors) goes the usual way.

Knows nothing about what is multiplied, and nothing about training but that a frozen weight needs no gradient.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import cache, partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@cache
def _available() -> bool:
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    try:
        # The operator is torch's own, but no public name: hold it to its meaning before relying on it.
        x, weight = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3)
        plus = torch.ones(2, 4)
        product = x @ weight.T
        return torch.equal(_onednn(x, weight), product) and torch.equal(_onednn_plus(x, weight, plus), product + plus)
    except (RuntimeError, AttributeError, TypeError):
        return False


def fill(rows: int, step: int) -> int:
    """How many rows of nothing a product should have added, to a multiple of `step`: oneDNN makes a program for each number
    of rows, of some 0.6 MB and in 1 ms, and keeps it, so there should be few numbers."""
    return -rows % step if _available() else 0


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    product: Any = torch.ops.mkldnn._linear_pointwise  # pyright: ignore[reportPrivateUsage]
    return product(x, weight, None, "none", [], "")


def _onednn_plus(x: Tensor, weight: Tensor, plus: Tensor) -> Tensor:
    product: Any = torch.ops.mkldnn._linear_pointwise.binary  # pyright: ignore[reportPrivateUsage]
    return product(x, plus, weight, None, "add")


def times_transposed(x: Tensor, weight: Tensor, plus: Tensor | None = None) -> Tensor:
    """x weightᵀ + plus, not differentiable on the fast path: for use under no_grad and inside autograd functions.

    Args:
        x: [..., in].
        weight: [out, in], contiguous or the transpose of something contiguous.
        plus: [..., out], contiguous; nothing is added without it.

    Returns: [..., out].
    """
    if x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel() and _available():
        return _onednn(x, weight) if plus is None else _onednn_plus(x, weight, plus)
    product = x @ weight.T
    return product if plus is None else product.add_(plus)


class _FrozenLinear(torch.autograd.Function):
    """x Wᵀ for a frozen W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return times_transposed(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return times_transposed(gradients[0].contiguous(), weight.T), None


def accelerate(model: nn.Module) -> None:
    """Send the products of a model's plain linear layers this way, wherever their weights are not being trained."""
    for module in model.modules():
        if is_plain_linear(module):
            replace_forward(module, _linear)


def is_plain_linear(module: Any) -> bool:
    """Whether a layer is torch's own linear layer (not a quantised or adapted one), without a bias."""
    return type(module) is nn.Linear and cast("Any", module).bias is None


def replace_forward(module: Any, forward: Callable[..., Tensor]) -> None:
    """Make `forward(module, …)` what the module computes."""
    module.forward = partial(forward, module)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    weight = layer.weight
    fits = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if not fits or (weight.requires_grad and torch.is_grad_enabled()):
        return F.linear(x, weight)
    result: Any = _FrozenLinear.apply(x, weight)
    return result


def lora_gradients(
    gradient: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, weight: Callable[[], Tensor] | None
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of x (W + s·BA)ᵀ by x, A and B; those of A and B need only products with r rows.

    Args:
        gradient: of the result, [..., out].
        x: [..., in].
        a, b: [r, in] and [out, r].
        weight: gives W + s·BA, [out, in]; None where x needs no gradient.
    """
    rows, of_rows = x.flatten(0, -2), gradient.flatten(0, -2)
    of_x = None if weight is None else times_transposed(of_rows.contiguous(), weight().T).view_as(x)
    of_a = ((of_rows @ b).T @ rows).mul_(scale)
    of_b = (of_rows.T @ (rows @ a.T)).mul_(scale)
    return of_x, of_a, of_b
