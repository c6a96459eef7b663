"""Optimizers and learning-rate schedules by their recipe names."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from corral.errors import require

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer as TorchOptimizer

    from corral.recipe import Optimizer


def build_optimizer(parameters: Iterable[nn.Parameter], config: Optimizer) -> TorchOptimizer:
    """AdamW over the parameters. Raises: MissingExtraError (8-bit and paged kinds need bitsandbytes)."""
    parameters = list(parameters)
    settings: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.kind == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **settings)
    optim = require("bitsandbytes", "quant").optim
    classes = {
        "adamw_8bit": optim.AdamW8bit,
        "paged_adamw_8bit": optim.PagedAdamW8bit,
        "paged_adamw_32bit": optim.PagedAdamW32bit,
    }
    warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")  # `unsupported` says so
    return classes[config.kind](parameters, **settings)


def unsupported(config: Optimizer, device: str) -> str | None:
    """A message if the device does not support what the optimizer's name promises, else None."""
    if config.kind.startswith("paged") and not device.startswith("cuda"):
        return f"{config.kind}: there is no GPU whose memory could run short, so nothing is paged"
    return None


def learning_rate(config: Optimizer, step: int, total: int) -> float:
    """The rate of one step.

    Args:
        step: from 1 to `total`. Warm-up rises linearly from the first step, even where it is longer than `total`; no step
            has a rate of 0.
    """
    ratio = 0.03 if config.warmup_ratio is None else config.warmup_ratio
    warmup = math.ceil(ratio * total) if config.warmup_steps is None else config.warmup_steps
    if step <= warmup:
        return config.lr * step / (warmup + 1)
    if config.schedule == "constant":
        return config.lr
    progress = (step - 1 - warmup) / max(1, total - warmup)
    return config.lr * (1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))
