"""Log-probabilities of the reference: those of the model that the stage starts from, kept, resumed and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from corral.errors import CheckpointError, TrainingError
from corral.training import reference_logprobs as reference
from corral.training.loop import Trainer
from corral.training.objectives import trained_positions
from tests.model.tiny import fill_lora_b, plain_logprobs
from tests.training.tiny import run_until

MakeTrainer = Callable[..., Trainer]


def logprobs(trainer: Trainer) -> list[tuple[float, ...]]:
    trainer.prepare_reference()
    rows: Any = trainer.examples
    return [rows[i].reference for i in range(len(rows))]


def adapter_off(trainer: Trainer) -> list[tuple[float, ...]]:
    """By PEFT and transformers alone, with the adapter disabled."""
    results: list[tuple[float, ...]] = []
    with trainer.model.disable_adapter(), torch.no_grad():
        for i in range(len(trainer.examples)):
            sums: list[float] = []
            for sequence in trainer.examples[i].sequences:
                chosen = torch.tensor(trained_positions(sequence)) - 1
                sums.append(plain_logprobs(trainer.model, sequence.ids)[chosen].sum().item())
            results.append(tuple(sums))
    return results


@pytest.mark.parametrize("settings", [{}, {"quantization": "nf4"}, {"quantization": "int8"}], ids=str)
def test_stored_log_probabilities_equal_the_adapter_switched_off_even_after_training(
    settings: dict[str, Any], tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer = tiny_trainer(tmp_path, objective="dpo", **settings)
    trainer.run()
    # LLM.int8 rounds the inputs of a whole pass together.
    tolerance = 0.05 if settings.get("quantization") == "int8" else 1e-4
    for stored, off in zip(logprobs(trainer), adapter_off(trainer), strict=True):
        assert stored == pytest.approx(off, rel=tolerance)


def test_with_all_weights_trained_it_stays_the_model_of_the_start(tiny_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, objective="dpo", method="full", lr=1e-3)
    before = trainer.scorer.sums([trainer.examples[i] for i in range(3)])
    trainer.run()
    for stored, at_start in zip(logprobs(trainer), before, strict=False):
        assert stored == pytest.approx(at_start, rel=1e-5)
    assert trainer.scorer.sums([trainer.examples[i] for i in range(3)])[0] != pytest.approx(before[0], rel=1e-2)


def test_an_interrupted_pass_goes_on_where_it_was_and_ends_with_the_same_numbers(
    tiny_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "ROWS_PER_LINE", 4)
    whole = logprobs(tiny_trainer(tmp_path / "whole", objective="dpo"))
    stopped, counts = tiny_trainer(tmp_path / "stopped", objective="dpo"), list[int]()
    with pytest.raises(KeyboardInterrupt):
        stopped.prepare_reference(on_rows=counts.append, should_stop=lambda: len(counts) == 3)
    path = tmp_path / "stopped" / "reference" / "train.jsonl"
    with path.open("a") as file:
        file.write('{"start": 8, "logprobs": [[-1.0, -2')  # killed while it wrote a line
    resumed = tiny_trainer(tmp_path / "stopped", objective="dpo")
    computed: list[int] = []
    sums = resumed.scorer.sums
    resumed.scorer.sums = lambda batch: computed.append(len(batch)) or sums(batch)
    assert logprobs(resumed) == whole
    assert sum(computed) == len(whole) - 8, "the first line was of the held-out rows"
    assert path.read_bytes() == (tmp_path / "whole" / "reference" / "train.jsonl").read_bytes()


def test_a_stage_with_another_beta_takes_over_what_was_computed(tiny_trainer: MakeTrainer, tmp_path: Path) -> None:
    first = logprobs(tiny_trainer(tmp_path / "first", objective="dpo"))
    computed: list[int] = []

    def trainer(folder: str, start: str = "") -> Trainer:
        made = tiny_trainer(tmp_path / folder, objective="dpo", dpo={"beta": 0.5})
        sums, made.start = made.scorer.sums, start
        made.scorer.sums = lambda batch: computed.append(len(batch)) or sums(batch)
        return made

    second = trainer("second")
    second.prepare_reference(earlier=[tmp_path / "none", tmp_path / "first"])
    assert (logprobs(second), computed) == (first, [])
    names = ("train.jsonl", "validation.jsonl")
    assert all(
        (tmp_path / "second" / "reference" / name).read_bytes()
        == (tmp_path / "first" / "reference" / name).read_bytes()
        for name in names
    )
    third = trainer("third", start="another model")
    third.prepare_reference(earlier=[tmp_path / "first"])
    assert sum(computed) == len(third.examples) + len(third.held_out)


def test_a_resumed_stage_keeps_the_reference_of_its_start(tiny_trainer: MakeTrainer, tmp_path: Path) -> None:
    first = tiny_trainer(tmp_path, objective="dpo")
    run_until(first, 5)
    resumed = tiny_trainer(tmp_path, objective="dpo")
    resumed.run()
    assert logprobs(resumed) == logprobs(first)


def test_the_reference_of_another_model_or_other_rows_is_refused(
    tiny_trainer: MakeTrainer, encoded_rows: list[Any], tmp_path: Path
) -> None:
    tiny_trainer(tmp_path, objective="dpo").prepare_reference()
    other = tiny_trainer(tmp_path, objective="dpo")
    other.start = "another model"
    with pytest.raises(CheckpointError, match="of another model or of other rows") as caught:
        other.run()
    assert "validation.jsonl" in str(caught.value)
    with pytest.raises(CheckpointError, match="of another model or of other rows"):
        tiny_trainer(tmp_path, objective="dpo", held_out=5).run()


def test_a_changed_or_damaged_reference_is_refused_and_computed_again_once_it_is_removed(
    tiny_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "ROWS_PER_LINE", 4)
    first = logprobs(tiny_trainer(tmp_path, objective="dpo"))
    path = tmp_path / "reference" / "train.jsonl"
    header, line, *rest = path.read_text().splitlines(keepends=True)
    identity, values = json.loads(header)["identity"], json.loads(line)["logprobs"]
    moved = json.loads(line) | {"logprobs": [[value + 50 for value in row] for row in values]}
    damaged = {
        "changed values": json.dumps(moved) + "\n",
        "one value for each pair": reference.format_line(identity, 0, [row[:1] for row in values]),
        "no numbers": reference.format_line(identity, 0, [[float("nan")] * 2 for _ in values]),
        "a lost line": "",
        "other text": "spoilt\n",
    }
    again = tiny_trainer(tmp_path, objective="dpo")
    for spoilt in damaged.values():
        path.write_text("".join([header, spoilt, *rest]))
        with pytest.raises(CheckpointError, match="damaged: line 2 is not as it was written") as caught:
            again.prepare_reference()
        assert caught.value.where == str(path)
    other = tiny_trainer(tmp_path / "other", objective="dpo", dpo={"beta": 0.5})
    other.prepare_reference(earlier=[tmp_path])
    assert logprobs(other) == first, "what is damaged is not taken over from an earlier stage"
    path.unlink()
    assert logprobs(again) == first


def test_a_reference_that_is_no_number_names_the_row(tiny_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, objective="dpo", held_out=0)
    fill_lora_b(trainer.model, float("nan"))
    with pytest.raises(TrainingError, match="log-probability nan") as caught:
        trainer.run()
    assert caught.value.where == "made row 0"


def test_nothing_is_stored_for_an_objective_without_a_reference(tiny_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, objective="simpo", steps=2)
    trainer.run()
    assert not (tmp_path / "reference").exists()
    assert trainer.reference_rows == 0
