"""Full fine-tuning trains every weight, as plain transformers would, with weights and gradients in float32."""

from __future__ import annotations

import torch

from corral.model.full_finetuning import train_all_weights
from corral.model.packed_forward import target_logprobs
from tests.conftest import make_tiny_model
from tests.model.tiny import IDS, assert_gradients_equal, gradients, loss_and_gradients


def test_every_weight_of_a_whole_model_is_trained_and_tied_ones_are_one() -> None:
    model = train_all_weights(make_tiny_model(300, tie_word_embeddings=True).requires_grad_(False), torch.float32)
    _, expected = loss_and_gradients(make_tiny_model(300, tie_word_embeddings=True))
    assert "lm_head.weight" not in expected
    _, actual = loss_and_gradients(model)
    assert_gradients_equal(actual, expected)


def test_a_whole_model_in_bfloat16_keeps_its_weights_and_gradients_in_float32() -> None:
    def trained(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        model = train_all_weights(make_tiny_model(300, initializer_range=0.05), dtype)
        (logprobs,) = target_logprobs(model, [IDS[0].tolist()], [range(1, 40)])
        (-logprobs.sum()).backward()
        return gradients(model)

    exact, rounded = trained(torch.float32), trained(torch.bfloat16)
    assert rounded.keys() == exact.keys()
    for name, gradient in exact.items():
        assert rounded[name].dtype == torch.float32
        gap = ((rounded[name] - gradient).norm() / gradient.norm()).item()
        assert 0 < gap < 0.05, name
