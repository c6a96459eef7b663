"""The fast path ≡ plain transformers + PEFT, forwards and backwards; what is not known to be equal is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from corral.model.compute.fused_forwards import fuse
from tests.conftest import make_tiny_model

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))


def adapted(targets: list[str], *, fused: bool, dropout: float = 0.0, **changes: Any) -> Any:
    model = make_tiny_model(300, **changes)
    torch.manual_seed(1)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets, lora_dropout=dropout, init_lora_weights=False)
    made = get_peft_model(model, lora)
    if fused:
        fuse(made)
    return made


def loss_and_gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"], ALL])
def test_losses_and_gradients_are_those_of_plain_peft(targets: list[str]) -> None:
    plain_loss, plain = loss_and_gradients(adapted(targets, fused=False))
    fused_loss, fused = loss_and_gradients(adapted(targets, fused=True))
    torch.testing.assert_close(fused_loss, plain_loss, rtol=1e-5, atol=1e-6)
    assert fused.keys() == plain.keys()
    for name, expected in plain.items():
        torch.testing.assert_close(fused[name], expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item() + 1e-7)


def test_the_adapter_can_still_be_switched_off_and_merged() -> None:
    base = make_tiny_model(300)(input_ids=IDS).logits
    model = adapted(ALL, fused=True)
    on = model(input_ids=IDS).logits
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=IDS).logits, base, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(on, base, atol=1e-2)
    torch.testing.assert_close(model.merge_and_unload()(input_ids=IDS).logits, on, rtol=1e-3, atol=1e-3)


def test_dropout_and_biases_keep_pefts_own_path() -> None:
    def replaced(model: Any) -> set[str]:
        layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
        return {n.rpartition(".")[2] for n, m in layers.items() if "forward" in vars(m)}

    assert replaced(adapted(ALL, fused=True)) == set(ALL)
    assert replaced(adapted(ALL, fused=True, dropout=0.1)) == set()
    assert replaced(adapted(["q_proj", "gate_proj"], fused=True, attention_bias=True)) == {"gate_proj"}


def test_a_model_that_computes_in_bfloat16_keeps_transformers_norm() -> None:
    model = make_tiny_model(300).to(torch.bfloat16)
    fuse(model)
    assert "forward" not in model.model.norm.__dict__
