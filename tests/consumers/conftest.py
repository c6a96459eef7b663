"""Each artefact is opened as its users open it: same ids, log-probs within tolerance, answers that end."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.consumers.cases import CASES, Case, build


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.full)


@pytest.fixture(scope="session")
def cases(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """By name: the rotary embedding, and whether the head is tied to the embedding."""
    folder = tmp_path_factory.mktemp("consumers")
    return {
        f"{rope}, {'tied' if tied else 'untied'}": build(folder / f"{rope}-{tied}", tiny_tokenizer, rope, tied=tied)
        for rope, tied in CASES
    }
