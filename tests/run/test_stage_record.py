"""A stage is done for the same inputs while its outputs are whole, and nothing is lost when the recipe changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from corral.run.stage_record import Settings, claim_stage, earlier_folders, find_stage, finish_stage


def finish(run: Path, inputs: dict[str, Any], content: str = "x") -> None:
    stage = claim_stage(run, "one", inputs)
    (stage.path / "out.txt").write_text(content)
    finish_stage(stage, 1.0, {"device": "cpu"})


def test_a_stage_is_done_for_the_same_inputs_and_not_for_others(tmp_path: Path) -> None:
    assert not claim_stage(tmp_path, "one", {"a": 1}).done
    finish(tmp_path, {"a": 1})
    assert claim_stage(tmp_path, "one", {"a": 1}).done
    assert not claim_stage(tmp_path, "one", {"a": 2}).done


def test_a_superseded_stage_is_kept_and_comes_back_with_its_inputs(tmp_path: Path) -> None:
    finish(tmp_path, {"a": 1}, "first")
    finish(tmp_path, {"a": 2}, "second")
    back = claim_stage(tmp_path, "one", {"a": 1})
    assert back.done
    assert (back.path / "out.txt").read_text() == "first"
    forth = claim_stage(tmp_path, "one", {"a": 2})
    assert forth.done
    assert (forth.path / "out.txt").read_text() == "second"


def test_a_stage_may_take_over_from_its_superseded_folders_unless_it_is_made_again_from_the_start(
    tmp_path: Path,
) -> None:
    finish(tmp_path, {"a": 1}, "first")
    changed = claim_stage(tmp_path, "one", {"a": 2})
    (earlier,) = earlier_folders(changed.path)
    assert (earlier / "out.txt").read_text() == "first"
    finish(tmp_path, {"a": 2})
    again = claim_stage(tmp_path, "one", {"a": 2}, redo=True)
    assert earlier_folders(again.path) == []


def test_an_unfinished_stage_keeps_its_files_without_temporary_ones(tmp_path: Path) -> None:
    stage = claim_stage(tmp_path, "one", {"a": 1})
    (stage.path / "half").write_text("x")
    (stage.path / ".corral-tmp-file").write_text("what a killed writer left")
    (stage.path / "deep" / ".corral-tmp-folder").mkdir(parents=True)
    again = claim_stage(tmp_path, "one", {"a": 1})
    assert not again.done
    assert (again.path / "half").exists()
    assert not list(again.path.rglob(".corral-*"))


@pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: p.write_text("longer than it was")])
def test_a_stage_whose_output_is_missing_or_cut_is_not_done(damage, tmp_path: Path) -> None:  # pyright: ignore
    finish(tmp_path, {"a": 1})
    damage(tmp_path / "one" / "out.txt")
    assert not claim_stage(tmp_path, "one", {"a": 1}).done


@pytest.mark.parametrize("text", ['{"name": "one", "finger', "{}", "[]", "3"])
def test_a_damaged_stage_record_is_not_trusted(text: str, tmp_path: Path) -> None:
    finish(tmp_path, {"a": 1})
    (tmp_path / "one" / "stage.json").write_text(text)
    assert not claim_stage(tmp_path, "one", {"a": 1}).done
    assert list((tmp_path / "superseded").iterdir())


class Section(BaseModel):
    """A table of a recipe."""

    steps: int = 4
    names: tuple[str, ...] = ()


def test_a_setting_that_the_record_does_not_know_counts_as_its_default(tmp_path: Path) -> None:
    finish(tmp_path, {"train": Settings({"names": []}, {})})
    assert find_stage(tmp_path, "one", {"train": Settings.of(Section())}).done
    assert find_stage(tmp_path, "one", {"train": Settings.of(Section(steps=5))}).changed == ("train.steps",)
    assert find_stage(tmp_path, "one", {"train": Settings.of(Section(names=("a",)))}).changed == ("train.names",)


def test_made_again_on_request_it_has_another_fingerprint_and_the_old_one_does_not_come_back(tmp_path: Path) -> None:
    finish(tmp_path, {"a": 1}, "first")
    again = claim_stage(tmp_path, "one", {"a": 1}, redo=True)
    assert not again.done
    assert again.attempt == 2
    (again.path / "out.txt").write_text("second")
    finish_stage(again, 1.0, {})
    assert (claim_stage(tmp_path, "one", {"a": 1}).path / "out.txt").read_text() == "second"
    claim_stage(tmp_path, "one", {"a": 2})
    assert (claim_stage(tmp_path, "one", {"a": 1}).path / "out.txt").read_text() == "second", "the later of the two"
