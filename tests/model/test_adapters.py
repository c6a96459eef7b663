"""Adapters are attached and scaled as the recipe says, and come back from disk as they were saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from corral.errors import ModelError
from corral.model import adapters
from corral.recipe import Lora
from tests.conftest import make_tiny_model

LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
IDS = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))


def attach(lora: Lora, **changes: Any) -> Any:
    return adapters.attach(make_tiny_model(300, **changes), lora, seed=3)


def stir(model: Any) -> Any:
    """Fresh adapters change nothing; these do."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("tied", [True, False])
def test_all_linear_is_every_linear_layer_but_the_output_layer(tied: bool) -> None:
    model = attach(Lora(targets="all-linear"), tie_word_embeddings=tied)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert {n.split(".lora_")[0].rpartition(".")[2] for n in trained} == LINEARS
    assert len(trained) == 2 * 2 * len(LINEARS)


@pytest.mark.parametrize("name", ["qproj", "lm_head"])
def test_a_target_that_cannot_have_an_adapter_is_named_with_those_that_can(name: str) -> None:
    with pytest.raises(ModelError, match=name) as caught:
        attach(Lora(targets=("q_proj", name)))
    assert caught.value.where == "train.lora.targets"
    assert caught.value.hint is not None
    assert "down_proj, gate_proj" in caught.value.hint


@pytest.mark.parametrize(
    "lora",
    [Lora(rank=4, alpha=8), Lora(rank=4, alpha=8, rslora=True), Lora(rank=4, alpha=8, dora=True), Lora(dropout=0.2)],
    ids=["lora", "rslora", "dora", "dropout"],
)
def test_losses_and_gradients_are_those_of_plain_peft(lora: Lora) -> None:
    model = stir(attach(lora)).train()
    torch.manual_seed(0)
    ours = gradients(model)
    assert any(g.abs().max() > 0 for g in ours.values())
    for module in model.modules():
        module.__dict__.pop("forward", None)
    torch.manual_seed(0)
    for name, expected in gradients(model).items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-3, atol=2e-5 * expected.abs().max().item() + 1e-7)


def test_rank_stabilised_adapters_scale_by_the_root_of_the_rank() -> None:
    layer: Any = attach(Lora(rank=16, alpha=8, rslora=True)).get_base_model().model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 8 / 4


def test_dora_trains_sizes_apart_from_directions() -> None:
    names = set(gradients(attach(Lora(dora=True))))
    assert len([n for n in names if "lora_magnitude_vector" in n]) == 2 * 4


@pytest.mark.parametrize("lora", [Lora(rslora=True), Lora(dora=True)], ids=["rslora", "dora"])
def test_an_adapter_comes_back_as_it_was_saved(lora: Lora, tmp_path: Path) -> None:
    model = stir(attach(lora)).eval()
    held, given = tmp_path / "held", tmp_path / "given"
    for folder in (held, given):
        folder.mkdir()
    adapters.save(model, held, base="somewhere")
    weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    adapters.save(model, given, base="somewhere", weights=weights)
    for folder in (held, given):
        again = adapters.load(make_tiny_model(300), folder)
        torch.testing.assert_close(again(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
