"""Optimizers and learning-rate schedules by their recipe names. Knows nothing about the loop that steps them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from corral.extras import require

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer as TorchOptimizer

    from corral.recipe import Optimizer


def build(parameters: Iterable[nn.Parameter], config: Optimizer) -> TorchOptimizer:
    """AdamW over the parameters. Raises: MissingExtraError (it is of bitsandbytes, which is not installed)."""
    import torch

    parameters = list(parameters)
    settings: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.kind == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **settings)
    optim = require("bitsandbytes", "quant").optim
    makers = {
        "adamw_8bit": optim.AdamW8bit,
        "paged_adamw_8bit": optim.PagedAdamW8bit,
        "paged_adamw_32bit": optim.PagedAdamW32bit,
    }
    warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")  # `shortfall` says it
    return makers[config.kind](parameters, **settings)


def shortfall(config: Optimizer, device: str) -> str | None:
    """What an optimizer does not do on a device that its name promises, if anything."""
    if config.kind.startswith("paged") and not device.startswith("cuda"):
        return f"{config.kind}: there is no GPU whose memory could run short, so nothing is paged"
    return None


def learning_rate(config: Optimizer, step: int, total: int) -> float:
    """The rate of one step.

    Args:
        step: from 1 to `total`. Warm-up rises in equal parts from the first step, also where it is longer than `total`; the
            rate never is 0 while steps remain.
    """
    ratio = 0.03 if config.warmup_ratio is None else config.warmup_ratio
    warmup = math.ceil(ratio * total) if config.warmup_steps is None else config.warmup_steps
    if step <= warmup:
        return config.lr * step / (warmup + 1)
    if config.schedule == "constant":
        return config.lr
    done = (step - 1 - warmup) / max(1, total - warmup)
    return config.lr * (1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))
