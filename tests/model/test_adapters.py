"""Adapters are attached and scaled as the recipe says, and come back from disk as they were saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from corral.errors import ModelError
from corral.model import adapters, merging, packed_forward
from corral.model.adapter_files import AdapterFiles
from corral.model.loading import load_model
from corral.recipe import Lora
from tests.conftest import change_json, make_tiny_model
from tests.model.tiny import (
    ADAPTER_KINDS,
    ALL_LINEAR,
    IDS,
    assert_gradients_equal,
    fill_lora_b,
    loss_and_gradients,
    packed_losses_and_gradients,
    plain_losses_and_gradients,
    remove_replaced_forwards,
    write_by_peft,
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


TEXT = (IDS[0] % 290).tolist()


@pytest.mark.parametrize("kind", ADAPTER_KINDS)
def test_an_adapter_of_peft_gives_pefts_log_probabilities_and_so_does_its_merged_model(
    kind: str, tmp_path: Path
) -> None:
    of_model, settings = ADAPTER_KINDS[kind]
    base, adapter, merged = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    make_tiny_model(300, **of_model).save_pretrained(base)
    expected = write_by_peft(adapter, base, load_model(base), ids=TEXT, **settings)
    files = AdapterFiles.read(adapter)
    files.check_fit(base)
    assert files.vocabulary_size in (None, settings.get("resize", 300))
    adapted = adapters.load(load_model(base), adapter)
    assert packed_forward.score(adapted, [TEXT], [1])[0] == pytest.approx(expected, abs=1e-4)
    assert packed_forward.score(load_model(base), [TEXT], [1])[0] != pytest.approx(expected, abs=1e-2)
    merging.merge_adapter(adapted).save_pretrained(merged)
    written: Any = load_model(merged)
    assert packed_forward.score(written, [TEXT], [1])[0] == pytest.approx(expected, abs=1e-4)
    assert written.config.vocab_size == settings.get("resize", 300)


@pytest.mark.parametrize("kind", ["head", "tied head with dora", "tokens", "whole modules", "all biases", "parameters"])
def test_an_adapter_that_is_trained_further_has_the_losses_and_gradients_of_plain_peft(
    kind: str, tmp_path: Path
) -> None:
    of_model, settings = ADAPTER_KINDS[kind]
    make_tiny_model(300, **of_model).save_pretrained(tmp_path / "base")
    write_by_peft(tmp_path, tmp_path / "base", load_model(tmp_path / "base"), ids=TEXT, **settings)
    model: Any = adapters.resume(load_model(tmp_path / "base"), tmp_path)
    ours, actual = packed_losses_and_gradients(model, [TEXT, TEXT[5:]])
    expected, gradients = plain_losses_and_gradients(remove_replaced_forwards(model), [TEXT, TEXT[5:]])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert any(gradient.abs().max() > 0 for gradient in actual.values())
    assert_gradients_equal(actual, gradients)


def test_biases_on_layers_without_one_are_computed_and_not_merged(tmp_path: Path) -> None:
    base = tmp_path / "base"
    make_tiny_model(300).save_pretrained(base)
    expected = write_by_peft(tmp_path, base, load_model(base), ids=TEXT, lora_bias=True)
    adapted = adapters.load(load_model(base), tmp_path)
    assert packed_forward.score(adapted, [TEXT], [1])[0] == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ModelError, match="lora_bias") as caught:
        merging.merge_adapter(adapted)
    assert "transformers engine" in (caught.value.hint or "")


@pytest.mark.parametrize("change", ["missing", "another"])
def test_an_adapter_whose_config_and_weights_differ_is_refused(change: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    make_tiny_model(300).save_pretrained(base)
    write_by_peft(tmp_path, base, load_model(base), ids=TEXT)
    change_json(
        tmp_path / "adapter_config.json",
        target_modules=["q_proj"] if change == "another" else ["q_proj", "v_proj", "o_proj"],
    )
    with pytest.raises(ModelError, match=r"cannot be loaded: .*_proj\.lora_A"):
        adapters.load(load_model(base), tmp_path)


@pytest.mark.parametrize(
    ("kind", "lost"),
    [
        ("tokens", {"trainable_token_indices": None}),
        ("resized tokens", {"trainable_token_indices": None}),
        ("tokens of both", {"trainable_token_indices": {"embed_tokens": [3]}}),
        ("resized whole modules", {"modules_to_save": None}),
    ],
)
def test_tokens_and_modules_that_the_config_does_not_name_are_not_left_out_in_silence(
    kind: str, lost: dict[str, Any], tmp_path: Path
) -> None:
    of_model, settings = ADAPTER_KINDS[kind]
    base = tmp_path / "base"
    make_tiny_model(300, **of_model).save_pretrained(base)
    write_by_peft(tmp_path, base, load_model(base), ids=TEXT, **settings)
    change_json(tmp_path / "adapter_config.json", **lost)
    with pytest.raises(ModelError, match="is in its weights or in its config"):
        adapters.load(load_model(base), tmp_path)
