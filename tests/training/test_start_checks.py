"""What must hold before the first step: the reference is the start model, whose prompts are tokenised as they are here."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from corral.data.example_store import Example
from corral.errors import CheckpointError, TemplateError
from corral.messages import Conversation, Preference
from corral.template import Template
from corral.training.loop import Trainer
from corral.training.reference_logprobs import format_line
from corral.training.start_checks import check_prompts, check_reference, reference_tolerance
from tests.model.tiny import fill_lora_b

MakeTrainer = Callable[..., Trainer]


def check(trainer: Trainer, folder: Path) -> None:
    """As the guards do it."""
    tolerance = reference_tolerance("float32", trainer.config.quantization)
    sides = {"validation": trainer.held_out, "train": trainer.examples}
    check_reference(trainer.objective, sides, trainer.scorer, tolerance, folder / "reference")


@pytest.mark.parametrize("objective", ["dpo", "ipo", "kto", "ulma"])
@pytest.mark.parametrize("settings", [{}, {"quantization": "int8"}, {"dropout": 0.5}], ids=str)
def test_the_model_that_a_stage_starts_from_is_its_reference_with_dropout_off(
    objective: str, settings: dict[str, Any], tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer = tiny_trainer(tmp_path, objective=objective, **settings)
    trainer.prepare_reference()
    check(trainer, tmp_path)


@pytest.mark.parametrize(
    ("objective", "value"), [("dpo", math.log(2)), ("ipo", 25.0), ("kto", 0.5), ("orpo", None), ("simpo", None)]
)
def test_the_log_probabilities_of_another_model_are_refused_with_what_the_loss_should_begin_with(
    objective: str, value: float | None, tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """The reference is the raw base, and the model in training is one that was fine-tuned: the adapter that is not merged."""
    trainer = tiny_trainer(
        tmp_path, objective=objective, **({"dpo": {"sft_weight": 0.0}} if objective == "dpo" else {})
    )
    trainer.prepare_reference()
    fill_lora_b(trainer.model, 0.02)
    if value is None:
        return check(trainer, tmp_path)  # it has no reference
    with pytest.raises(CheckpointError) as caught:
        check(trainer, tmp_path)
    assert "per token on average (allowed 0.0001)" in caught.value.what
    assert f"where it should be {value:.4f}" in caught.value.what
    assert "reference/validation.jsonl; most of all made row" in str(caught.value.where)
    return None


def test_one_file_of_other_values_is_refused_though_its_header_is_right(
    tiny_trainer: MakeTrainer, tmp_path: Path
) -> None:
    tiny_trainer(tmp_path, objective="dpo").prepare_reference()
    path = tmp_path / "reference" / "train.jsonl"
    header, *lines = path.read_text("utf-8").splitlines(keepends=True)
    changed = [
        format_line(
            json.loads(header)["identity"], line["start"], [[value - 3 for value in row] for row in line["logprobs"]]
        )
        for line in map(json.loads, lines)
    ]
    path.write_text("".join([header, *changed]), "utf-8")
    trainer = tiny_trainer(tmp_path, objective="dpo")
    trainer.prepare_reference()
    with pytest.raises(CheckpointError, match="is not the model that this stage starts from") as caught:
        check(trainer, tmp_path)
    assert "train.jsonl" in str(caught.value.where)


def rows() -> list[Example]:
    prompt = Conversation.from_turns(("user", "What is 2 + 2?"))
    return [Example("0" * 64, "pairs.jsonl", 7, (), Preference(prompt, "Four.", "Five."))]


@pytest.fixture
def other_template(tiny_folder: Path, tmp_path: Path) -> Path:
    """The tiny model with a template that writes something before each prompt."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "other"))
    path = folder / "chat_template.jinja"
    path.write_text("{{ 'Chat. ' }}" + path.read_text("utf-8"), "utf-8")
    return folder


def test_equal_templates_and_a_base_without_one_raise_no_word(
    template: Template, tiny_folder: Path, tmp_path: Path
) -> None:
    assert check_prompts(template, rows(), tiny_folder, stage=None) is None
    assert check_prompts(template, rows(), tiny_folder, stage="train-1-sft") is None
    bare = Path(shutil.copytree(tiny_folder, tmp_path / "bare"))
    (bare / "chat_template.jinja").unlink()
    assert check_prompts(template, rows(), bare, stage=None) is None


def test_prompts_that_a_stage_of_this_run_knows_otherwise_are_refused(template: Template, other_template: Path) -> None:
    with pytest.raises(TemplateError, match="not tokenised as in train-1-sft") as caught:
        check_prompts(template, rows(), other_template, stage="train-1-sft")
    assert "pairs.jsonl row 7" in str(caught.value.where)


def test_a_base_with_another_chat_template_is_warned_of(template: Template, other_template: Path) -> None:
    warning = check_prompts(template, rows(), other_template, stage=None)
    assert warning is not None
    assert "chat template of its own" in warning
    assert "pairs.jsonl row 7" in warning
