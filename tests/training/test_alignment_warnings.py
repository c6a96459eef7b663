"""What is said before a stage aligns a model: of its settings, and of rows prepared from files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from corral.data.prepare import Prepared, prepare
from corral.recipe import Data, Optimizer, Source, Split, Train
from corral.template import Template
from corral.training.alignment_warnings import row_warnings, settings_warnings
from corral.training.stage_rows import StageRows
from tests.data.conftest import source, write_rows

Prepare = Callable[..., Prepared]
TWO = Split(validation=0, test=0)


@pytest.fixture
def prepared(tiny_tokenizer: Any, tmp_path: Path) -> Prepare:
    """`prepared(source, …, split=…)`: prepare the sources."""

    def prepare_sources(*sources: Source, split: Split = TWO, **settings: Any) -> Prepared:
        folder = tmp_path / "prepared"
        folder.mkdir()
        data = Data(sources=sources, split=split, **settings)
        template = Template.load(tiny_tokenizer, "chatml")
        return prepare(data, template, folder, 0, cache=tmp_path / "cache", workers=1)

    return prepare_sources


def warnings_of(rows: Prepared, **settings: Any) -> list[str]:
    stage = Train.model_validate(settings)
    return row_warnings(rows, stage, StageRows.select(rows, stage, 1))


def pair(number: int, chosen: str = "1 2 3 4 5", rejected: str = "5 4 3 2 1") -> dict[str, str]:
    return {"prompt": f"Is {number} a number?", "chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize(
    ("method", "lr", "usual"),
    [("lora", 2e-4, "5e-06"), ("lora", 4e-5, None), ("full", 1e-5, "5e-07"), ("full", 4e-6, None)],
)
def test_a_learning_rate_of_fine_tunings_size_is_named_with_a_usual_one(
    method: str, lr: float, usual: str | None
) -> None:
    stage = Train.model_validate({"objective": "dpo", "method": method, "optimizer": Optimizer(lr=lr)})
    warnings = settings_warnings(stage, None)
    assert len(warnings) == (usual is not None)
    assert usual is None or usual in warnings[0]
    assert settings_warnings(Train(optimizer=Optimizer(lr=lr)), None) == [], "it is none of alignment"


def test_a_base_model_without_a_chat_template_is_not_ready_for_preferences(
    bare_folder: Path, tiny_folder: Path
) -> None:
    (warning,) = settings_warnings(Train(objective="dpo"), bare_folder)
    assert 'a stage with `objective` = "sft" before it' in warning
    assert settings_warnings(Train(objective="dpo"), tiny_folder) == []
    assert settings_warnings(Train(objective="orpo"), bare_folder) == [], "it fine-tunes at the same time"


@pytest.fixture(scope="module")
def bare_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's tokenizer without its chat template."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "tokenizer.json").write_bytes((tiny_folder / "tokenizer.json").read_bytes())
    config = json.loads((tiny_folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_rows_without_a_flaw_give_no_warning(prepared: Prepare, tmp_path: Path) -> None:
    rows = prepared(source(write_rows(tmp_path / "a.jsonl", [pair(n) for n in range(40)])), split=Split(test=8))
    assert [warnings_of(rows, objective=name) for name in ("dpo", "kto", "ulma")] == [[], [], []]


@pytest.mark.parametrize("objective", ["dpo", "ulma"])
def test_a_gap_of_lengths_is_said_with_both_means(prepared: Prepare, tmp_path: Path, objective: str) -> None:
    rows = prepared(source(write_rows(tmp_path / "a.jsonl", [pair(n, "Yes, " * 20) for n in range(20)])))
    (warning,) = warnings_of(rows, objective=objective)
    stage = Train(objective=objective)
    selected = StageRows.select(rows, stage, 1).train
    lengths = [sum(s.trained) for e in selected for s in e.sequences]
    for mean in (max(lengths), min(lengths)):
        assert f"{mean} tokens" in warning or f"worse ones {mean}" in warning
    assert "at greater length" in warning
    assert ("normalise" in warning) == (objective == "dpo")


def test_pairs_that_contradict_each_other_are_named(prepared: Prepare, tmp_path: Path) -> None:
    pairs = [pair(n) for n in range(10)] + [pair(4, "5 4 3 2 1", "1 2 3 4 5")]
    rows = prepared(source(write_rows(tmp_path / "a.jsonl", pairs)))
    (dpo,) = warnings_of(rows, objective="dpo")
    assert dpo.startswith("2 of 11 pairs contradict another one")
    assert "a row 5" in dpo
    assert "a row 11" in dpo
    dpo_too, kto = warnings_of(rows, objective="kto")
    assert dpo_too == dpo
    assert kto.startswith("2 answers are chosen in one pair and rejected in another")


def test_an_answer_with_a_good_and_a_bad_score_is_named(prepared: Prepare, tmp_path: Path) -> None:
    scores = [("1 2", 1.0), ("2 1", 0.0), ("1 2", 0.9), ("2 1", 0.1), ("1 2", 0.2)]
    scored = [{"prompt": "Is 1 a number?", "completion": answer, "score": score} for answer, score in scores]
    rows = prepared(source(write_rows(tmp_path / "a.jsonl", scored)))
    warning = warnings_of(rows, objective="ulma")[-1]
    assert warning.startswith("1 answer with scores on both sides of the threshold 0.5")
    assert all(f"a row {number}" in warning for number in (1, 3, 5))


@pytest.mark.parametrize("overlong", ["drop", "truncate"])
def test_rows_over_the_limit_are_counted(prepared: Prepare, tmp_path: Path, overlong: str) -> None:
    long = pair(3, f"Yes, {'it is ' * 60}", f"No, {'it is ' * 60}")
    rows = prepared(
        source(write_rows(tmp_path / "a.jsonl", [*(pair(n) for n in range(9) if n != 3), long])),
        max_length=60,
        overlong=overlong,
    )
    warnings = warnings_of(rows, objective="dpo")
    expected = {
        "drop": "1 of 9 rows of a are left out: longer than 60 tokens",
        "truncate": "1 of 9 rows are cut to `data.max_length`",
    }
    assert any(warning.startswith(expected[overlong]) for warning in warnings), warnings


def test_a_prompt_in_two_held_out_files_is_named(prepared: Prepare, tmp_path: Path) -> None:
    sides = {"train": range(10), "validation": range(20, 26), "test": range(24, 30)}
    files = [
        source(write_rows(tmp_path / f"{side}.jsonl", [pair(n) for n in numbers]), side=side)
        for side, numbers in sides.items()
    ]
    (warning,) = warnings_of(prepared(*files), objective="dpo")
    assert warning.startswith("2 prompts are on the sides `validation` and `test` (validation row 5, validation row 6)")
