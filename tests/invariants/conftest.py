"""What all trainings here train on, and a recipe that the whole pipeline runs."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import RECIPE, write_rows
from tests.invariants.work import corral


@pytest.fixture(scope="session")
def rows(encoded_rows: list[Any], tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with rows and the model's folder, for processes of their own."""
    path = tmp_path_factory.mktemp("rows") / "rows"
    path.write_bytes(pickle.dumps((encoded_rows, tiny_folder)))
    return path


@pytest.fixture(scope="session")
def recipe(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny recipe beside its rows."""
    folder = tmp_path_factory.mktemp("recipe")
    text = RECIPE.format(model=tiny_folder).replace("[evaluate]", '[evaluate]\nengine = "transformers"')
    (folder / "r.toml").write_text(text)
    write_rows(folder / "rows.jsonl")
    return folder / "r.toml"


@pytest.fixture(scope="session")
def run_recipe(recipe: Path) -> Callable[..., Any]:
    """Starts a process that runs the recipe into a folder; see `work.corral`."""
    return lambda out, *more, **settings: corral("run", recipe, "--out", out, *more, **settings)


@pytest.fixture(scope="session")
def finished(run_recipe: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the recipe leaves when nothing goes wrong."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    process = run_recipe(folder)
    process.join()
    assert process.exitcode == 0
    return folder
