"""Matrix products on a CPU through oneDNN.

On x86, torch sends float32 products to MKL, which does not use the AVX-512 units of AMD processors. oneDNN, which torch also
ships, does: 440 against 200 GFLOP/s measured on two Zen 5 cores, and no slower on other processors. Products on GPUs, in other
dtypes and on other processors go through torch as usual.
"""

from __future__ import annotations

import platform
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def _onednn_available() -> bool:
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    try:
        # The operator is private to torch, so check its result before relying on it.
        x, weight = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3)
        plus = torch.ones(2, 4)
        product = x @ weight.T
        return torch.equal(_onednn(x, weight), product) and torch.equal(_onednn_plus(x, weight, plus), product + plus)
    except (RuntimeError, AttributeError, TypeError):
        return False


def padding_rows(rows: int, multiple: int) -> int:
    """Number of rows to add to a product so that their count is a multiple of `multiple`; 0 without oneDNN.

    oneDNN compiles a program for each number of rows (about 0.6 MB and 1 ms) and keeps it, so there should be few numbers.
    """
    return -rows % multiple if _onednn_available() else 0


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    product: Any = torch.ops.mkldnn._linear_pointwise  # pyright: ignore[reportPrivateUsage]
    return product(x, weight, None, "none", [], "")


def _onednn_plus(x: Tensor, weight: Tensor, plus: Tensor) -> Tensor:
    product: Any = torch.ops.mkldnn._linear_pointwise.binary  # pyright: ignore[reportPrivateUsage]
    return product(x, plus, weight, None, "add")


def times_transposed(x: Tensor, weight: Tensor, plus: Tensor | None = None) -> Tensor:
    """x weightᵀ + plus. Not differentiable on the oneDNN path: use it under no_grad and inside autograd functions.

    Args:
        x: [..., in].
        weight: [out, in], contiguous or the transpose of a contiguous tensor.
        plus: [..., out], contiguous, or None.

    Returns: [..., out].
    """
    if x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel() and _onednn_available():
        return _onednn(x, weight) if plus is None else _onednn_plus(x, weight, plus)
    product = x @ weight.T
    return product if plus is None else product.add_(plus)
