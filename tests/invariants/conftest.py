"""Rows, trainings and runs that the tests of interruptions compare with."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.invariants.work import Case, Job, corral, killed, train


@pytest.fixture(scope="session")
def rows(encoded_rows: list[Any], tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with rows and the model's folder, for other processes."""
    path = tmp_path_factory.mktemp("rows") / "rows"
    path.write_bytes(pickle.dumps((encoded_rows, tiny_folder)))
    return path


@pytest.fixture(scope="session")
def uninterrupted(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], tuple[Job, Path]]:
    """Returns a case's job and what it leaves when it runs to its end in a process of its own; each case runs once."""
    folders: dict[str, Path] = {}

    def run(case: Case) -> tuple[Job, Path]:
        job = Job(rows, case)
        if repr(case) not in folders:
            folder = tmp_path_factory.mktemp("uninterrupted")
            assert not killed(train(job, folder))
            folders[repr(case)] = folder
        return job, folders[repr(case)]

    return run


@pytest.fixture(scope="session")
def run_recipe(finished_run: Path) -> Callable[..., Any]:
    """Starts a process that runs the tiny recipe into a folder; see `work.corral`."""
    return lambda out, **options: corral("run", finished_run.parent / "r.toml", "--out", out, **options)
