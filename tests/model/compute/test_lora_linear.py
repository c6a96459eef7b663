"""Linear layers, with and without an adapter, equal those of torch and PEFT, forwards and backwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from corral.model.compute.lora_linear import LoraLinear, accelerate, read_lora_linear
from tests.conftest import make_tiny_model


def test_a_model_computes_the_same_with_frozen_weights_and_with_trained_ones() -> None:
    ids = torch.randint(0, 300, (2, 30), generator=torch.Generator().manual_seed(0))

    def run(fast: bool, frozen: bool) -> tuple[torch.Tensor, torch.Tensor]:
        model: Any = make_tiny_model(300)
        if fast:
            accelerate(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not frozen or "embed" in name)
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        return output.logits.detach(), model.get_input_embeddings().weight.grad

    for frozen in (True, False):
        for fast, plain in zip(run(True, frozen), run(False, frozen), strict=True):
            torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-4)


def test_trained_weights_get_their_gradients() -> None:
    model: Any = make_tiny_model(300)
    accelerate(model)
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def layer_pair(dtype: torch.dtype) -> tuple[Any, Any]:
    """The same LoRA layer with PEFT's forward, and with ours for low precision."""
    layers: list[Any] = []
    for _ in range(2):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(96, 64, bias=False, dtype=dtype))
        model: Any = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["0"], init_lora_weights=False))  # pyright: ignore[reportArgumentType]
        layers.append(model.base_model.model[0])
    linear = read_lora_linear(layers[1])
    assert linear is not None
    layers[1].forward = linear.branched
    return layers[0], layers[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lora_in_low_precision_is_pefts_to_rounding_and_its_gradients_are_float32(dtype: torch.dtype) -> None:
    step = torch.finfo(dtype).eps
    plain, ours = layer_pair(dtype)
    x = torch.randn(2, 50, 96).to(dtype)
    weights = torch.randn(2, 50, 64)
    actual: list[list[Tensor]] = []
    for layer in (plain, ours):
        inputs = x.clone().requires_grad_()
        out = layer(inputs)
        assert out.dtype == dtype
        (out.float() * weights).sum().backward()
        gradients = [layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad]
        assert all(g.dtype == torch.float32 for g in gradients)
        assert inputs.grad is not None
        actual.append([out, inputs.grad, *gradients])
    for one, other in zip(*actual, strict=True):
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
    layer = nn.Linear(1024, 64, bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    merged = (weight.float() + b @ a).to(torch.bfloat16)
    assert torch.equal(merged, weight)
    change = LoraLinear(layer, (a, b), 1.0).branched(x).float() - F.linear(x, weight).float()
    torch.testing.assert_close(change, torch.ones(4, 64), rtol=0, atol=0.25)  # 1024 · 2⁻¹⁰; outputs are some ±32
