"""GPUs that a plan can be made for, and how fast they train by their makers' figures.

Rates are those of data sheets: dense tensor-core rates, never the doubled ones for sparse weights. The share of that rate
that training reaches (MFU, at 4 FLOP per weight and token for an adapter, 6 for all weights) is taken from published runs:
Llama-3.1-8B LoRA on H100 at 40.6 % (NeMo AutoModel), Llama-3.2-3B LoRA on A100 at 34 % and in 4 bits at 33 % (torchtune).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from corral.training.memory_estimate import BYTES, ModelShape

if TYPE_CHECKING:
    from corral.model.loading import DType
    from corral.recipe import Train

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU to train on.

    Args:
        memory: bytes that a current driver leaves of the nominal size, as torch reports it.
        flops: FLOP/s of matrix products in 16 bits.
        flops32: the same in float32.
        bandwidth: bytes/s of its memory.
        mfu: the share of `flops` that training is assumed to reach.
        half: the 16-bit type it computes in.
        source: where the figures come from.
    """

    name: str
    memory: int
    flops: float
    flops32: float
    bandwidth: float
    mfu: float
    source: str
    half: DType = "bfloat16"

    def dtype(self, setting: str) -> DType:
        """The type that a recipe's `model.dtype` selects."""
        return self.half if setting == "auto" else cast("DType", setting)

    def tokens_per_second(self, shape: ModelShape, train: Train, trained: float, dtype: DType) -> float:
        """Training speed, without attention's own products and the optimizer.

        Args:
            trained: the share of tokens that the output layer computes logits for.
        """
        full, again = train.method == "full", train.gradient_checkpointing is True
        # Forward pass, gradient of the input, gradient of the weight; the forward pass twice with gradient checkpointing.
        passes = 2 + full + again
        products = 2 * passes * shape.layer_weights + (0 if full else 6 * shape.trained_weights(train))
        head = 2 * shape.vocabulary * shape.hidden * (3 if full else 2) * trained
        rate = self.flops if BYTES[dtype] == 2 else self.flops32
        if dtype == "bfloat16" and self.half != "bfloat16":
            rate = self.flops32  # emulated
        seconds = (products + head) / (rate * self.mfu)
        if train.quantization != "none" and isinstance(train.pack_length, int):
            # Weights are dequantised for each pass: read, and written in full.
            seconds += passes * shape.layer_weights * (1 + 2 * BYTES[dtype]) / self.bandwidth / train.pack_length
        return 1 / seconds


def _gpu(name: str, gib: float, tera: float, tera32: float, bandwidth: float, mfu: float, source: str) -> Gpu:
    half = "float16" if name == "T4" else "bfloat16"
    return Gpu(name, int(gib * _GIB), tera * 1e12, tera32 * 1e12, bandwidth * 1e9, mfu, source, half)


GPUS: Mapping[str, Gpu] = {
    "t4": _gpu("T4", 14.6, 65, 8.1, 320, 0.25, "NVIDIA T4 data sheet; MFU assumed, no published run"),
    "24g": _gpu("24 GB card", 23.5, 71, 35.6, 936, 0.35, "GeForce RTX 3090 (GA102 whitepaper); newer ones are faster"),
    "a100-80g": _gpu("A100 80 GB", 79.1, 312, 19.5, 2039, 0.34, "NVIDIA A100 SXM data sheet; MFU of torchtune's runs"),
    "h100": _gpu("H100", 79.1, 989, 67, 3350, 0.38, "NVIDIA H100 SXM data sheet; MFU below NeMo's 40.6 %"),
    "h200": _gpu("H200", 139.8, 989, 67, 4800, 0.38, "NVIDIA H200 SXM data sheet; MFU below NeMo's 40.6 % on H100"),
}
