"""The command line as users call it, on the tiny recipe."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conftest import write_workspace


@pytest.fixture
def workspace(tiny_folder: Path, tmp_path: Path) -> Path:
    """A folder with `r.toml` and `rows.jsonl` that has not been run."""
    folder = tmp_path / "workspace"
    folder.mkdir()
    write_workspace(folder, tiny_folder)
    return folder


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "CORRAL_CACHE"):
        monkeypatch.delenv(name, raising=False)
    os.environ["COLUMNS"] = "120"
