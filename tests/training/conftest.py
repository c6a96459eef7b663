"""A tiny training stage that a test can start, stop and inspect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from corral.training.loop import Trainer
from tests.training.tiny import make_tiny_trainer


@pytest.fixture(scope="session")
def tiny_trainer(encoded_rows: list[Any], tiny_folder: Path) -> Callable[..., Trainer]:
    """Creates a trainer in a folder; see `make_tiny_trainer` for its settings."""

    def make(folder: Path, **settings: Any) -> Trainer:
        return make_tiny_trainer(folder, encoded_rows, tiny_folder, **settings)

    return make
