"""`torch.compile` for functions over packs: whether it works on this machine, and one program for all lengths.

`TORCH_COMPILE_DISABLE=1` is torch's own way to switch compilation off.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger(__name__)


@cache
def fault(device: torch.device) -> str | None:
    """Why `torch.compile` is not used for that device, None if it is; a GPU on which it does not work is logged, once."""
    if device.type != "cuda":
        return f"layers are compiled for NVIDIA GPUs only, not for {device.type!r}"

    def probe(x: Tensor) -> Tensor:
        return x * 2 + 1

    try:
        with torch.inference_mode(mode=False):
            result: Any = torch.compile(probe)(torch.ones(64, device=device))
        problem = None if result.sum().item() == 192 else "its results are wrong"
    except Exception as error:  # of torch, triton, a missing C compiler
        problem = str(error).strip().partition("\n")[0] or type(error).__name__
    if problem is None:
        return None
    message = f"torch.compile does not work here, so layers run slower, uncompiled: {problem}"
    _log.warning(message)
    return message


def can_compile(device: torch.device) -> bool:
    """Whether `torch.compile` works for that device on this machine."""
    return fault(device) is None


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled on its first call."""
    return torch.compile(function)


def of_any_length(rows: Tensor) -> Tensor:
    """`rows`, marked so that the program compiled for it serves tensors of any length."""
    torch._dynamo.maybe_mark_dynamic(rows, 0)  # pyright: ignore[reportPrivateUsage]
    return rows
