"""Quantised layers hold and compute what bitsandbytes says, on a CPU in fewer steps; nothing else in the model changes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from corral.errors import MissingExtraError
from corral.model import quantisation
from corral.model.compute.fused_forwards import fuse
from corral.model.compute.quantised_weights import dequantise_weight, is_int8, is_nf4
from corral.model.loading import load_model
from corral.model.quantisation import Quantization
from tests.conftest import make_tiny_model
from tests.model.tiny import (
    IDS,
    assert_gradients_equal,
    layers_with_replaced_forwards,
    loss_and_gradients,
    remove_replaced_forwards,
    with_adapter,
)

KINDS = [Quantization("nf4"), Quantization("int8")]
TARGETS = ["q_proj", "o_proj", "up_proj"]


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untied")
    make_tiny_model(300, tie_word_embeddings=False).save_pretrained(folder)
    return folder


def linears(model: Any) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lora" not in n}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.kind)
def test_only_the_linear_layers_before_the_head_are_quantised(
    kind: Quantization, dtype: Literal["float32", "bfloat16"], untied: Path
) -> None:
    model: Any = load_model(untied, dtype=dtype, quantization=kind)
    is_quantised = is_nf4 if kind.kind == "nf4" else is_int8
    layers = linears(model)
    assert len(layers) == 2 * 7 + 1
    assert {n for n, m in layers.items() if not is_quantised(m)} == {"lm_head"}
    others = [model.lm_head.weight, model.model.embed_tokens.weight, model.model.norm.weight]
    assert {p.dtype for p in others} == {getattr(torch, dtype)}
    if kind.kind == "nf4":
        state = model.model.layers[0].mlp.up_proj.weight.quant_state
        assert (state.quant_type, state.nested, state.blocksize, state.dtype) == (
            "nf4",
            True,
            64,
            getattr(torch, dtype),
        )
    else:
        assert model.model.layers[0].mlp.up_proj.state.threshold == 6.0


def test_an_nf4_weight_is_restored_from_its_table_bit_for_bit(untied: Path) -> None:
    from bitsandbytes.functional import dequantize_blockwise

    model: Any = load_model(untied, quantization=KINDS[0])
    layer = model.model.layers[0].mlp.up_proj
    state = layer.weight.quant_state
    packed = layer.weight.data.flatten().int()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()
    scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
    expected = (state.code[codes].view(-1, 64) * scales[:, None]).view(128, 64)
    assert torch.equal(dequantise_weight(layer), expected)
    exact = make_tiny_model(300, tie_word_embeddings=False).model.layers[0].mlp.up_proj.weight
    assert 0.02 < ((expected - exact).norm() / exact.norm()).item() < 0.15


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.kind)
def test_losses_and_gradients_are_those_of_bitsandbytes_and_peft(kind: Quantization, untied: Path) -> None:
    theirs = remove_replaced_forwards(with_adapter(TARGETS, load_model(untied, quantization=kind)))
    ours = with_adapter(TARGETS, load_model(untied, quantization=kind))
    fuse(ours)
    # bitsandbytes rounds inputs to int8 in evaluation only, and would compute NF4 in bfloat16 there.
    theirs.train(kind.kind == "nf4")
    expected_loss, expected = loss_and_gradients(theirs)
    loss, gradients = loss_and_gradients(ours.train())
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert_gradients_equal(gradients, expected)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.kind)
def test_evaluating_gives_what_training_gives_and_leaves_the_codes_alone(kind: Quantization, untied: Path) -> None:
    model: Any = load_model(untied, quantization=kind)
    before = {n: m.weight.data.clone() for n, m in linears(model).items()}
    trained = model.train()(input_ids=IDS).logits
    with torch.inference_mode():
        assert torch.equal(model.eval()(input_ids=IDS).logits, trained)
    for name, layer in linears(model).items():
        assert torch.equal(layer.weight.data, before[name]), name


def test_outliers_above_the_threshold_are_multiplied_unquantised(untied: Path) -> None:
    def layer(threshold: float) -> Any:
        model: Any = load_model(untied, quantization=Quantization("int8", threshold))
        return model.model.layers[0].mlp.up_proj

    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= 100
    exact = x @ dequantise_weight(layer(6.0)).T
    all_rounded, apart = (layer(threshold)(x) for threshold in (0.0, 6.0))
    assert (apart - exact).norm() < 0.1 * (all_rounded - exact).norm()


@pytest.mark.parametrize(
    ("kind", "settings", "replaced"),
    [
        (KINDS[0], {}, TARGETS),
        (KINDS[0], {"lora_dropout": 0.1}, []),
        (KINDS[0], {"use_dora": True, "init_lora_weights": True}, []),
        (KINDS[1], {}, []),
    ],
    ids=["nf4", "dropout", "dora", "int8"],
)
def test_one_product_for_an_adapter_only_where_it_is_exact(
    kind: Quantization, settings: dict[str, Any], replaced: list[str], untied: Path
) -> None:
    model = with_adapter(TARGETS, load_model(untied, quantization=kind), **settings)
    fuse(model)
    assert layers_with_replaced_forwards(model) == set(replaced)


def test_with_the_adapter_off_it_is_the_quantised_base(untied: Path) -> None:
    base = load_model(untied, quantization=KINDS[0])(input_ids=IDS).logits
    model = with_adapter(TARGETS, load_model(untied, quantization=KINDS[0]))
    fuse(model)
    assert not torch.allclose(model(input_ids=IDS).logits, base, atol=1e-2)
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=IDS).logits, base)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.kind)
def test_a_restored_model_is_a_plain_one(kind: Quantization, untied: Path, tmp_path: Path) -> None:
    model: Any = load_model(untied, quantization=kind)
    weights = {n: dequantise_weight(m) for n, m in linears(model).items() if n != "lm_head"}
    quantisation.dequantise_model(model, torch.float32)
    assert {type(m) for m in linears(model).values()} == {nn.Linear}
    assert all(torch.equal(linears(model)[n].weight, w) for n, w in weights.items())
    model.save_pretrained(tmp_path)
    again: Any = load_model(tmp_path)
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_without_bitsandbytes_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, untied: Path) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match="bitsandbytes") as caught:
        load_model(untied, quantization=KINDS[0])
    assert caught.value.hint == 'pip install "corral[quant]"'
    assert caught.value.exit_code == 3
