"""`torch.compile` for functions over packs: whether it works on this machine, and one program for all lengths.

`TORCH_COMPILE_DISABLE=1` is torch's own way to switch compilation off.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def can_compile(device: int | None) -> bool:
    """Whether `torch.compile` works for that GPU on this machine; warns once if it does not."""
    if device is None:
        return False

    def probe(x: Tensor) -> Tensor:
        return x * 2 + 1

    try:
        result: Any = torch.compile(probe)(torch.ones(64, device=torch.device("cuda", device)))
        return bool(result.sum().item() == 192)
    except Exception as error:  # of torch, triton, a missing C compiler
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(f"torch.compile does not work here, so layers run slower, uncompiled: {reason}", stacklevel=2)
        return False


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled on its first call."""
    return torch.compile(function)


def of_any_length(rows: Tensor) -> Tensor:
    """`rows`, marked so that the program compiled for it serves tensors of any length."""
    torch._dynamo.maybe_mark_dynamic(rows, 0)  # pyright: ignore[reportPrivateUsage]
    return rows
