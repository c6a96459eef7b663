"""Weights that bitsandbytes holds in NF4 or int8: which layers have them, and their values as floats."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def is_nf4(layer: Any) -> bool:
    """Whether a layer's weight is in NF4."""
    return _weight_class(layer) == "Params4bit"


def is_int8(layer: Any) -> bool:
    """Whether a layer's weight is in int8."""
    return _weight_class(layer) == "Int8Params"


def _weight_class(layer: Any) -> str:
    return type(getattr(layer, "weight", None)).__name__ if isinstance(layer, nn.Linear) else ""


def dequantise_weight(layer: Any) -> Tensor:
    """The weight of a quantised layer as floats, bit for bit as bitsandbytes restores it.

    Returns: [out, in]; NF4 in the dtype it was quantised from, int8 in float32. The caller may write to it.
    """
    if is_nf4(layer):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return dequantise_rows(*int8_codes(layer))


def int8_codes(layer: Any) -> tuple[Tensor, Tensor]:
    """(codes [out, in], the largest magnitude of each row [out]) of an int8 layer."""
    scales = layer.weight.SCB
    return layer.weight.data, layer.state.SCB if scales is None else scales


def dequantise_rows(codes: Tensor, scales: Tensor) -> Tensor:
    """int8 codes [out, any] and the largest magnitude of each row [out] → float32 values."""
    return codes.float().mul_(scales.unsqueeze(1).mul(1.0 / 127.0))
