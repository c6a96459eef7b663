"""The merged model that a stage leaves, and the losses by which it is chosen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from corral.model.loading import load_model
from corral.recipe import Optimizer, Train
from corral.training import trained_model
from corral.training.trained_model import ValidationSet
from tests.training.stage import CONFIGS, LORA, Stage, answered_by
from tests.training.tiny import run_until


@pytest.mark.parametrize("better", ["dequantised", "full"])
def test_the_best_merge_is_the_one_with_the_lower_held_out_loss(
    better: str, make_stage: Callable[..., Stage], encoded_rows: list[Any]
) -> None:
    stage = make_stage(Train(lora=LORA, quantization="nf4", merge="best"))
    dequantised = better == "dequantised"
    adapted = trained_model.load_as_trained(stage.setup, stage.folder) if dequantised else stage.load_adapter()
    validation = ValidationSet(answered_by(adapted, encoded_rows), 128)
    (output,) = stage.merge(validation)
    record = json.loads((stage.folder / trained_model.MERGING_FILE).read_text())
    assert record["into"] == better == min(record["losses"], key=record["losses"].get)
    assert len(record["losses"]) == 2
    assert all(f"{loss:.4f}" in output for loss in record["losses"].values())
    assert validation.loss(load_model(stage.merged)) == pytest.approx(record["losses"][better], abs=1e-5)
    results = stage.check(validation)
    assert all(check.passed for check in results.values()), results
    assert results["choice of the merge"].detail == output


def test_the_validation_loss_is_that_of_the_trainer(make_stage: Callable[..., Stage], encoded_rows: list[Any]) -> None:
    trainer = make_stage(CONFIGS["plain"]).trainer(encoded_rows, seed=5)
    assert ValidationSet(trainer.held_out, 128).loss(trainer.model) == pytest.approx(trainer.evaluate(), rel=1e-6)


def test_a_full_model_is_trained_resumed_and_saved_exactly(
    make_stage: Callable[..., Stage], encoded_rows: list[Any], tiny_folder: Path, tmp_path: Path
) -> None:
    stage = make_stage(Train(method="full", steps=6, batch_size=4, checkpoint_every=2, optimizer=Optimizer(lr=1e-3)))
    uninterrupted = stage.trainer(encoded_rows, tmp_path / "uninterrupted")
    uninterrupted.run()
    run_until(stage.trainer(encoded_rows, tmp_path / "stopped"), 3)
    resumed = stage.trainer(encoded_rows, tmp_path / "stopped")
    resumed.run()
    initial = load_model(tiny_folder).state_dict()
    for name, value in uninterrupted.weights().items():
        assert torch.equal(resumed.weights()[name], value), name
        assert not torch.equal(initial[name], value), f"{name} was not trained"

    stage.save_full_model(resumed)
    validation = ValidationSet(resumed.held_out, 128)
    results = stage.check(validation)
    assert list(results) == ["trained and saved weights", "trained and saved model"]
    assert all(check.passed for check in results.values()), results
    shutil.rmtree(stage.merged)
    shutil.copytree(tiny_folder, stage.merged)
    assert not any(check.passed for check in stage.check(validation).values())
