"""Round weights to 8 and 4 bits (a matrix → small integers with scales), and back.

`int8` is symmetric, with one scale for each output row. `int4` is asymmetric, with a scale and a zero point for each 32
weights of a row: the round-to-nearest baseline of GPTQ (arXiv 2210.17323).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

GROUP = 32
"""Weights that share a scale in int4. Groups of 32 cost half a bit per weight more than groups of 128, but keep a model of
135M parameters usable, and 32 divides the width of every Llama."""

Floats: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Int8:
    """`values` int8 [rows, columns], `scales` float16 [rows, 1]."""

    values: NDArray[np.int8]
    scales: NDArray[np.float16]

    def dequantise(self) -> Floats:
        """The rounded weights, float32 [rows, columns]."""
        return self.values.astype(np.float32) * self.scales.astype(np.float32)


@dataclass(frozen=True, slots=True)
class Int4:
    """`values` uint8 in 0…15 [rows, groups, GROUP]; `zeros` uint8 in 0…15 and `scales` float16 [rows, groups, 1]."""

    values: NDArray[np.uint8]
    zeros: NDArray[np.uint8]
    scales: NDArray[np.float16]

    def dequantise(self) -> Floats:
        """The rounded weights, float32 [rows, columns]."""
        whole = (self.values.astype(np.float32) - self.zeros.astype(np.float32)) * self.scales.astype(np.float32)
        return whole.reshape(len(whole), -1)


def to_int8(weight: Floats) -> Int8:
    """Round a matrix [rows, columns] to int8."""
    scales = _scales(np.abs(weight).max(axis=1, keepdims=True) / 127)
    values = np.rint(weight / scales.astype(np.float32)).clip(-127, 127).astype(np.int8)
    return Int8(values, scales)


def to_int4(weight: Floats) -> Int4:
    """Round a matrix [rows, columns] to int4; the columns must be a multiple of GROUP."""
    groups = weight.reshape(len(weight), -1, GROUP)
    low = np.minimum(groups.min(axis=2, keepdims=True), 0)  # zero stays exactly zero
    high = np.maximum(groups.max(axis=2, keepdims=True), 0)
    scales = _scales((high - low) / 15)
    wide = scales.astype(np.float32)
    zeros = np.rint(-low / wide).clip(0, 15)
    values = (np.rint(groups / wide) + zeros).clip(0, 15)
    return Int4(values.astype(np.uint8), zeros.astype(np.uint8), scales)


def pack_int4(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two 4-bit numbers to a byte, the first in the low half; the last axis must be even, or there is one number a row.

    Returns: uint8, flat.
    """
    flat = values.reshape(-1)
    if len(flat) % 2:
        flat = np.append(flat, np.uint8(0))
    return (flat[0::2] | (flat[1::2] << 4)).astype(np.uint8)


def _scales(exact: Floats) -> NDArray[np.float16]:
    """float16 scales, at least the smallest normal float16: smaller ones lose precision."""
    tiny = float(np.finfo(np.float16).tiny)
    return np.maximum(exact, tiny).astype(np.float16)
