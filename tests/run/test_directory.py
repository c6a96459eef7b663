"""A run directory is locked while it is written, and no other folder is taken for one."""

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
