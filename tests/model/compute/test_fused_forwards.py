"""The fast path ≡ plain transformers + PEFT, forwards and backwards; what is not known to be equal is left alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from corral.model.compute.fused_forwards import fuse
from tests.conftest import make_tiny_model
from tests.model.tiny import (
    ALL_LINEAR,
    ATTENTION,
    IDS,
    assert_gradients_equal,
    layers_with_replaced_forwards,
    loss_and_gradients,
    with_adapter,
)


def fused(targets: Sequence[str], model: Any = None, **settings: Any) -> Any:
    adapted = with_adapter(targets, model, **settings)
    fuse(adapted)
    return adapted


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ATTENTION, ALL_LINEAR])
def test_losses_and_gradients_are_those_of_plain_peft(targets: list[str]) -> None:
    plain_loss, expected = loss_and_gradients(with_adapter(targets))
    fused_loss, gradients = loss_and_gradients(fused(targets))
    torch.testing.assert_close(fused_loss, plain_loss, rtol=1e-5, atol=1e-6)
    assert_gradients_equal(gradients, expected, atol=1e-5)


def test_the_adapter_can_still_be_switched_off_and_merged() -> None:
    base = make_tiny_model(300)(input_ids=IDS).logits
    model = fused(ALL_LINEAR)
    on = model(input_ids=IDS).logits
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=IDS).logits, base, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(on, base, atol=1e-2)
    torch.testing.assert_close(model.merge_and_unload()(input_ids=IDS).logits, on, rtol=1e-3, atol=1e-3)


def test_dropout_and_biases_keep_pefts_own_path() -> None:
    biased = make_tiny_model(300, attention_bias=True)
    assert layers_with_replaced_forwards(fused(ALL_LINEAR)) == set(ALL_LINEAR)
    assert layers_with_replaced_forwards(fused(ALL_LINEAR, lora_dropout=0.1)) == set()
    assert layers_with_replaced_forwards(fused(["q_proj", "gate_proj"], biased)) == {"gate_proj"}


def test_a_model_that_computes_in_bfloat16_keeps_transformers_norm() -> None:
    model = make_tiny_model(300).to(torch.bfloat16)
    fuse(model)
    assert "forward" not in model.model.norm.__dict__
