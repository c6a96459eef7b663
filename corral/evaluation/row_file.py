"""The JSONL files of an evaluation: one line for each finished row, so that an interrupted evaluation can continue."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corral.storage import storage_errors, write_atomic


@dataclass(frozen=True, slots=True)
class RowProducer:
    """What produced a row: a variant's name, and the hash of everything that the row depends on besides its own content.

    The file's key for the hash is `made`.
    """

    variant: str
    identity: str


class RowFile:
    """A JSONL file of finished rows, keyed by producer and row id. A half-written last line is ignored, and cut off when
    the next row is added."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: dict[RowProducer, dict[str, dict[str, Any]]] = {}
        self._valid_bytes: int | None = None
        if path.exists():
            data = path.read_bytes()
            complete = _complete_lines(data)
            self._valid_bytes = len(complete) if complete != data else None
            for line in complete.splitlines():
                self._remember(json.loads(line))

    def add(self, producer: RowProducer, id_: str, **fields: Any) -> None:
        """Append a finished row. Raises: StorageError."""
        row = {"variant": producer.variant, "id": id_, **fields, "made": producer.identity}
        self._append(_line(row))
        self._remember(row)

    def rows_of(self, producer: RowProducer) -> Mapping[str, dict[str, Any]]:
        """Finished rows of one producer, by id."""
        return self._rows.get(producer, {})

    def rows_of_variant(self, variant: str) -> Mapping[str, dict[str, Any]]:
        """Finished rows of a variant, by id, whatever produced them. After `keep_rows` there is one producer of each."""
        return {
            id_: row
            for producer, rows in self._rows.items()
            if producer.variant == variant
            for id_, row in rows.items()
        }

    def reuse_rows(self, old: Path, ids_by_producer: Mapping[RowProducer, Collection[str]]) -> None:
        """Copy the lines with these producers and ids from another file, unless this file has them. Raises: StorageError."""
        if not old.is_file():
            return
        lines: list[bytes] = []
        for line in _complete_lines(old.read_bytes()).splitlines(keepends=True):
            row = json.loads(line)
            producer = _producer(row)
            if row["id"] in ids_by_producer.get(producer, ()) and row["id"] not in self.rows_of(producer):
                lines.append(line)
                self._remember(row)
        if lines:
            self._append(b"".join(lines))

    def keep_rows(self, ids_by_producer: Mapping[RowProducer, Collection[str]]) -> None:
        """Remove all rows but those with these producers and ids. Raises: StorageError."""
        kept = {
            producer: {id_: row for id_, row in rows.items() if id_ in ids_by_producer.get(producer, ())}
            for producer, rows in self._rows.items()
        }
        if kept != self._rows:
            self._rows = {producer: rows for producer, rows in kept.items() if rows}
            write_atomic(self.path, b"".join(_line(row) for rows in kept.values() for row in rows.values()))
            self._valid_bytes = None

    def _remember(self, row: dict[str, Any]) -> None:
        self._rows.setdefault(_producer(row), {})[row["id"]] = row

    def _append(self, data: bytes) -> None:
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._valid_bytes is not None:
                os.truncate(self.path, self._valid_bytes)
                self._valid_bytes = None
            with self.path.open("ab") as file:
                file.write(data)


def _line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()


def _complete_lines(data: bytes) -> bytes:
    return data[: data.rfind(b"\n") + 1]


def _producer(row: Mapping[str, Any]) -> RowProducer:
    return RowProducer(row["variant"], row.get("made", ""))
