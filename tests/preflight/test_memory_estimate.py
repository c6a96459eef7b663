"""The formulas against what real layers keep, and against known figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from corral.errors import ModelError, RecipeError
from corral.model import adapters, loading
from corral.model.full_finetuning import train_all_weights
from corral.model.quantisation import Quantization
from corral.preflight import measured_memory, memory_estimate
from corral.preflight.memory_estimate import DEVICES, Device, ModelShape, PackShape
from corral.recipe import Train
from tests.conftest import make_tiny_model

HERE = Device("here", "cpu", 10**10, 1e11, 1e11, 1e10, 0.5, 0, 0, 0.0, "bfloat16", "")
IDS = [[5] * 90, [7] * 70, [9] * 96]
POSITIONS = [list(range(40, len(ids))) for ids in IDS]
PACK = PackShape(256, sum(map(len, POSITIONS)), 40)
LLAMA_8B = ModelShape(32, 4096, 14336, 32, 8, 128, 128256, tied=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    make_tiny_model(4096, **sizes, **heads).save_pretrained(folder)
    return folder


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Any]] = {
    "lora": ({}, {}, "float32"),
    "lora on all": ({}, {"targets": "all-linear"}, "float32"),
    "nf4": ({"quantization": "nf4"}, {}, "float32"),
    "int8": ({"quantization": "int8"}, {}, "float32"),
    "checkpointing": ({"gradient_checkpointing": True}, {}, "float32"),
    "dropout": ({}, {"dropout": 0.1}, "float32"),
    "dora": ({}, {"dora": True}, "float32"),
    "full": ({"method": "full"}, {}, "float32"),
    "full in bfloat16": ({"method": "full"}, {}, "bfloat16"),
    "bfloat16": ({}, {}, "bfloat16"),
    "bfloat16 and nf4": ({"quantization": "nf4"}, {}, "bfloat16"),
}


@pytest.mark.parametrize("name", CASES)
def test_measured_activations_and_weights_are_as_estimated(name: str, folder: Path) -> None:
    settings, lora, dtype = CASES[name]
    full = settings.get("method") == "full"
    train = Train.model_validate(settings if full else {**settings, "lora": lora})
    quantization = None if train.quantization == "none" else Quantization(train.quantization)
    model: Any = loading.load_model(folder, dtype="float32" if full else dtype, quantization=quantization)
    compute = getattr(torch, dtype)
    trained = train_all_weights(model, compute) if full else adapters.attach(model, train.lora, seed=0)
    if train.gradient_checkpointing:
        trained.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    measured = measured_memory.measure_pass(trained, IDS, POSITIONS)
    shape = ModelShape.from_folder(folder)
    parts = memory_estimate.memory(shape, train, PACK, HERE, dtype)
    assert measured["pack_tokens"] == PACK.tokens
    assert parts.activations == pytest.approx(measured["activations"], rel=0.15)
    assert 0.7 < parts.head / measured["head"] < 3
    assert parts.weights == pytest.approx(measured_memory.weights_bytes(trained), rel=0.02)
    assert shape.trained_weights(train) == sum(p.numel() for p in trained.parameters() if p.requires_grad)


def test_the_sizes_of_llama_3_1_8b_are_as_published() -> None:
    assert LLAMA_8B.weights == 8_030_261_248
    assert LLAMA_8B.trained_weights(Train()) == 13_631_488  # PEFT's count for rank 16 on q, k, v, o


def test_an_8b_model_takes_its_weights_and_nf4_brings_it_to_a_small_card() -> None:
    pack = PackShape(2048, 1000, 500)
    in_half = memory_estimate.memory(LLAMA_8B, Train(), pack, DEVICES["t4"], "float16")
    assert in_half.weights == pytest.approx(16.1e9, rel=0.01)
    assert in_half.total > DEVICES["t4"].memory
    small = Train(quantization="nf4", gradient_checkpointing=True)
    assert memory_estimate.memory(LLAMA_8B, small, pack, DEVICES["t4"], "float16").total < DEVICES["t4"].memory


def test_rates_are_those_that_the_assumed_share_was_taken_from() -> None:
    # NeMo AutoModel: Llama-3.1-8B, LoRA, 4096 tokens: 12,473 tokens/s on an H100.
    rate = memory_estimate.tokens_per_second(
        LLAMA_8B, Train(), PackShape(4096, 4096, 2048), DEVICES["h100"], "bfloat16"
    )
    assert 0.75 < rate / 12_473 < 1.1
    # torchtune: Llama-3.2-3B, LoRA, 4096 tokens: 8,210 tokens/s on an A100.
    llama_3b = ModelShape(28, 3072, 8192, 24, 8, 128, 128256, tied=True)
    rate = memory_estimate.tokens_per_second(
        llama_3b, Train(), PackShape(4096, 4096, 2048), DEVICES["a100-80g"], "bfloat16"
    )
    assert 0.75 < rate / 8_210 < 1.2


def test_a_setting_that_saves_memory_or_costs_time_does_so_in_the_estimate() -> None:
    device, pack = DEVICES["a100-80g"], PackShape(8192, 2000, 300)

    def estimate_with(**settings: Any) -> tuple[int, float]:
        train = Train(**settings)
        return (
            memory_estimate.memory(LLAMA_8B, train, pack, device, "bfloat16").total,
            memory_estimate.tokens_per_second(LLAMA_8B, train, pack, device, "bfloat16"),
        )

    measured_memory, rate = estimate_with()
    for settings in ({"gradient_checkpointing": True}, {"quantization": "nf4"}, {"quantization": "int8"}):
        less, slower = estimate_with(**settings)
        assert less < measured_memory
        assert slower < rate
    more, _ = estimate_with(method="full")
    assert more > measured_memory + 8e9 * 12


def test_bfloat16_on_a_device_without_it_is_refused() -> None:
    assert DEVICES["t4"].dtype("auto") == "float16"
    with pytest.raises(RecipeError, match="T4 does not compute in bfloat16"):
        DEVICES["t4"].dtype("bfloat16")


def test_a_config_without_sizes_is_an_error_that_names_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 64, "num_attention_heads": 4}')
    with pytest.raises(ModelError, match="num_hidden_layers"):
        ModelShape.from_folder(tmp_path)
