"""The model a stage leaves is the one it trained, for each way of name weights; other models are detected."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from corral.data.example_store import Example
from corral.export import contract
from corral.messages import Conversation
from corral.model import adapters, merging
from corral.model.loading import load_model
from corral.recipe import Lora, Optimizer, Train
from corral.storage import write_json
from corral.template import Encoded, Template
from corral.training import trained_model
from corral.training.loop import Trainer
from corral.training.trained_model import TrainingSetup, ValidationSet
from tests.training.tiny import make_examples, make_trainer, run_until

LORA = Lora(rank=4, alpha=8)
CONFIGS = {
    "plain": Train(lora=LORA),
    "nf4": Train(lora=LORA, quantization="nf4"),
    "int8": Train(lora=LORA, quantization="int8"),
}


@pytest.fixture
def make_stage(tiny_folder: Path, tmp_path: Path) -> Callable[[Train], TrainingSetup]:
    """Creates a stage's setup, and an adapter in `tmp_path` that changes the model much."""

    def make(config: Train) -> TrainingSetup:
        setup = TrainingSetup(tiny_folder, config, "cpu", "float32")
        model: Any = trained_model.make_trainable(trained_model.load_base(setup), setup, seed=3)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        (tmp_path / trained_model.ADAPTER_FOLDER).mkdir()
        adapters.save(model, tmp_path / trained_model.ADAPTER_FOLDER, base="tiny")
        return setup

    return make


def merge(setup: TrainingSetup, stage: Path, template: Template, validation: ValidationSet) -> list[str]:
    output: list[str] = []
    trained_model.save_merged_model(setup, stage, template, validation, licences=(), report=output.append)
    return output


def checks(
    setup: TrainingSetup, stage: Path, template: Template, validation: ValidationSet
) -> dict[str, contract.Check]:
    _, results = trained_model.check_merged_model(
        setup, stage, stage / trained_model.MERGED_FOLDER, contract.make_probes(template), validation
    )
    return {check.name: check for check in results}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_merged_model_is_what_was_trained(
    name: str, make_stage: Callable[[Train], TrainingSetup], template: Template, encoded_rows: list[Any], tmp_path: Path
) -> None:
    setup, validation = make_stage(CONFIGS[name]), ValidationSet(make_examples(encoded_rows[:6]), 128)
    assert merge(setup, tmp_path, template, validation) == []
    results = checks(setup, tmp_path, template, validation)
    assert all(check.passed for check in results.values()), results
    assert ("held-out loss, merged and int8" in results) == (name == "int8")


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_a_merge_into_full_precision_recorded_as_dequantised_is_detected(
    name: str, make_stage: Callable[[Train], TrainingSetup], template: Template, encoded_rows: list[Any], tmp_path: Path
) -> None:
    setup, validation = make_stage(CONFIGS[name]), ValidationSet(make_examples(encoded_rows[:6]), 128)
    merge(setup, tmp_path, template, validation)
    shutil.rmtree(tmp_path / trained_model.MERGED_FOLDER)
    (tmp_path / trained_model.MERGED_FOLDER).mkdir()
    other = merging.merge_adapter(adapters.load(load_model(setup.folder), tmp_path / trained_model.ADAPTER_FOLDER))
    merging.save_model(other, template, tmp_path / trained_model.MERGED_FOLDER, licences=())
    assert not checks(setup, tmp_path, template, validation)["adapter and merged model"].passed


def test_an_int8_model_with_a_higher_loss_after_the_merge_is_detected(
    make_stage: Callable[[Train], TrainingSetup], template: Template, encoded_rows: list[Any], tmp_path: Path
) -> None:
    setup = make_stage(CONFIGS["int8"])
    merge(setup, tmp_path, template, ValidationSet((), 128))
    trained = load_model(tmp_path / trained_model.MERGED_FOLDER)
    rows = answered_by(trained, encoded_rows)
    (tmp_path / "elsewhere").mkdir()
    with torch.no_grad():
        trained.get_parameter("model.norm.weight").mul_(0.7)
    merging.save_model(trained, template, tmp_path / "elsewhere", licences=())
    _, results = trained_model.check_merged_model(
        setup, tmp_path, tmp_path / "elsewhere", contract.make_probes(template), ValidationSet(rows, 128)
    )
    (check,) = [check for check in results if check.name == "held-out loss, merged and int8"]
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
    better: str,
    make_stage: Callable[[Train], TrainingSetup],
    template: Template,
    encoded_rows: list[Any],
    tmp_path: Path,
) -> None:
    setup = make_stage(Train(lora=LORA, quantization="nf4", merge="best"))
    adapted = (
        trained_model.load_as_trained(setup, tmp_path)
        if better == "dequantised"
        else adapters.load(load_model(setup.folder), tmp_path / trained_model.ADAPTER_FOLDER)
    )
    validation = ValidationSet(answered_by(adapted, encoded_rows), 128)
    (output,) = merge(setup, tmp_path, template, validation)
    record = json.loads((tmp_path / trained_model.MERGING_FILE).read_text())
    assert record["into"] == better == min(record["losses"], key=record["losses"].get)
    assert len(record["losses"]) == 2
    assert all(f"{loss:.4f}" in output for loss in record["losses"].values())
    assert validation.loss(load_model(tmp_path / trained_model.MERGED_FOLDER)) == pytest.approx(
        record["losses"][better], abs=1e-5
    )
    results = checks(setup, tmp_path, template, validation)
    assert all(check.passed for check in results.values()), results
    assert results["choice of the merge"].detail == output


def test_the_validation_loss_is_that_of_the_trainer(
    make_stage: Callable[[Train], TrainingSetup], encoded_rows: list[Any], tmp_path: Path
) -> None:
    setup = make_stage(CONFIGS["plain"])
    model = trained_model.make_trainable(trained_model.load_base(setup), setup, seed=3)
    trainer = make_trainer(model, encoded_rows, setup.config, tmp_path, pack_length=128)
    assert ValidationSet(trainer.held_out, 128).loss(model) == pytest.approx(trainer.evaluate(), rel=1e-6)


def full_trainer(setup: TrainingSetup, folder: Path, encoded: list[Any]) -> Trainer:
    model = trained_model.make_trainable(trained_model.load_base(setup), setup, seed=3)
    return make_trainer(model, encoded, setup.config, folder, pack_length=128, seed=0)


def save_full_model(trainer: Trainer, setup: TrainingSetup, stage: Path, template: Template) -> None:
    probes = contract.make_probes(template)
    scores = trainer.score([p.ids for p in probes], [p.start for p in probes])
    trained_model.save_full_model(trainer.model, trainer.weights(), scores, setup, stage, template, ())  # pyright: ignore


def test_a_full_model_is_trained_resumed_and_saved_exactly(
    tiny_folder: Path, template: Template, encoded_rows: list[Any], tmp_path: Path
) -> None:
    config = Train(method="full", steps=6, batch_size=4, checkpoint_every=2, optimizer=Optimizer(lr=1e-3))
    setup = TrainingSetup(tiny_folder, config, "cpu", "float32")
    uninterrupted = full_trainer(setup, tmp_path / "uninterrupted", encoded_rows)
    uninterrupted.run()
    run_until(full_trainer(setup, tmp_path / "stopped", encoded_rows), 3)
    resumed = full_trainer(setup, tmp_path / "stopped", encoded_rows)
    resumed.run()
    initial = load_model(tiny_folder).state_dict()
    for name, value in uninterrupted.weights().items():
        assert torch.equal(resumed.weights()[name], value), name
        assert not torch.equal(initial[name], value), f"{name} was not trained"

    save_full_model(resumed, setup, tmp_path, template)
    validation = ValidationSet(resumed.held_out, 128)
    results = checks(setup, tmp_path, template, validation)
    assert list(results) == ["trained and saved weights", "trained and saved model"]
    assert all(check.passed for check in results.values()), results
    shutil.rmtree(tmp_path / trained_model.MERGED_FOLDER)
    shutil.copytree(tiny_folder, tmp_path / trained_model.MERGED_FOLDER)
    assert not any(check.passed for check in checks(setup, tmp_path, template, validation).values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_only_the_rounded_weights_pass_as_a_full_model_written_in_16_bits(
    dtype: Literal["bfloat16", "float16"],
    tiny_folder: Path,
    template: Template,
    encoded_rows: list[Any],
    tmp_path: Path,
) -> None:
    config = Train(method="full", steps=4, batch_size=4, optimizer=Optimizer(lr=1e-3))
    setup = TrainingSetup(tiny_folder, config, "cpu", dtype)
    trainer = full_trainer(setup, tmp_path, encoded_rows)
    trainer.run()
    save_full_model(trainer, setup, tmp_path, template)
    validation = ValidationSet(trainer.held_out, 128)
    results = checks(setup, tmp_path, template, validation)
    assert len(results) == 3
    assert all(check.passed for check in results.values()), results

    file = tmp_path / trained_model.MERGED_FOLDER / "model.safetensors"
    written = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    one_off = written[name].clone()
    one_off[0, 0] = torch.nextafter(one_off[0, 0], torch.tensor(9.0, dtype=one_off.dtype))
    save_file(written | {name: one_off}, file, metadata={"format": "pt"})
    results = checks(setup, tmp_path, template, validation)
    assert not results["trained and saved weights"].passed
    assert name in results["trained and saved weights"].detail

    save_file(written | {name: written[name].flip(0).contiguous()}, file, metadata={"format": "pt"})
    results = checks(setup, tmp_path, template, validation)
    assert not results["trained and saved weights"].passed
    assert not results["trained and saved model"].passed

    save_file(written, file, metadata={"format": "pt"})
    settings = json.loads((tmp_path / trained_model.MERGED_FOLDER / "config.json").read_text())
    settings["rms_norm_eps"] = 0.5
    write_json(tmp_path / trained_model.MERGED_FOLDER / "config.json", settings)
    results = checks(setup, tmp_path, template, validation)
    assert results["trained and saved weights"].passed
    assert not results["trained and saved model"].passed
