"""One tiny recipe, run once from the command line, that many tests look at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RECIPE = """
name = "tiny"
seed = 3
[model]
base = "{model}"
[data]
max_length = 128
[[data.sources]]
path = "rows.jsonl"
[data.split]
validation = 0.15
test = 0.2
[[train]]
steps = 8
batch_size = 4
evaluate_every = 4
checkpoint_every = 2
[train.lora]
rank = 4
[train.optimizer]
lr = 5e-3
[evaluate]
loss_rows = 12
answer_rows = 6
[answer]
max_tokens = 12
"""


def corral(*args: object, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does."""
    command = [sys.executable, "-m", "corral", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


def write_rows(path: Path, n: int = 80) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} plus {i}?"},
                {"role": "assistant", "content": f"{2 * i}."},
            ]
        }
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def workspace(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Makes a new folder with `r.toml` and `rows.jsonl`; returns its path."""

    def make() -> Path:
        folder = tmp_path_factory.mktemp("workspace")
        (folder / "r.toml").write_text(RECIPE.format(model=tiny_folder))
        write_rows(folder / "rows.jsonl")
        return folder

    return make


@pytest.fixture(scope="session")
def finished(workspace: Callable[[], Path]) -> Path:
    """A workspace whose recipe ran to the end in `run/`. Look, do not touch: copy it first."""
    folder = workspace()
    done = corral("run", folder / "r.toml", "--out", folder / "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "CORRAL_CACHE"):
        monkeypatch.delenv(name, raising=False)
    os.environ["COLUMNS"] = "120"
