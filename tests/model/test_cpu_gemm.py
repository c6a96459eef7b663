"""Fast products ≡ plain products, forwards and backwards, whatever the shape; what must not change its way does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from corral.model import cpu_gemm
from tests.conftest import make_tiny_model


@pytest.mark.parametrize("rows", [(1,), (7,), (2, 3), (5, 0), (1, 64)])
@pytest.mark.parametrize("transposed", [True, False])
def test_products_equal_plain_ones(rows: tuple[int, ...], transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*rows, 48, generator=generator)
    weight = torch.randn(96, 48, generator=generator)
    if transposed:
        weight = weight.T.contiguous().T
    torch.testing.assert_close(cpu_gemm.times_transposed(x, weight), x @ weight.T, rtol=1e-5, atol=1e-5)


def test_a_model_computes_the_same_with_frozen_weights_and_with_trained_ones() -> None:
    ids = torch.randint(0, 300, (2, 30), generator=torch.Generator().manual_seed(0))

    def run(fast: bool, frozen: bool) -> tuple[torch.Tensor, torch.Tensor]:
        model: Any = make_tiny_model(300)
        if fast:
            cpu_gemm.accelerate(model)
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
    cpu_gemm.accelerate(model)
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
