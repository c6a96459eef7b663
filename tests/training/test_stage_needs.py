"""What a stage is said to need is what it takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from corral.errors import InputError
from corral.export.export import export_form
from corral.export_forms import ExportForm
from corral.progress import Progress
from corral.recipe import Train
from corral.run.directory import Run
from corral.storage import tree_size
from corral.training.memory_estimate import ModelShape
from corral.training.stage_needs import check_context, export_bytes, stage_bytes


def test_the_estimate_of_a_stage_covers_the_files_that_it_leaves(finished_run: Path) -> None:
    stage, train = finished_run / "train-1-sft", Run(finished_run).recipe.train[0]
    needed = stage_bytes(ModelShape.from_folder(stage / "merged"), train, "float32")
    weights = (stage / "merged" / "model.safetensors").stat().st_size
    assert needed["merged model"] == pytest.approx(weights, rel=0.05)
    kept = sorted((stage / "checkpoints").iterdir())
    assert needed["checkpoints"] >= sum(
        (folder / name).stat().st_size for folder in kept for name in ("adapter.safetensors", "optimizer.safetensors")
    )
    assert needed["adapters"] >= (stage / "adapter" / "adapter_model.safetensors").stat().st_size


def test_all_weights_and_a_choice_of_merges_take_two_models(tiny_folder: Path) -> None:
    shape = ModelShape.from_folder(tiny_folder)
    one = stage_bytes(shape, Train(), "bfloat16")["merged model"]
    assert stage_bytes(shape, Train(method="full"), "bfloat16")["merged model"] == 2 * one
    assert stage_bytes(shape, Train(quantization="nf4", merge="best"), "bfloat16")["merged model"] == 2 * one


@pytest.mark.parametrize("form", [ExportForm("gguf", "f16"), ExportForm("openvino", "f32")])
def test_the_estimate_of_an_exported_form_is_near_its_size(form: ExportForm, tiny_folder: Path, tmp_path: Path) -> None:
    path = export_form(tiny_folder, tmp_path, form, Progress())
    size = path.stat().st_size if path.is_file() else tree_size(path)
    assert 0.7 * size < export_bytes(ModelShape.from_folder(tiny_folder), form) < 1.2 * size


def test_a_context_that_is_too_short_is_named_with_the_setting(tiny_folder: Path) -> None:
    assert check_context(tiny_folder, 512, "data.max_length") == 512
    with pytest.raises(InputError, match="513 tokens do not fit into the model's context of 512") as caught:
        check_context(tiny_folder, 513, "data.max_length")
    assert caught.value.where == "data.max_length"
