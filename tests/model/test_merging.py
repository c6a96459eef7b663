"""Merged ≡ adapter, for each way in which weights are held; what is written stands by itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file

from corral.errors import ModelError
from corral.export.contract import TOLERANCES, compare_logprobs
from corral.model import adapters, merging, packed_forward, quantisation
from corral.model.loading import load_model, load_template, load_tokenizer
from corral.model.quantisation import Quantization
from corral.recipe import Lora
from corral.template import Template
from tests.conftest import change_json, make_tiny_model
from tests.model.tiny import fill_lora_b

SEQUENCES = [list(range(5 * i, 5 * i + 40)) for i in range(6)]
DType = Literal["float32", "bfloat16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small-weights")
    make_tiny_model(300, initializer_range=0.1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Any:
    def make(lora: Lora) -> Path:
        path = tmp_path_factory.mktemp("adapter")
        model = fill_lora_b(adapters.attach(make_tiny_model(300, initializer_range=0.1), lora, seed=3), 0.05)
        adapters.save(model, path, base="tiny")
        return path

    return make


def logprobs(model: Any) -> list[list[float]]:
    return packed_forward.score(model.eval(), SEQUENCES, [1] * len(SEQUENCES))


def merged(folder: Path, adapter: Path, dtype: DType, quantization: Quantization | None) -> Any:
    model = load_model(folder, dtype=dtype, quantization=quantization)
    if quantization is not None:
        quantisation.dequantise_model(model, getattr(torch, dtype))
    return merging.merge_adapter(adapters.load(model, adapter))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [None, Quantization("nf4")], ids=["plain", "nf4"])
@pytest.mark.parametrize(
    "lora",
    [Lora(targets="all-linear"), Lora(rslora=True, alpha=4), Lora(dora=True)],
    ids=["lora", "rslora", "dora"],
)
def test_the_merged_model_is_the_adapted_one(
    lora: Lora, kind: Quantization | None, dtype: DType, folder: Path, adapter: Any
) -> None:
    path = adapter(lora)
    adapted = logprobs(adapters.load(load_model(folder, dtype=dtype, quantization=kind), path))
    base = logprobs(load_model(folder, dtype=dtype, quantization=kind))
    written = logprobs(merged(folder, path, dtype, kind))
    tolerance = TOLERANCES[dtype]
    assert not compare_logprobs("changed", base, written, tolerance).passed
    assert compare_logprobs("merged", adapted, written, tolerance).passed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_int8_model_merges_into_its_restored_weights_and_stays_close_to_what_was_trained(
    dtype: DType, folder: Path, adapter: Any
) -> None:
    path, int8 = adapter(Lora(targets="all-linear")), Quantization("int8")
    restored = load_model(folder, dtype=dtype, quantization=int8)
    quantisation.dequantise_model(restored, getattr(torch, dtype))
    written = logprobs(merged(folder, path, dtype, int8))
    assert compare_logprobs("restored", logprobs(adapters.load(restored, path)), written, TOLERANCES[dtype]).passed
    trained = logprobs(adapters.load(load_model(folder, dtype=dtype, quantization=int8), path))
    gap = compare_logprobs("trained", trained, written, TOLERANCES["int8"])
    assert gap.passed
    assert gap.mean is not None
    assert gap.mean > 1e-4, "inputs are rounded too"


def test_an_update_that_is_not_a_number_is_refused(folder: Path, adapter: Any) -> None:
    model = adapters.load(load_model(folder), adapter(Lora()))
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_A" in n).fill_(float("nan"))
    with pytest.raises(ModelError, match="cannot be merged"):
        merging.merge_adapter(model)


def test_a_whole_model_is_written_in_another_dtype_and_read_back(tiny_folder: Path, tmp_path: Path) -> None:
    model: Any = load_model(tiny_folder)
    template = Template.load(load_tokenizer(tiny_folder), end_ids=[0, 7])
    weights = dict(model.named_parameters())
    merging.save_model(model, template, tmp_path, licences=(), weights=weights, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    written = load_file(tmp_path / "model.safetensors")
    assert {w.dtype for w in written.values()} == {torch.bfloat16}
    again: Any = load_model(tmp_path, dtype="bfloat16")
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, weights[name].to(torch.bfloat16)), name
    assert model.dtype == torch.float32
    stop = json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"]
    assert stop == [0, 2, 7]


def test_the_base_models_settings_of_generation_are_left_out(tiny_folder: Path, tmp_path: Path) -> None:
    base, merged = tmp_path / "base", tmp_path / "merged"
    shutil.copytree(tiny_folder, base)
    settings = {"do_sample": True, "temperature": 0.6, "min_p": 0.2, "typical_p": 0.5, "repetition_penalty": 1.3}
    settings |= {"num_beams": 4, "suppress_tokens": [5], "max_new_tokens": 5, "forced_eos_token_id": 2}
    change_json(base / "generation_config.json", **settings)
    merged.mkdir()
    template = load_template(base)
    merging.save_model(load_model(base), template, merged, licences=())
    written = json.loads((merged / "generation_config.json").read_text())
    assert written["eos_token_id"] == list(template.stop_ids)
    assert written.keys() <= {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"}
