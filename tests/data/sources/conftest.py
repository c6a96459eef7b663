"""Small files of each kind, and what reading them gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from corral.data.sources import RawRow, read_rows
from corral.errors import DataError
from corral.recipe import Source


def rows_of(path: Path | str) -> list[RawRow]:
    return list(read_rows(Source(path=str(path))))


def values_of(path: Path | str) -> list[dict[str, Any] | None]:
    return [row.value for row in rows_of(path)]


def written(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path: Path | str) -> DataError:
    with pytest.raises(DataError) as caught:
        rows_of(path)
    assert caught.value.hint
    assert caught.value.exit_code == 2
    return caught.value
