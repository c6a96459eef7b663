"""The merged model that a stage leaves, and the losses by which it is chosen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from corral.errors import ModelError
from corral.model import adapters, packed_forward
from corral.model.adapter_files import AdapterFiles
from corral.model.loading import load_model
from corral.recipe import Optimizer, Train
from corral.training import trained_model
from corral.training.trained_model import TrainingSetup, ValidationSet
from tests.conftest import make_tiny_model
from tests.model.tiny import ADAPTER_KINDS, write_by_peft
from tests.training.stage import CONFIGS, LORA, Stage, answered_by
from tests.training.tiny import make_trainer, run_until


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
    assert ValidationSet(trainer.held_out, 128).loss(trainer.model) == pytest.approx(trainer.evaluate().loss, rel=1e-6)


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


CONTINUED = [
    "rslora",
    "patterns",
    "dora",
    "lora bias",
    "all biases",
    "whole modules",
    "tokens",
    "tied head",
    "parameters",
]


@pytest.mark.parametrize("kind", CONTINUED)
def test_an_adapter_is_trained_further_from_where_it_was_and_keeps_its_kind(
    kind: str, encoded_rows: list[Any], tmp_path: Path
) -> None:
    of_model, settings = ADAPTER_KINDS[kind]
    base, adapter, ids = tmp_path / "base", tmp_path / "adapter", list(encoded_rows[0].ids[:40])
    make_tiny_model(400, **of_model).save_pretrained(base)
    expected = write_by_peft(adapter, base, load_model(base), ids=ids, **settings)

    def trained(lr: float) -> Path:
        config = Train(steps=2, batch_size=4, optimizer=Optimizer(lr=lr, schedule="constant", warmup_steps=0))
        setup = TrainingSetup(base, config, "cpu", "float32", adapter)
        out = tmp_path / f"after-{lr}"
        out.mkdir()
        model: Any = trained_model.make_trainable(trained_model.load_base(setup), setup, seed=3)
        trainer = make_trainer(model, encoded_rows, config, tmp_path / f"stage-{lr}", pack_length=128)
        trainer.run()
        adapters.save(model, out, base=str(base), weights=trainer.weights())
        return out

    same, other = trained(1e-30), trained(1e-2)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, same))
    assert all(torch.equal(before[name], after[name]) for name in after), "no step is that small"
    assert AdapterFiles.read(same).lora == AdapterFiles.read(adapter).lora
    for folder, is_same in ((same, True), (other, False)):
        (scores,) = packed_forward.score(adapters.load(load_model(base), folder), [ids], [1])
        assert (scores == pytest.approx(expected, abs=1e-4)) == is_same
    moved = load_file(other / "adapter_model.safetensors")
    assert [name for name, value in moved.items() if torch.equal(value, before[name])] == [], "all of it is trained"


def test_a_part_of_an_adapter_that_must_stay_is_not_trained(tiny_folder: Path, tmp_path: Path) -> None:
    write_by_peft(tmp_path, tiny_folder, load_model(tiny_folder), ids=[5, 6], init_lora_weights="mica")
    with pytest.raises(ModelError, match="mica"):
        adapters.resume(load_model(tiny_folder), tmp_path)
