"""The formulas against what real layers keep on a CPU, traces of whole models along a GPU's way, and known figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from corral.errors import ModelError
from corral.model import adapters, loading, packed_forward
from corral.model.full_finetuning import train_all_weights
from corral.model.quantisation import Quantization
from corral.model.shared_prefixes import pack_tokens
from corral.recipe import Train
from corral.training import memory_estimate
from corral.training.memory_estimate import GB, Memory, ModelShape
from tests.conftest import make_tiny_model
from tests.training.meta_trace import meta_model, pass_peak, take_the_gpus_way

IDS = [[5] * 90, [7] * 70, [9] * 96]
LLAMA_3B = ModelShape(28, 3072, 8192, 24, 8, 128, 128256, tied=True)
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


def kept_bytes(model: Any) -> int:
    """Bytes of the tensors that the layers of a model keep for the backward pass, weights left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, Any] = {}

    def save(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        packed_forward.hidden_states(model.train(), pack_tokens(IDS, share=False))
    return sum(storage.nbytes() for storage in saved.values())


def weight_bytes(model: Any) -> int:
    """Bytes of a model's parameters with the scales of quantised ones; shared tensors count once."""
    tensors: list[Any] = [*model.parameters()]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        tensors += [
            getattr(each, name, None) for each in (state, getattr(state, "state2", None)) for name in ("absmax", "code")
        ]
        tensors.append(getattr(parameter, "SCB", None))
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if isinstance(t, torch.Tensor)
    }
    return sum(storages.values())


@pytest.mark.parametrize("name", CASES)
def test_weights_and_what_a_pass_keeps_on_a_cpu_are_as_estimated(name: str, folder: Path) -> None:
    settings, lora, dtype = CASES[name]
    full = settings.get("method") == "full"
    train = Train.model_validate(settings if full else {**settings, "lora": lora})
    quantization = None if train.quantization == "none" else Quantization(train.quantization)
    model: Any = loading.load_model(folder, dtype="float32" if full else dtype, quantization=quantization)
    compute = getattr(torch, dtype)
    trained = train_all_weights(model, compute) if full else adapters.attach(model, train.lora, seed=0)
    if train.gradient_checkpointing is True:
        trained.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    shape = ModelShape.from_folder(folder)
    memory = memory_estimate.memory(shape, train, sum(map(len, IDS)), 0, "cpu", dtype)
    assert memory.kept == pytest.approx(kept_bytes(trained), rel=0.1)
    assert memory.weights == pytest.approx(weight_bytes(trained), rel=0.02)
    assert shape.trained_weights(train) == sum(p.numel() for p in trained.parameters() if p.requires_grad)


ALL = {"targets": "all-linear"}
TRACES: dict[str, tuple[ModelShape, dict[str, Any], list[int]]] = {
    "R2, 3B": (LLAMA_3B, {"quantization": "nf4", "gradient_checkpointing": True, "lora": ALL}, [2048] * 2),
    "R1, 3B": (LLAMA_3B, {"quantization": "nf4", "lora": ALL}, [512] * 8),
    "R5, 8B": (LLAMA_8B, {"quantization": "nf4", "gradient_checkpointing": True}, [1024] * 8),
    "3B in bfloat16": (LLAMA_3B, {}, [512] * 4),
    "8B in bfloat16": (LLAMA_8B, {"gradient_checkpointing": True}, [512] * 8),
}


@pytest.mark.parametrize("name", TRACES)
def test_a_pass_of_a_whole_model_along_a_gpus_way_is_as_estimated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take_the_gpus_way(monkeypatch)
    shape, settings, lengths = TRACES[name]
    train = Train.model_validate(settings)
    estimate = memory_estimate.memory(shape, train, sum(lengths), sum(lengths) // 2, "cuda", "bfloat16")
    added = (estimate.peak - estimate.held) / (1 + memory_estimate._GPU_WASTE)  # pyright: ignore[reportPrivateUsage]
    traced = pass_peak(meta_model(shape, train), lengths, lengths[0] // 2)
    assert traced > GB / 2
    assert added == pytest.approx(traced, rel=0.1)


def test_the_sizes_of_llama_3_1_8b_are_as_published() -> None:
    assert LLAMA_8B.weights == 8_030_261_248
    assert LLAMA_8B.trained_weights(Train()) == 13_631_488  # PEFT's count for rank 16 on q, k, v, o


def estimate(**settings: Any) -> Memory:
    return memory_estimate.memory(LLAMA_8B, Train.model_validate(settings), 8192, 2000, "cuda", "bfloat16")


def test_an_8b_model_takes_its_weights_and_nf4_and_checkpointing_bring_it_to_a_small_card() -> None:
    assert estimate().weights == pytest.approx(16.1e9, rel=0.01)
    assert estimate(quantization="nf4", gradient_checkpointing=True).peak < 14 * GB


@pytest.mark.parametrize(
    "settings", [{"gradient_checkpointing": True}, {"quantization": "nf4"}, {"quantization": "int8"}]
)
def test_a_setting_that_saves_memory_does_so_in_the_estimate(settings: dict[str, Any]) -> None:
    assert estimate(**settings).held <= estimate().held
    assert estimate(**{"gradient_checkpointing": True} | settings).peak <= estimate(gradient_checkpointing=True).peak


def test_all_weights_take_their_gradients_and_moments() -> None:
    assert estimate(method="full").held > estimate().held + 8e9 * 12


def test_a_config_without_sizes_is_an_error_that_names_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 64, "num_attention_heads": 4}')
    with pytest.raises(ModelError, match="num_hidden_layers"):
        ModelShape.from_folder(tmp_path)
