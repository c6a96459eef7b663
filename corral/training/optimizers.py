"""Optimizers and learning-rate schedules by their recipe names. Knows nothing about the loop that steps them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer as TorchOptimizer

    from corral.recipe import Optimizer


def build(parameters: Iterable[nn.Parameter], config: Optimizer) -> TorchOptimizer:
    """Fused AdamW over the parameters."""
    import torch

    return torch.optim.AdamW(list(parameters), lr=config.lr, weight_decay=config.weight_decay, fused=True)


def learning_rate(config: Optimizer, step: int, total: int) -> float:
    """The rate of one step.

    Args:
        step: from 1 to `total`. Warm-up rises in equal parts from the first step; the rate never is 0 while steps remain.
    """
    ratio = 0.03 if config.warmup_ratio is None else config.warmup_ratio
    warmup = math.ceil(ratio * total) if config.warmup_steps is None else config.warmup_steps
    if step <= warmup:
        return config.lr * step / (warmup + 1)
    if config.schedule == "constant":
        return config.lr
    done = (step - 1 - warmup) / max(1, total - warmup)
    return config.lr * (1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))
