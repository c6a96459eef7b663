"""Where to compute and in what numbers: a recipe's `auto` resolved on this machine. Knows nothing about models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from corral.errors import ModelError

if TYPE_CHECKING:
    from corral.model.loading import DType

# A GPU wants long passes to be busy; a CPU is as fast with short ones, which need less memory.
_PACK_LENGTHS = {"cuda": 8192, "cpu": 512}


def pack_length(asked: int | None, longest: int, device: str) -> int:
    """Most tokens of one forward pass in training.

    Args:
        asked: by the recipe, if it does.
        longest: most tokens of an example.
        device: as torch names it.
    """
    return asked or max(_PACK_LENGTHS[device.partition(":")[0]], longest)


def choose_device(
    device: Literal["auto", "cpu", "cuda"] = "auto", dtype: DType | Literal["auto"] = "auto"
) -> tuple[str, DType]:
    """(device, dtype). `auto` is the first GPU, else the CPU; and bfloat16 on a GPU that has it, float32 on a CPU.

    Raises:
        ModelError: a GPU is asked for, and there is none.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("there is no GPU that torch can use", where="model.device", hint='set it to "auto" or "cpu"')
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        # bfloat16 works on most CPUs, and is several times slower there than float32 where the processor only emulates it.
        dtype = "float32" if device == "cpu" else "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    return device, dtype
