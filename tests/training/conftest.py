"""A tiny training stage that any test can start, stop and look at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.training.tiny import make_training


@pytest.fixture
def training(encoded_rows: list[Any], tiny_tokenizer: Any) -> Callable[..., Any]:
    def make(folder: Path, **settings: Any) -> Any:
        return make_training(folder, encoded_rows, len(tiny_tokenizer), **settings)

    return make
