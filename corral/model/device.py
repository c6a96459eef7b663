"""Device and dtype for this machine: what `auto` in a recipe means, and why it is not the GPU."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from corral.errors import ModelError
from corral.system import MemoryLimit, cpu_memory

if TYPE_CHECKING:
    from corral.model.loading import DType

_DRIVER = Path("/proc/driver/nvidia/version")
_NO_GPU = ("no nvidia driver", "not compiled with cuda")


@dataclass(frozen=True, slots=True)
class Placement:
    """Where to compute.

    Args:
        device: as torch names it.
        dtype: in which to compute.
        notes: what is not as the machine or the recipe would suggest, each with its reason.
    """

    device: str
    dtype: DType
    notes: tuple[str, ...] = ()


def choose_device(
    device: Literal["auto", "cpu", "cuda"] = "auto", dtype: DType | Literal["auto"] = "auto"
) -> Placement:
    """`auto` is the first GPU, else the CPU; and bfloat16 on a GPU that computes in it, else float16; float32 on a CPU.

    Raises:
        ModelError: `device` is "cuda", and there is no GPU that torch can use.
    """
    notes: list[str] = []
    if device != "cpu":
        fault = _cuda_fault()
        if device == "cuda" and fault is not None:
            raise ModelError(
                f"there is no GPU that torch can use: {fault}", where="model.device", hint='set it to "auto" or "cpu"'
            )
        if fault is not None and (note := _unused_gpu(fault)):
            notes.append(f"{note}; the CPU computes")
        device = "cuda" if fault is None else "cpu"
    if device == "cpu":
        # bfloat16 works on most CPUs, but is several times slower than float32 on those that emulate it.
        return Placement(device, "float32" if dtype == "auto" else dtype, tuple(notes))
    import torch

    # torch counts emulation as support unless it is told otherwise: a T4 would compute in bfloat16, many times slower.
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "auto":
        dtype = "bfloat16" if has_bfloat16 else "float16"
    elif dtype == "bfloat16" and not has_bfloat16:
        notes.append('this GPU only emulates bfloat16, slowly: model.dtype = "auto" or "float16" is faster')
    return Placement(device, dtype, tuple(notes))


def memory_limit(device: str) -> MemoryLimit | None:
    """Memory of a device that this process can still have; None if the system does not say."""
    if not device.startswith("cuda"):
        return cpu_memory()
    import torch

    free, total = torch.cuda.mem_get_info(device)
    # torch keeps what an earlier stage has freed; the system counts it as used.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return MemoryLimit(free, total, torch.cuda.get_device_name(device))


def _cuda_fault() -> str | None:
    """Why torch cannot use a GPU; None if it can."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError, torch.cuda.DeferredCudaCallError) as error:
        return (str(error).strip() or type(error).__name__).partition("\n")[0]
    return None


def _unused_gpu(fault: str) -> str | None:
    """A message if this machine seems to have a GPU all the same, which nobody has hidden."""
    import torch

    if torch.backends.mps.is_available():
        return "the GPU of this Mac is not used: corral computes on NVIDIA GPUs and CPUs only"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    if any(words in fault.lower() for words in _NO_GPU) and not _DRIVER.exists():
        return None
    return f"the GPU cannot be used: {fault}"
