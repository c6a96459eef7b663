"""The command line as users call it, on the tiny recipe."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_workspace
from tests.forked import corral


def succeed(*args: object, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line, and assert that it succeeds."""
    done = corral(*args, **settings)
    assert done.returncode == 0, done.stderr
    return done


def fail(code: int, words: Sequence[str], *args: object, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line, and assert its exit code and that its error is a message with these words."""
    done = corral(*args, **settings)
    assert done.returncode == code, done.stderr
    for part in words:
        assert part in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture
def workspace(tiny_folder: Path, tmp_path: Path) -> Path:
    """A folder with `r.toml` and `rows.jsonl` that has not been run."""
    folder = tmp_path / "workspace"
    folder.mkdir()
    write_workspace(folder, tiny_folder)
    return folder


@pytest.fixture(autouse=True)
def _plain_terminal(unrendered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "CORRAL_CACHE"):
        monkeypatch.delenv(name, raising=False)
    os.environ["COLUMNS"] = "120"
