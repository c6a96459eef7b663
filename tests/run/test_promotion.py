"""A run stands for one model, also after its stage has been superseded, and says what is wrong if it is gone."""

from __future__ import annotations

from pathlib import Path

import pytest

from corral.errors import RunError
from corral.run.promotion import MERGED_FOLDER, earlier_model_note, model_folder, promote, promote_start, read_promotion
from corral.run.stage_record import StageFolder, claim_stage, finish_stage

NAME = "train-1-sft"


def finish(run: Path, inputs: dict[str, int], name: str = NAME) -> StageFolder:
    """A finished training stage with a model."""
    stage = claim_stage(run, name, inputs)
    (stage.path / MERGED_FOLDER).mkdir()
    for name in ("config.json", "contract.json"):
        (stage.path / MERGED_FOLDER / name).write_text(f'{{"made from": {inputs}}}')
    finish_stage(stage, 1.0, {})
    return stage


def test_the_pointer_follows_the_model_into_the_superseded_stages_and_back(tmp_path: Path) -> None:
    first = finish(tmp_path, {"a": 1})
    promote(tmp_path, first, "it is the last")
    assert model_folder(tmp_path) == tmp_path / NAME / MERGED_FOLDER
    assert earlier_model_note(tmp_path) is None
    claim_stage(tmp_path, NAME, {"a": 2})
    assert model_folder(tmp_path).parent.parent.name == "superseded"
    assert "train-1-sft is being made again" in (earlier_model_note(tmp_path) or "")
    finish(tmp_path, {"a": 2})
    assert "train-1-sft as it is now was not promoted" in (earlier_model_note(tmp_path) or "")
    claim_stage(tmp_path, NAME, {"a": 1})
    assert model_folder(tmp_path) == tmp_path / NAME / MERGED_FOLDER


def test_a_run_without_a_model_stands_for_the_start_of_a_stage_that_may_not_be_promoted_until_another_is(
    tmp_path: Path,
) -> None:
    start, aligned = finish(tmp_path, {"a": 1}), finish(tmp_path, {"b": 1}, "train-2-dpo")
    assert promote_start(tmp_path, start, aligned.name)
    assert model_folder(tmp_path) == start.path / MERGED_FOLDER
    assert "train-2-dpo left no model that may be promoted" in (earlier_model_note(tmp_path) or "")
    again = finish(tmp_path, {"a": 2})
    assert promote_start(tmp_path, again, aligned.name), "it stands for the start of the stage as it is now"
    assert model_folder(tmp_path) == again.path / MERGED_FOLDER
    promote(tmp_path, again, "it is the last stage of another recipe")
    assert earlier_model_note(tmp_path) is None
    promote(tmp_path, aligned, "it is the last")
    assert not promote_start(tmp_path, again, aligned.name), "a run keeps the model that it has"
    assert model_folder(tmp_path) == aligned.path / MERGED_FOLDER
    assert earlier_model_note(tmp_path) is None


def test_promoting_the_same_model_again_writes_nothing(tmp_path: Path) -> None:
    stage = finish(tmp_path, {"a": 1})
    promote(tmp_path, stage, "first")
    promote(tmp_path, stage, "second")
    promotion = read_promotion(tmp_path)
    assert promotion is not None
    assert promotion.reason == "first"
    assert len(promotion.sha256) == 64


def test_a_model_that_is_gone_and_a_damaged_pointer_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="this run has no model yet"):
        model_folder(tmp_path)
    stage = finish(tmp_path, {"a": 1})
    promote(tmp_path, stage, "it is the last")
    (stage.path / MERGED_FOLDER / "config.json").unlink()
    with pytest.raises(RunError, match="made by train-1-sft, is not there any more"):
        model_folder(tmp_path)
    (tmp_path / "model").write_text('{"stage": ')
    with pytest.raises(RunError, match="the pointer to the run's model cannot be read"):
        model_folder(tmp_path)


def test_a_run_of_an_older_version_has_its_model_where_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "merge" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert model_folder(tmp_path) == folder
