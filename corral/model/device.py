"""Device, dtype and pack length for this machine: what `auto` in a recipe means."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from corral.errors import ModelError

if TYPE_CHECKING:
    from corral.model.loading import DType

# A GPU needs long passes to be busy; a CPU is as fast with short ones, which need less memory.
_PACK_LENGTHS = {"cuda": 8192, "cpu": 512}


def pack_length(configured: int | None, longest: int, device: str) -> int:
    """The most tokens of one forward pass in training.

    Args:
        configured: the recipe's value, if it has one.
        longest: tokens of the longest example.
        device: as torch names it.
    """
    return configured or max(_PACK_LENGTHS[device.partition(":")[0]], longest)


def choose_device(
    device: Literal["auto", "cpu", "cuda"] = "auto", dtype: DType | Literal["auto"] = "auto"
) -> tuple[str, DType]:
    """(device, dtype). `auto` is the first GPU, else the CPU; and bfloat16 on a GPU that has it, float32 on a CPU.

    Raises:
        ModelError: `device` is "cuda", and there is no GPU.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("there is no GPU that torch can use", where="model.device", hint='set it to "auto" or "cpu"')
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        # bfloat16 works on most CPUs, but is several times slower than float32 on those that emulate it.
        dtype = "float32" if device == "cpu" else "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    return device, dtype
