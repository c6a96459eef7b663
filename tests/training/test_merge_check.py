"""A merged model passes as the one that was trained, for each way of holding weights; other models are detected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from corral.model import merging
from corral.model.loading import load_model
from corral.recipe import Optimizer, Train
from corral.training.trained_model import ValidationSet
from tests.conftest import change_json
from tests.training.stage import CONFIGS, Stage, answered_by
from tests.training.tiny import make_examples


@pytest.mark.parametrize("name", CONFIGS)
def test_a_merged_model_is_what_was_trained(
    name: str, make_stage: Callable[..., Stage], encoded_rows: list[Any]
) -> None:
    stage, validation = make_stage(CONFIGS[name]), ValidationSet(make_examples(encoded_rows[:6]), 128)
    assert stage.merge(validation) == []
    results = stage.check(validation)
    assert all(check.passed for check in results.values()), results
    assert ("held-out loss, merged and int8" in results) == (name == "int8")


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_a_merge_into_full_precision_recorded_as_dequantised_is_detected(
    name: str, make_stage: Callable[..., Stage], encoded_rows: list[Any], tmp_path: Path
) -> None:
    stage, validation = make_stage(CONFIGS[name]), ValidationSet(make_examples(encoded_rows[:6]), 128)
    stage.merge(validation)
    (other := tmp_path / "other").mkdir()
    merging.save_model(merging.merge_adapter(stage.load_adapter()), stage.template, other, licences=())
    assert not stage.check(validation, other)["adapter and merged model"].passed


def test_an_int8_model_with_a_higher_loss_after_the_merge_is_detected(
    make_stage: Callable[..., Stage], encoded_rows: list[Any], tmp_path: Path
) -> None:
    stage = make_stage(CONFIGS["int8"])
    stage.merge(ValidationSet((), 128))
    trained = load_model(stage.merged)
    validation = ValidationSet(answered_by(trained, encoded_rows), 128)
    (other := tmp_path / "other").mkdir()
    with torch.no_grad():
        trained.get_parameter("model.norm.weight").mul_(0.7)
    merging.save_model(trained, stage.template, other, licences=())
    check = stage.check(validation, other)["held-out loss, merged and int8"]
    assert not check.passed
    assert "allowed +0.02" in check.detail


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_only_the_rounded_weights_pass_as_a_full_model_written_in_16_bits(
    dtype: str, make_stage: Callable[..., Stage], encoded_rows: list[Any]
) -> None:
    stage = make_stage(Train(method="full", steps=4, batch_size=4, optimizer=Optimizer(lr=1e-3)), dtype)
    trainer = stage.trainer(encoded_rows)
    trainer.run()
    stage.save_full_model(trainer)
    validation = ValidationSet(trainer.held_out, 128)
    results = stage.check(validation)
    assert len(results) == 3
    assert all(check.passed for check in results.values()), results

    file = stage.merged / "model.safetensors"
    written = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    one_off = written[name].clone()
    one_off[0, 0] = torch.nextafter(one_off[0, 0], torch.tensor(9.0, dtype=one_off.dtype))
    save_file(written | {name: one_off}, file, metadata={"format": "pt"})
    check = stage.check(validation)["trained and saved weights"]
    assert not check.passed
    assert name in check.detail

    save_file(written | {name: written[name].flip(0).contiguous()}, file, metadata={"format": "pt"})
    results = stage.check(validation)
    assert not results["trained and saved weights"].passed
    assert not results["trained and saved model"].passed

    save_file(written, file, metadata={"format": "pt"})
    change_json(stage.merged / "config.json", rms_norm_eps=0.5)
    results = stage.check(validation)
    assert results["trained and saved weights"].passed
    assert not results["trained and saved model"].passed
