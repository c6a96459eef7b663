"""Attention for GPUs, run on a CPU: each sequence gets what it gets alone, and torch's kernel is called as it wants to be."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from corral.model.compute import gpu_attention


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
