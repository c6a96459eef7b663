"""Attention for GPUs, run on a CPU: each sequence gets what it gets alone, and torch's kernel is called as it wants to be."""

from __future__ import annotations

import sys
from collections.abc import Generator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from corral.model import packed_forward
from corral.model.compute import gpu_attention
from tests.conftest import make_tiny_model
from tests.model.compute.gpu_stubs import use_kernel, varlen_attn

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _forget_kernels() -> Generator[None]:  # pyright: ignore[reportUnusedFunction]
    yield
    gpu_attention.choose_kernel.cache_clear()


def pack(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q = torch.randn(18, 4, 8)
    k, v = (torch.randn(18, 2, 8) for _ in range(2))
    return q.to(dtype), k.to(dtype), v.to(dtype)


LENGTHS = (5, 1, 12)
ENDS = torch.tensor([0, 5, 6, 18], dtype=torch.int32)


def attend(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return gpu_attention.attend(*pack(dtype), 0.3, LENGTHS, ENDS)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_attention_without_the_kernel_is_that_of_each_sequence_alone(key_heads: int) -> None:
    torch.manual_seed(0)
    lengths = (5, 1, 12)
    q = torch.randn(18, 4, 8, requires_grad=True)
    k, v = (torch.randn(18, key_heads, 8, requires_grad=True) for _ in range(2))
    actual = gpu_attention.attend(q, k, v, 0.3, lengths, torch.tensor([0, 5, 6, 18], dtype=torch.int32))
    mask = torch.block_diag(*(torch.ones(n, n) for n in lengths)).tril().bool()
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(4 // key_heads, 1)) * 0.3
    shares = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    expected = torch.einsum("hqk,khd->qhd", shares, v.repeat_interleave(4 // key_heads, 1))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(actual)
    ours = torch.autograd.grad((actual * weights).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("names_groups", [False, True])
def test_the_kernel_is_called_as_each_torch_has_it(names_groups: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11 takes grouped heads without a word, 2.13 wants to be told."""
    calls: list[dict[str, Any]] = []

    def newer(q: Tensor, *_: Any, scale: float, window_size: Any, enable_gqa: bool = False) -> Tensor:
        calls.append({"scale": scale, "window_size": window_size, "enable_gqa": enable_gqa})
        return q

    def older(q: Tensor, *_: Any, scale: float, window_size: Any) -> Tensor:
        calls.append({"scale": scale, "window_size": window_size})
        return q

    stand_in: Any = ModuleType("varlen")
    stand_in.varlen_attn = newer if names_groups else older
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", stand_in)
    q, k = torch.ones(6, 4, 8), torch.ones(6, 2, 8)
    gpu_attention._variable_length(q, k, k, 0.5, 6, torch.tensor([0, 6], dtype=torch.int32))  # pyright: ignore[reportPrivateUsage]
    assert calls == [{"scale": 0.5, "window_size": (-1, 0)} | ({"enable_gqa": True} if names_groups else {})]


def test_the_kernel_of_this_torch_takes_what_it_is_given() -> None:
    """Its shapes and arguments, on a device without values."""
    q = torch.empty(18, 4, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.empty(18, 2, 64, device="meta", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    ends = torch.empty(4, device="meta", dtype=torch.int32)
    out = gpu_attention._variable_length(q, k, v, 0.3, 12, ends)  # pyright: ignore[reportPrivateUsage]
    assert out.shape == q.shape
    gradients = torch.autograd.grad(out.float().sum(), (q, k, v))
    assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_from_ampere_on_one_call_of_the_kernel_serves_a_pack(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = attend(dtype)
    calls = use_kernel(monkeypatch, capability)
    assert gpu_attention.choose_kernel(CPU, dtype, 8) == ("grouped", None)
    tried = len(calls)
    assert tried == 1, "on two short sequences"
    torch.testing.assert_close(attend(dtype), expected)
    attend(dtype)
    assert calls[tried:] == [(18, 2, 8)] * 2, "with grouped heads as they are, and tried no more"
    assert not caplog.messages


def test_before_ampere_attention_runs_sequence_by_sequence_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = attend(torch.float16)
    calls = use_kernel(monkeypatch, (7, 5))
    torch.testing.assert_close(attend(torch.float16), expected)
    attend(torch.float16)
    assert not calls
    (message,) = caplog.messages
    assert "sequence by sequence" in message
    assert "needs compute capability 8.0 (Ampere), and this GPU has 7.5" in message


def test_float32_on_a_gpu_says_that_the_kernel_does_not_take_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use_kernel(monkeypatch, (9, 0))
    attend(torch.float32)
    assert [m for m in caplog.messages if "does not take float32" in m]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_kernel_first_asked_for_without_gradients_is_there_for_training(
    mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = use_kernel(monkeypatch, (9, 0))
    with mode():
        attend()
    assert len(calls) == 2
    q, k, v = (t.requires_grad_() for t in pack(torch.bfloat16))
    gradients = torch.autograd.grad(gpu_attention.attend(q, k, v, 0.3, LENGTHS, ENDS).float().sum(), (q, k, v))
    assert len(calls) == 3
    assert all(g.abs().sum() > 0 for g in gradients)


def test_a_kernel_that_fails_or_computes_something_else_is_not_used_and_the_reason_is_given(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("no kernel image is available\nfor execution")

    def not_causal(query: Tensor, key: Tensor, value: Tensor, *args: Any, **settings: Any) -> Tensor:
        return varlen_attn(query, key, value.flip(0), *args, **settings)

    def no_groups(*args: Any, enable_gqa: bool, **settings: Any) -> Tensor:
        return varlen_attn(*args, **settings)

    expected = attend()
    for kernel, use, reason in (
        (broken, None, "RuntimeError: no kernel image is available"),
        (not_causal, None, "its results differ"),
        (no_groups, "repeated", "ValueError: enable_gqa must be set"),
    ):
        caplog.clear()
        use_kernel(monkeypatch, (9, 0), kernel)
        torch.testing.assert_close(attend(), expected)
        assert gpu_attention.choose_kernel(CPU, torch.bfloat16, 8)[0] == use
        (message,) = caplog.messages
        assert message.endswith(reason) or f"{reason} from" in message


def test_the_fallbacks_of_a_model_are_listed_for_the_record() -> None:
    model = make_tiny_model(300)
    assert packed_forward.fallbacks(model) == [], "a CPU has its own way"
    on_meta = make_tiny_model(300).to("meta")
    attention, layers = packed_forward.fallbacks(on_meta)
    assert "variable-length kernel" in attention
    assert "compiled" in layers
