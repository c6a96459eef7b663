"""Full fine-tuning trains every weight, as plain transformers would, with weights and gradients in float32."""

from __future__ import annotations

from typing import Any

import torch

from corral.model.full_finetuning import train_all_weights
from tests.conftest import make_tiny_model

IDS = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def test_of_a_whole_model_every_weight_is_trained_and_tied_ones_are_one() -> None:
    model = train_all_weights(make_tiny_model(300, tie_word_embeddings=True).requires_grad_(False), torch.float32)
    plain = make_tiny_model(300, tie_word_embeddings=True)
    expected = gradients(plain)
    assert "lm_head.weight" not in expected
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=2e-5 * gradient.abs().max().item())


def test_a_whole_model_in_bfloat16_keeps_its_weights_and_gradients_in_float32() -> None:
    from corral.model.packed_forward import target_logprobs

    def trained(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        model = train_all_weights(make_tiny_model(300, initializer_range=0.05), dtype)
        (logprobs,) = target_logprobs(model, [IDS[0].tolist()], [range(1, 40)])
        (-logprobs.sum()).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    exact, rounded = trained(torch.float32), trained(torch.bfloat16)
    assert rounded.keys() == exact.keys()
    for name, gradient in exact.items():
        assert rounded[name].dtype == torch.float32
        gap = ((rounded[name] - gradient).norm() / gradient.norm()).item()
        assert 0 < gap < 0.05, name
