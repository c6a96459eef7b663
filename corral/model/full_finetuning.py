"""Full fine-tuning: every weight of a model is trained, in float32, computing in float32 or bfloat16."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from corral.model.compute.fused_forwards import fuse
from corral.model.compute.lora_linear import replace_forward


def train_all_weights(model: PreTrainedModel, compute: torch.dtype) -> PreTrainedModel:
    """Make every weight of a model trainable; tied weights are one.

    Weights and gradients stay in float32, as in bfloat16 an update smaller than 1/256 of a weight is lost.

    Args:
        model: in float32.
        compute: with bfloat16, layers compute with weights and activations rounded to it, the head in float32. With another
            dtype (float16 has too small a range), everything computes in float32.
    """
    model.requires_grad_(True)
    if compute == torch.bfloat16:
        _compute_in_bfloat16(model)
    else:
        fuse(model)
    return model


def _compute_in_bfloat16(model: PreTrainedModel) -> None:
    backbone: Any = model.base_model
    top_level = {id(child) for child in backbone.children()}
    for module in backbone.modules():
        if isinstance(module, nn.Linear):
            replace_forward(module, _rounded_linear)
        elif isinstance(module, nn.Embedding):
            replace_forward(module, _rounded_embedding)
        elif (
            next(module.parameters(recurse=False), None) is not None and id(module) not in top_level
        ):  # a norm in a layer
            replace_forward(module, _rounded_norm)


def _rounded_linear(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


def _rounded_embedding(embedding: Any, ids: torch.Tensor) -> torch.Tensor:
    return type(embedding).forward(embedding, ids).bfloat16()


def _rounded_norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return type(norm).forward(norm, x).to(x.dtype)
