"""What runs on a GPU, held to its meaning on a CPU by sending tiny models the same way; `test_packed_gpu` runs it there."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from corral.model import gpu_layers, packed_forward
from corral.model.cpu_fused import fuse
from corral.model.cpu_gemm import replace_forward
from tests.conftest import make_tiny_model

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def rows(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 300, (n,), generator=generator).tolist() for n in lengths]


def adapted(targets: Sequence[str], dtype: torch.dtype = torch.float32) -> Any:
    model = make_tiny_model(300).to(dtype)
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), init_lora_weights=False))


def losses_and_gradients(model: Any, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    losses = torch.cat(packed_forward.target_logprobs(model, sequences, [range(1, len(s)) for s in sequences]))
    losses.mean().backward()
    return losses.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative difference of a gradient, as a whole."""
    assert found.keys() == expected.keys()
    return max(((found[n] - e).norm() / e.norm()).item() for n, e in expected.items())


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Packs on the CPU take the way of those on a GPU; in place of generated kernels the traced operations run one by one.
    Returns: the graphs that were compiled."""
    from torch._dynamo.backends.debugging import aot_eager

    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any, **settings: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs, **settings)

    made: dict[Any, Any] = {}
    torch.compiler.reset()
    monkeypatch.setattr(gpu_layers, "ends_of", lambda lengths, _: torch.tensor([0, *lengths]).cumsum(0).to(torch.int32))  # pyright: ignore[reportUnknownLambdaType]
    monkeypatch.setattr(gpu_layers, "compiles", lambda _: True)  # pyright: ignore[reportUnknownLambdaType]
    monkeypatch.setattr(
        gpu_layers,
        "_compiled",
        lambda f: made.setdefault(f, torch.compile(f, backend=backend, fullgraph=True)),  # pyright: ignore[reportUnknownLambdaType]
    )
    return graphs


@pytest.mark.parametrize("targets", [ALL[:4], ALL])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_layer_computes_what_transformers_and_peft_do(
    targets: list[str], checkpointing: bool, compilations: list[Any]
) -> None:
    plain, fused = adapted(targets).train(), adapted(targets).train()
    fuse(fused)
    if checkpointing:
        fused.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    sequences = rows(7, 31, 2, 60)
    expected = losses_and_gradients(plain, sequences)
    assert not compilations
    found = losses_and_gradients(fused, sequences)
    assert compilations
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=2e-5)
    assert distance(found[1], expected[1]) < 1e-4


def test_one_program_serves_all_layers_and_lengths(compilations: list[Any]) -> None:
    model = adapted(ALL[:4]).train()
    fuse(model)
    losses_and_gradients(model, rows(7, 31, 2, 60))
    after_one = len(compilations)
    for lengths in ((9, 30), (100,), (3, 4, 5, 6, 90), (17, 20)):
        losses_and_gradients(model, rows(*lengths))
    # Two functions; the first layer's input, which needs no gradient, makes its own of each.
    assert len(compilations) == after_one == 4


def test_an_adapter_that_is_switched_off_is_off_in_compiled_layers(compilations: list[Any]) -> None:
    model = adapted(ALL)
    fuse(model)
    sequences = rows(7, 31)
    base = packed_forward.score(make_tiny_model(300), sequences, [1, 1])
    on = packed_forward.score(model, sequences, [1, 1])
    with model.disable_adapter():
        off = packed_forward.score(model, sequences, [1, 1])
    assert off[1] == pytest.approx(base[1], abs=2e-5)
    assert max(abs(a - b) for a, b in zip(on[1], base[1], strict=True)) > 1e-2
    assert compilations


def test_a_part_with_a_hook_is_called(compilations: list[Any]) -> None:
    model = adapted(ALL[:4])
    fuse(model)
    seen: list[int] = []
    for layer in model.get_base_model().model.layers:
        layer.mlp.register_forward_hook(lambda *_: seen.append(1))  # pyright: ignore[reportUnknownLambdaType]
    packed_forward.score(model, rows(5), [1])
    assert len(seen) == 2
    assert not compilations


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_attention_without_the_kernel_is_that_of_each_sequence_alone(key_heads: int) -> None:
    torch.manual_seed(0)
    lengths = (5, 1, 12)
    q = torch.randn(18, 4, 8, requires_grad=True)
    k, v = (torch.randn(18, key_heads, 8, requires_grad=True) for _ in range(2))
    found = gpu_layers.attend(q, k, v, 0.3, lengths, torch.tensor([0, 5, 6, 18], dtype=torch.int32))
    mask = torch.block_diag(*(torch.ones(n, n) for n in lengths)).tril().bool()
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(4 // key_heads, 1)) * 0.3
    shares = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    expected = torch.einsum("hqk,khd->qhd", shares, v.repeat_interleave(4 // key_heads, 1))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(found)
    ours = torch.autograd.grad((found * weights).sum(), (q, k, v))
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
    gpu_layers._variable_length(q, k, k, 0.5, 6, torch.tensor([0, 6], dtype=torch.int32))  # pyright: ignore[reportPrivateUsage]
    assert calls == [{"scale": 0.5, "window_size": (-1, 0)} | ({"enable_gqa": True} if names_groups else {})]


def test_the_kernel_of_this_torch_takes_what_it_is_given() -> None:
    """Its shapes and arguments, on a device without values."""
    q = torch.empty(18, 4, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.empty(18, 2, 64, device="meta", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    ends = torch.empty(4, device="meta", dtype=torch.int32)
    out = gpu_layers._variable_length(q, k, v, 0.3, 12, ends)  # pyright: ignore[reportPrivateUsage]
    assert out.shape == q.shape
    gradients = torch.autograd.grad(out.float().sum(), (q, k, v))
    assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]


def layer_pair(dtype: torch.dtype) -> tuple[Any, Any]:
    """The same LoRA layer with PEFT's forward, and with ours for low precision."""
    made: list[Any] = []
    for _ in range(2):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(96, 64, bias=False, dtype=dtype))
        model: Any = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["0"], init_lora_weights=False))  # pyright: ignore[reportArgumentType]
        made.append(model.base_model.model[0])
    replace_forward(made[1], gpu_layers.lora_forward)
    return made[0], made[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lora_in_low_precision_is_pefts_to_rounding_and_its_gradients_are_float32(dtype: torch.dtype) -> None:
    step = torch.finfo(dtype).eps
    plain, ours = layer_pair(dtype)
    x = torch.randn(2, 50, 96).to(dtype)
    weights = torch.randn(2, 50, 64)
    found: list[list[Tensor]] = []
    for layer in (plain, ours):
        inputs = x.clone().requires_grad_()
        out = layer(inputs)
        assert out.dtype == dtype
        (out.float() * weights).sum().backward()
        gradients = [layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad]
        assert all(g.dtype == torch.float32 for g in gradients)
        assert inputs.grad is not None
        found.append([out, inputs.grad, *gradients])
    for one, other in zip(*found, strict=True):
        one, other = one.float(), other.float()
        assert ((one - other).norm() / other.norm()).item() < 2 * step


def test_lora_in_low_precision_keeps_its_input_and_the_inner_product_only() -> None:
    _, ours = layer_pair(torch.bfloat16)
    x = torch.randn(50, 96, dtype=torch.bfloat16, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):  # pyright: ignore[reportUnknownLambdaType]
        ours(x)
    assert sorted(tuple(t.shape) for t in kept if not isinstance(t, nn.Parameter)) == [(50, 8), (50, 96)]


def test_an_update_smaller_than_the_rounding_of_a_weight_is_not_lost() -> None:
    """All elements of s·BA are less than half a rounding step of W's, but they add up along x."""
    torch.manual_seed(0)
    weight = (torch.randint(0, 2, (64, 1024)) * 2.0 - 1).to(torch.bfloat16)
    a = torch.ones(1, 1024)
    b = torch.full((64, 1), 2.0**-10)
    x = torch.ones(4, 1024, dtype=torch.bfloat16)
    merged = (weight.float() + b @ a).to(torch.bfloat16)
    assert torch.equal(merged, weight)
    change = gpu_layers.lora(x, weight, a, b, 1.0).float() - F.linear(x, weight).float()
    torch.testing.assert_close(change, torch.ones(4, 64), rtol=0, atol=0.25)  # 1024 · 2⁻¹⁰; outputs are some ±32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_in_low_precision_are_transformers_to_one_rounding(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(0)
    norm: Any = LlamaRMSNorm(64, eps=1e-5).to(dtype)
    norm.weight.data.normal_(1, 0.2)
    x = torch.randn(40, 64).to(dtype)
    expected = norm(x).float()
    for found in (
        F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon),
        gpu_layers._norm(x, norm.weight, norm.variance_epsilon),  # pyright: ignore[reportPrivateUsage]
    ):
        assert found.dtype == dtype
        assert ((found.float() - expected).abs() <= 2 * torch.finfo(dtype).eps * expected.abs()).all()


@pytest.mark.parametrize("chunk", [1, 7, 50, 10**6])
@pytest.mark.parametrize("train_head", [True, False])
def test_the_head_in_chunks_of_rows_equals_log_softmax(
    chunk: int, train_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_layers, "_LOGITS", 300 * chunk)
    torch.manual_seed(0)
    hidden = torch.randn(50, 64, requires_grad=True)
    weight = torch.randn(300, 64, requires_grad=train_head)
    targets, share = torch.randint(0, 300, (50,)), torch.randn(50)
    found = gpu_layers.token_logprobs(hidden, weight, targets)
    plain = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    inputs = (hidden, weight) if train_head else (hidden,)
    ours = torch.autograd.grad((found * share).sum(), inputs)
    theirs = torch.autograd.grad((plain * share).sum(), inputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_machine_on_which_nothing_compiles_says_so_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no triton\nand a long trace")

    monkeypatch.setattr(torch, "compile", refuse)
    gpu_layers.compiles.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"uncompiled: no triton$"):
            assert not gpu_layers.compiles(0)
    finally:
        gpu_layers.compiles.cache_clear()


def test_layers_that_are_not_compiled_attend_the_same_way(
    compilations: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, fused = adapted(ALL[:4]), adapted(ALL[:4])
    fuse(fused)
    monkeypatch.setattr(gpu_layers, "compiles", lambda _: False)  # pyright: ignore[reportUnknownLambdaType]
    sequences = rows(7, 31, 2, 60)
    found, expected = losses_and_gradients(fused, sequences), losses_and_gradients(plain, sequences)
    assert not compilations
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=2e-5)
    assert distance(found[1], expected[1]) < 1e-4


def test_compiled_layers_in_bfloat16_are_as_near_to_float32_as_transformers_and_peft(compilations: list[Any]) -> None:
    sequences = rows(7, 31, 2, 60)
    exact = losses_and_gradients(adapted(ALL, torch.float32), sequences)
    fused = adapted(ALL, torch.bfloat16)
    fuse(fused)
    found = losses_and_gradients(fused, sequences)
    assert compilations
    plain = adapted(ALL, torch.bfloat16)
    theirs: list[Tensor] = []
    for s in sequences:
        logits = plain(input_ids=torch.tensor([s])).logits[0, :-1].float()
        theirs.append(logits.log_softmax(-1).gather(1, torch.tensor(s[1:])[:, None]).squeeze(1))
    torch.cat(theirs).mean().backward()
    gradients = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    assert all(g.dtype == torch.float32 for g in found[1].values())
    assert (found[0] - exact[0]).norm() < 1.5 * (torch.cat(theirs).detach() - exact[0]).norm()
    assert distance(found[1], exact[1]) < 1.5 * distance(gradients, exact[1])
