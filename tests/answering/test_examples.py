from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from corral.answering.examples import source_examples
from corral.data import cache
from corral.data.source_rows import SourceRows
from corral.errors import StorageError
from corral.messages import Record
from corral.recipe import Source
from corral.storage import read_write_lock


def test_nothing_is_removed_from_the_cache_while_examples_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORRAL_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "MAX_BYTES", 0)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "Hi?", "completion": "Hello."}) + "\n")
    records = SourceRows.records

    def check_lock(rows: SourceRows, positions: Any) -> Iterator[Record]:
        with pytest.raises(StorageError), read_write_lock(tmp_path / "prepared.lock", "write", wait=False):
            pass
        return records(rows, positions)

    monkeypatch.setattr(SourceRows, "records", check_lock)
    for _ in range(2):
        (example,) = source_examples(Source(path=str(path)))
        assert [message.content for message in example.messages] == ["Hi?", "Hello."]
        assert len([folder for folder in (tmp_path / "prepared").iterdir() if folder.is_dir()]) == 1
