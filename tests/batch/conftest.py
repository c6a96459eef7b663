"""A batch in a folder of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.batch.work import Batch, question, write_prompts


@pytest.fixture
def make_batch(tiny_folder: Path, tmp_path: Path) -> Callable[..., Batch]:
    """Makes a batch of these rows, or of so many questions."""

    def make(rows: Iterable[Mapping[str, Any] | str] | int, **settings: Any) -> Batch:
        content = [{"prompt": question(i), "id": f"q{i}"} for i in range(rows)] if isinstance(rows, int) else rows
        prompts = write_prompts(tmp_path / "prompts.jsonl", content)
        return Batch(prompts, tmp_path / "answers.jsonl", tiny_folder, tmp_path / "calls", **settings)

    return make
