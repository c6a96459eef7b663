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
from tests.model.tiny import (
    ALL_LINEAR,
    IDS,
    assert_gradients_equal,
    fill_lora_b,
    loss_and_gradients,
    remove_replaced_forwards,
)


def attach(lora: Lora, **changes: Any) -> Any:
    return adapters.attach(make_tiny_model(300, **changes), lora, seed=3)


@pytest.mark.parametrize("tied", [True, False])
def test_all_linear_is_every_linear_layer_but_the_output_layer(tied: bool) -> None:
    model = attach(Lora(targets="all-linear"), tie_word_embeddings=tied)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert {n.split(".lora_")[0].rpartition(".")[2] for n in trained} == set(ALL_LINEAR)
    assert len(trained) == 2 * 2 * len(ALL_LINEAR)


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
    model = fill_lora_b(attach(lora), 0.1).train()
    torch.manual_seed(0)
    ours, actual = loss_and_gradients(model)
    assert any(g.abs().max() > 0 for g in actual.values())
    torch.manual_seed(0)
    loss, expected = loss_and_gradients(remove_replaced_forwards(model))
    torch.testing.assert_close(ours, loss)
    assert_gradients_equal(actual, expected)


def test_rank_stabilised_adapters_scale_by_the_root_of_the_rank() -> None:
    layer: Any = attach(Lora(rank=16, alpha=8, rslora=True)).get_base_model().model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 8 / 4


def test_dora_trains_sizes_apart_from_directions() -> None:
    _, trained = loss_and_gradients(attach(Lora(dora=True)))
    assert len([name for name in trained if "lora_magnitude_vector" in name]) == 2 * 4


@pytest.mark.parametrize("lora", [Lora(rslora=True), Lora(dora=True)], ids=["rslora", "dora"])
def test_an_adapter_comes_back_as_it_was_saved(lora: Lora, tmp_path: Path) -> None:
    model = fill_lora_b(attach(lora), 0.1).eval()
    own, other = tmp_path / "own", tmp_path / "other"
    for folder in (own, other):
        folder.mkdir()
    adapters.save(model, own, base="somewhere")
    weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    adapters.save(model, other, base="somewhere", weights=weights)
    for folder in (own, other):
        again = adapters.load(make_tiny_model(300), folder)
        torch.testing.assert_close(again(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
