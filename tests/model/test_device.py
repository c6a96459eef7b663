"""Where a recipe computes, on machines with GPUs of several generations, with none, and with one that does not work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from corral.engines.transformers import default_cache_bytes
from corral.errors import ModelError
from corral.model import device
from corral.model.device import Placement, choose_device, memory_limit
from corral.system import MemoryLimit
from tests.model.compute.gpu_stubs import show_gpu


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Let CUDA refuse to start with a message, on a machine without the driver's files unless they are made."""

    def refuse(message: str, *, driver: bool = False) -> None:
        def init() -> None:
            raise RuntimeError(message)

        if driver:
            (tmp_path / "version").touch()
        monkeypatch.setattr(torch.cuda, "init", init)

    monkeypatch.setattr(device, "_DRIVER", tmp_path / "version")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return refuse


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), "float16"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16"), ((12, 0), "bfloat16")]
)
def test_a_gpu_computes_in_bfloat16_if_it_does_not_emulate_it(
    capability: tuple[int, int], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    show_gpu(monkeypatch, capability)
    assert torch.cuda.is_bf16_supported(), "torch counts emulation"
    for setting in ("auto", "cuda"):
        assert choose_device(setting) == Placement("cuda", dtype)  # pyright: ignore[reportArgumentType]
    assert choose_device("cpu") == Placement("cpu", "float32")


def test_bfloat16_that_is_asked_for_and_emulated_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    show_gpu(monkeypatch, (7, 5))
    placement = choose_device("auto", "bfloat16")
    assert placement.dtype == "bfloat16"
    assert "only emulates bfloat16" in placement.notes[0]
    assert choose_device("auto", "float16").notes == ()
    show_gpu(monkeypatch, (8, 0))
    assert choose_device("auto", "bfloat16").notes == ()


def test_a_gpu_that_does_not_start_is_said_with_its_reason(broken: Any) -> None:
    broken("The NVIDIA driver on your system is too old (found version 11040).\nPlease update", driver=True)
    placement = choose_device()
    assert (placement.device, placement.dtype) == ("cpu", "float32")
    assert placement.notes == (
        "the GPU cannot be used: The NVIDIA driver on your system is too old (found version 11040).; the CPU computes",
    )
    with pytest.raises(ModelError, match="driver on your system is too old") as refused:
        choose_device("cuda")
    assert refused.value.where == "model.device"


def test_a_torch_without_cuda_is_said_only_where_there_is_a_driver(broken: Any) -> None:
    broken("Torch not compiled with CUDA enabled")
    assert choose_device() == Placement("cpu", "float32")
    broken("Torch not compiled with CUDA enabled", driver=True)
    assert "not compiled with CUDA" in choose_device().notes[0]


def test_a_gpu_that_the_user_hides_or_does_not_want_is_not_mentioned(
    broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken("No CUDA GPUs are available", driver=True)
    assert choose_device().notes
    assert choose_device("cpu").notes == ()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choose_device().notes == ()


def test_apples_gpu_is_not_used_and_that_is_said(broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    broken("Torch not compiled with CUDA enabled")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    placement = choose_device()
    assert (placement.device, placement.dtype) == ("cpu", "float32")
    assert "GPU of this Mac is not used" in placement.notes[0]


def test_this_machine_has_no_gpu_or_one_that_works() -> None:
    placement = choose_device()
    assert placement.notes == ()
    assert (placement.device == "cuda") == torch.cuda.is_available()


def test_memory_that_torch_holds_for_later_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (20, 139))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 110)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 10)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    assert memory_limit("cuda") == MemoryLimit(120, 139, "a GPU")
    assert default_cache_bytes(torch.device("cuda")) == 60
