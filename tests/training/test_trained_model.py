"""The model a stage leaves is the one it trained, for each way of holding weights; other models are detected."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from corral.data.example_store import Example
from corral.export import contract
from corral.messages import Conversation
from corral.model import adapters, merging
from corral.model.loading import load_model
from corral.recipe import Lora, Optimizer, Train
from corral.template import Encoded, Template
from corral.training import trained_model
from corral.training.loop import Trainer
from corral.training.trained_model import TrainingSetup, ValidationSet
from tests.conftest import change_json
from tests.model.tiny import fill_lora_b
from tests.training.tiny import make_examples, make_trainer, run_until

LORA = Lora(rank=4, alpha=8)
CONFIGS = {
    "plain": Train(lora=LORA),
    "nf4": Train(lora=LORA, quantization="nf4"),
    "int8": Train(lora=LORA, quantization="int8"),
}


@dataclass(frozen=True)
class Stage:
    """A stage's setup, its folder, and what is needed to save and check the model that it leaves."""

    setup: TrainingSetup
    folder: Path
    template: Template

    @property
    def merged(self) -> Path:
        return self.folder / trained_model.MERGED_FOLDER

    def merge(self, validation: ValidationSet) -> list[str]:
        output: list[str] = []
        trained_model.save_merged_model(
            self.setup, self.folder, self.template, validation, licences=(), report=output.append
        )
        return output

    def load_adapter(self) -> Any:
        """The base in full precision with the stage's adapter."""
        return adapters.load(load_model(self.setup.folder), self.folder / trained_model.ADAPTER_FOLDER)

    def check(self, validation: ValidationSet, model: Path | None = None) -> dict[str, contract.Check]:
        """Check the merged model, or another."""
        probes = contract.make_probes(self.template)
        model = model or self.merged
        _, results = trained_model.check_merged_model(self.setup, self.folder, model, probes, validation)
        return {check.name: check for check in results}

    def trainer(self, encoded: list[Any], folder: Path | None = None, seed: int = 0) -> Trainer:
        model = trained_model.make_trainable(trained_model.load_base(self.setup), self.setup, seed=3)
        return make_trainer(model, encoded, self.setup.config, folder or self.folder, pack_length=128, seed=seed)

    def save_full_model(self, trainer: Trainer) -> None:
        probes = contract.make_probes(self.template)
        scores = trainer.score([p.ids for p in probes], [p.start for p in probes])
        trained_model.save_full_model(
            trainer.model, trainer.weights(), scores, self.setup, self.folder, self.template, ()
        )


@pytest.fixture
def make_stage(tiny_folder: Path, template: Template, tmp_path: Path) -> Callable[..., Stage]:
    """Creates a stage in `tmp_path`; if it trains an adapter, with one that changes the model much."""

    def make(config: Train, dtype: Any = "float32") -> Stage:
        setup = TrainingSetup(tiny_folder, config, "cpu", dtype)
        if config.method != "full":
            model = fill_lora_b(trained_model.make_trainable(trained_model.load_base(setup), setup, seed=3), 0.02)
            (tmp_path / trained_model.ADAPTER_FOLDER).mkdir()
            adapters.save(model, tmp_path / trained_model.ADAPTER_FOLDER, base="tiny")
        return Stage(setup, tmp_path, template)

    return make


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


def answered_by(model: Any, encoded: list[Any]) -> list[Example]:
    """Rows whose answers are the model's own, so that no other model has a lower loss on them."""
    rows: list[Example] = []
    for i, row in enumerate(encoded[:6]):
        ids = list(row.ids[:20])
        with torch.no_grad():
            for _ in range(24):
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        answer = Encoded(tuple(ids), tuple([False] * 20 + [True] * 24))
        rows.append(Example(key=f"{i:064x}", source="made", index=i, sequences=(answer,), record=Conversation(())))
    return rows


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
