"""A run directory is locked while it is written, and nothing in it is lost when the recipe changes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from corral.errors import RunError
from corral.recipe import Recipe, parse
from corral.run.directory import Run, environment
from tests.recipe.test_recipe import GOOD


@pytest.fixture
def recipe() -> Recipe:
    return parse(GOOD, where="x")


def finish(run: Run, inputs: dict[str, int], content: str = "x") -> None:
    stage = run.claim_stage("one", inputs)
    (stage.path / "out.txt").write_text(content)
    run.finish_stage(stage, 1.0)


def test_a_stage_is_done_for_the_same_inputs_and_not_for_others(recipe: Recipe, tmp_path: Path) -> None:
    with Run.open(tmp_path, recipe) as run:
        assert not run.claim_stage("one", {"a": 1}).done
        finish(run, {"a": 1})
        assert run.claim_stage("one", {"a": 1}).done
        assert not run.claim_stage("one", {"a": 2}).done


def test_a_superseded_stage_is_kept_and_comes_back_with_its_inputs(recipe: Recipe, tmp_path: Path) -> None:
    with Run.open(tmp_path, recipe) as run:
        finish(run, {"a": 1}, "first")
        finish(run, {"a": 2}, "second")
        back = run.claim_stage("one", {"a": 1})
        assert back.done
        assert (back.path / "out.txt").read_text() == "first"
        forth = run.claim_stage("one", {"a": 2})
        assert forth.done
        assert (forth.path / "out.txt").read_text() == "second"


def test_an_unfinished_stage_keeps_its_files_without_temporary_ones(recipe: Recipe, tmp_path: Path) -> None:
    with Run.open(tmp_path, recipe) as run:
        stage = run.claim_stage("one", {"a": 1})
        (stage.path / "half").write_text("x")
        (stage.path / ".corral-tmp-file").write_text("what a killed writer left")
        (stage.path / "deep" / ".corral-tmp-folder").mkdir(parents=True)
        again = run.claim_stage("one", {"a": 1})
        assert not again.done
        assert (again.path / "half").exists()
        assert not list(again.path.rglob(".corral-*"))


@pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: p.write_text("longer than it was")])
def test_a_stage_whose_output_is_missing_or_cut_is_not_done(damage, recipe: Recipe, tmp_path: Path) -> None:  # pyright: ignore
    with Run.open(tmp_path, recipe) as run:
        finish(run, {"a": 1})
        damage(tmp_path / "one" / "out.txt")
        assert not run.claim_stage("one", {"a": 1}).done


def test_a_half_written_stage_record_is_not_trusted(recipe: Recipe, tmp_path: Path) -> None:
    with Run.open(tmp_path, recipe) as run:
        finish(run, {"a": 1})
        (tmp_path / "one" / "stage.json").write_text('{"name": "one", "finger')
        assert not run.claim_stage("one", {"a": 1}).done
        assert list((tmp_path / "superseded").iterdir())


def test_a_run_in_use_names_the_process(recipe: Recipe, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from corral.run.directory import Run; from corral.recipe import parse\n"
        f"with Run.open(Path({str(tmp_path)!r}), parse({GOOD!r}, where='x')):\n"
        "    print('open', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "open\n"
    with pytest.raises(RunError, match=f"process {holder.pid}"), Run.open(tmp_path, recipe):
        pass
    holder.communicate()
    with Run.open(tmp_path, recipe):
        pass


def test_a_directory_with_other_files_or_another_recipes_run_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(RunError, match="is not a run"), Run.open(tmp_path, recipe):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]
    with Run.open(tmp_path / "run", recipe):
        pass
    other = recipe.model_copy(update={"name": "b"})
    with pytest.raises(RunError, match="belongs to the recipe 'a'"), Run.open(tmp_path / "run", other):
        pass
    with pytest.raises(RunError, match="not a run directory"):
        Run(tmp_path)


def test_the_environment_names_versions_and_no_host() -> None:
    import json
    import platform

    values = environment()
    assert values["packages"]["torch"]
    assert platform.node() not in json.dumps(values) or len(platform.node()) < 4
