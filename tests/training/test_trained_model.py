"""What a stage leaves is what it trained, for each way of holding weights; a merge into other weights is called what it is."""

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
from corral.training.objectives import OBJECTIVES
from corral.training.trained_model import TrainingSetup, ValidationSet
from tests.training.tiny import make_examples

LORA = Lora(rank=4, alpha=8)
HOLDINGS = {
    "plain": Train(lora=LORA),
    "nf4": Train(lora=LORA, quantization="nf4"),
    "int8": Train(lora=LORA, quantization="int8"),
}


@pytest.fixture
def staged(tiny_folder: Path, tmp_path: Path) -> Callable[[Train], TrainingSetup]:
    """Makes what a stage starts from, and leaves an adapter in `tmp_path` that changes much."""

    def make(config: Train) -> TrainingSetup:
        start = TrainingSetup(tiny_folder, config, "cpu", "float32")
        model: Any = trained_model.make_trainable(trained_model.load_base(start), start, seed=3)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        (tmp_path / trained_model.ADAPTER_FOLDER).mkdir()
        adapters.save(model, tmp_path / trained_model.ADAPTER_FOLDER, base="tiny")
        return start

    return make


def merge(start: TrainingSetup, stage: Path, template: Template, measure: ValidationSet) -> list[str]:
    said: list[str] = []
    trained_model.save_merged_model(start, stage, template, measure, licences=(), report=said.append)
    return said


def checks(start: TrainingSetup, stage: Path, template: Template, measure: ValidationSet) -> dict[str, contract.Check]:
    _, found = trained_model.check_merged_model(
        start, stage, stage / trained_model.MERGED_FOLDER, contract.make_probes(template), measure
    )
    return {check.name: check for check in found}


@pytest.mark.parametrize("holding", HOLDINGS)
def test_a_merged_model_is_what_was_trained(
    holding: str, staged: Callable[[Train], TrainingSetup], template: Template, encoded_rows: list[Any], tmp_path: Path
) -> None:
    start, measure = staged(HOLDINGS[holding]), ValidationSet(make_examples(encoded_rows[:6]), 128)
    assert merge(start, tmp_path, template, measure) == []
    found = checks(start, tmp_path, template, measure)
    assert all(check.passed for check in found.values()), found
    assert ("held-out loss, merged and int8" in found) == (holding == "int8")


@pytest.mark.parametrize("holding", ["nf4", "int8"])
def test_a_merge_into_full_precision_called_dequantised_is_caught(
    holding: str, staged: Callable[[Train], TrainingSetup], template: Template, encoded_rows: list[Any], tmp_path: Path
) -> None:
    start, measure = staged(HOLDINGS[holding]), ValidationSet(make_examples(encoded_rows[:6]), 128)
    merge(start, tmp_path, template, measure)
    shutil.rmtree(tmp_path / trained_model.MERGED_FOLDER)
    (tmp_path / trained_model.MERGED_FOLDER).mkdir()
    other = merging.merge_adapter(adapters.load(load_model(start.folder), tmp_path / trained_model.ADAPTER_FOLDER))
    merging.save_model(other, template, tmp_path / trained_model.MERGED_FOLDER, licences=())
    assert not checks(start, tmp_path, template, measure)["adapter and merged model"].passed


def test_an_int8_model_that_lost_by_merging_is_caught(
    staged: Callable[[Train], TrainingSetup], template: Template, encoded_rows: list[Any], tmp_path: Path
) -> None:
    start = staged(HOLDINGS["int8"])
    merge(start, tmp_path, template, ValidationSet((), 128))
    trained = load_model(tmp_path / trained_model.MERGED_FOLDER)
    rows = answered_by(trained, encoded_rows)
    (tmp_path / "elsewhere").mkdir()
    with torch.no_grad():
        trained.get_parameter("model.norm.weight").mul_(0.7)
    merging.save_model(trained, template, tmp_path / "elsewhere", licences=())
    _, found = trained_model.check_merged_model(
        start, tmp_path, tmp_path / "elsewhere", contract.make_probes(template), ValidationSet(rows, 128)
    )
    (check,) = [check for check in found if check.name == "held-out loss, merged and int8"]
    assert not check.passed
    assert "allowed +0.02" in check.detail


def answered_by(model: Any, encoded: list[Any]) -> list[Example]:
    """Rows whose answers are the model's own, so that no other has a lower loss on them."""
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
    better: str, staged: Callable[[Train], TrainingSetup], template: Template, encoded_rows: list[Any], tmp_path: Path
) -> None:
    start = staged(Train(lora=LORA, quantization="nf4", merge="best"))
    adapted = (
        trained_model.load_as_trained(start, tmp_path)
        if better == "dequantised"
        else adapters.load(load_model(start.folder), tmp_path / trained_model.ADAPTER_FOLDER)
    )
    measure = ValidationSet(answered_by(adapted, encoded_rows), 128)
    (said,) = merge(start, tmp_path, template, measure)
    record = json.loads((tmp_path / trained_model.MERGING_FILE).read_text())
    assert record["into"] == better == min(record["losses"], key=record["losses"].get)
    assert len(record["losses"]) == 2
    assert all(f"{loss:.4f}" in said for loss in record["losses"].values())
    assert measure.loss(load_model(tmp_path / trained_model.MERGED_FOLDER)) == pytest.approx(
        record["losses"][better], abs=1e-5
    )
    found = checks(start, tmp_path, template, measure)
    assert all(check.passed for check in found.values()), found
    assert found["choice of the merge"].detail == said


def test_the_measure_is_the_loss_that_training_tells(
    staged: Callable[[Train], TrainingSetup], encoded_rows: list[Any], tmp_path: Path
) -> None:
    start, rows = staged(HOLDINGS["plain"]), make_examples(encoded_rows)
    model = trained_model.make_trainable(trained_model.load_base(start), start, seed=3)
    training = Trainer(
        model,
        rows[8:],
        rows[:8],
        OBJECTIVES["sft"],
        start.config,
        pack_length=128,
        seed=0,
        folder=tmp_path,
        save_best=lambda _: None,
    )
    assert ValidationSet(rows[:8], 128).loss(model) == pytest.approx(training.evaluate(), rel=1e-6)


def train_whole(start: TrainingSetup, folder: Path, rows: list[Example], *, stop_after: int | None = None) -> Any:
    model = trained_model.make_trainable(trained_model.load_base(start), start, seed=3)
    folder.mkdir(exist_ok=True)
    training = Trainer(
        model,
        rows[4:],
        rows[:4],
        OBJECTIVES["sft"],
        start.config,
        pack_length=128,
        seed=0,
        folder=folder,
        save_best=lambda _: None,
    )
    steps: list[int] = []
    training.run(on_step=lambda line: steps.append(line.step), should_stop=lambda: steps[-1] == stop_after)
    return training


def test_a_whole_model_is_trained_resumed_and_saved_as_it_is(
    tiny_folder: Path, template: Template, encoded_rows: list[Any], tmp_path: Path
) -> None:
    config = Train(method="full", steps=6, batch_size=4, checkpoint_every=2, optimizer=Optimizer(lr=1e-3))
    start, rows = TrainingSetup(tiny_folder, config, "cpu", "float32"), make_examples(encoded_rows)
    through = train_whole(start, tmp_path / "through", rows)
    with pytest.raises(KeyboardInterrupt):
        train_whole(start, tmp_path / "stopped", rows, stop_after=3)
    resumed = train_whole(start, tmp_path / "stopped", rows)
    begun = load_model(tiny_folder).state_dict()
    for name, value in through.weights().items():
        assert torch.equal(resumed.weights()[name], value), name
        assert not torch.equal(begun[name], value), f"{name} was not trained"

    save_whole(resumed, start, tmp_path, template)
    measure = ValidationSet(rows[:4], 128)
    found = checks(start, tmp_path, template, measure)
    assert list(found) == ["trained and saved weights", "trained and saved model"]
    assert all(check.passed for check in found.values()), found
    shutil.rmtree(tmp_path / trained_model.MERGED_FOLDER)
    shutil.copytree(tiny_folder, tmp_path / trained_model.MERGED_FOLDER)
    assert not any(check.passed for check in checks(start, tmp_path, template, measure).values())


def save_whole(training: Any, start: TrainingSetup, stage: Path, template: Template) -> None:
    probe_set = contract.make_probes(template)
    scores = training.score([p.ids for p in probe_set], [p.start for p in probe_set])
    trained_model.save_full_model(training.model, training.weights(), scores, start, stage, template, ())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_whole_model_written_in_16_bits_is_the_trained_one_rounded_and_no_other(
    dtype: Literal["bfloat16", "float16"],
    tiny_folder: Path,
    template: Template,
    encoded_rows: list[Any],
    tmp_path: Path,
) -> None:
    config = Train(method="full", steps=4, batch_size=4, optimizer=Optimizer(lr=1e-3))
    start, rows = TrainingSetup(tiny_folder, config, "cpu", dtype), make_examples(encoded_rows)
    save_whole(train_whole(start, tmp_path, rows), start, tmp_path, template)
    measure = ValidationSet(rows[:4], 128)
    found = checks(start, tmp_path, template, measure)
    assert len(found) == 3
    assert all(check.passed for check in found.values()), found

    file = tmp_path / trained_model.MERGED_FOLDER / "model.safetensors"
    written = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    one_off = written[name].clone()
    one_off[0, 0] = torch.nextafter(one_off[0, 0], torch.tensor(9.0, dtype=one_off.dtype))
    save_file(written | {name: one_off}, file, metadata={"format": "pt"})
    found = checks(start, tmp_path, template, measure)
    assert not found["trained and saved weights"].passed
    assert name in found["trained and saved weights"].detail

    save_file(written | {name: written[name].flip(0).contiguous()}, file, metadata={"format": "pt"})
    found = checks(start, tmp_path, template, measure)
    assert not found["trained and saved weights"].passed
    assert not found["trained and saved model"].passed

    save_file(written, file, metadata={"format": "pt"})
    settings = json.loads((tmp_path / trained_model.MERGED_FOLDER / "config.json").read_text())
    settings["rms_norm_eps"] = 0.5
    write_json(tmp_path / trained_model.MERGED_FOLDER / "config.json", settings)
    found = checks(start, tmp_path, template, measure)
    assert found["trained and saved weights"].passed
    assert not found["trained and saved model"].passed
