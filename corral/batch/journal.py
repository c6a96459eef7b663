"""The finished rows of a batch: in an SQLite file beside the output while it grows, then written to the output in order.

`OUT.partial` holds each row as soon as it is finished, in any order, and what its answers depend on. At the end the rows are
written in order beside OUT and renamed to it, and the journal is removed; `OUT.record.json` says what OUT depends on.
"""

from __future__ import annotations

import errno
import json
import os
import sqlite3
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from corral.answering.identity import CIRCUMSTANCES, HASHED, differing_conditions
from corral.errors import InputError
from corral.storage import storage_errors, write_json

_LINE_BREAKS = {
    0x85: "\\u0085",
    0x2028: "\\u2028",
    0x2029: "\\u2029",
}  # valid in JSON, but some readers split lines at them
_MAX_FAULTS = 5
_HASHED = (*HASHED, "prompts")
_ERRNO = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_PERM: errno.EACCES,
    sqlite3.SQLITE_CANTOPEN: errno.EACCES,
}


@dataclass(slots=True)
class Totals:
    """What a finished output holds."""

    rows: int = 0
    bad: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    faults: list[str] = field(default_factory=list[str])
    """Of the first few bad rows."""
    seconds: float = 0.0
    """Spent on answering, over all calls, without loading the model."""

    def add(self, row: Mapping[str, Any]) -> None:
        """Count a row."""
        self.rows += 1
        self.prompt_tokens += row.get("prompt_tokens", 0)
        self.tokens += row.get("tokens", 0)
        if "error" in row:
            self.bad += 1
            if len(self.faults) < _MAX_FAULTS:
                self.faults.append(f"row {row['index']}: {row['error']}")


class Journal:
    """The finished rows of one output; made by `open_journal`. No other process can open it until it is closed."""

    def __init__(self, out: Path, database: sqlite3.Connection, identity: Mapping[str, Any]) -> None:
        self.out = out
        self.path = _journal_path(out)
        self._database = database
        self._identity = identity
        self.count, self.seconds = database.execute("SELECT count(*), coalesce(max(seconds), 0.0) FROM rows").fetchone()
        """Rows in it, and the seconds that all calls so far have spent on answering."""

    def __contains__(self, index: int) -> bool:
        return self._database.execute("SELECT 1 FROM rows WHERE position = ?", (index,)).fetchone() is not None

    def add(self, row: Mapping[str, Any], seconds: float = 0.0) -> None:
        """Keep a finished row: it is on the disk when this returns. Raises: StorageError.

        Args:
            seconds: what all calls have spent on answering until now.
        """
        text = json.dumps(row, ensure_ascii=False, allow_nan=False).translate(_LINE_BREAKS)
        with _storage_errors(self.path):
            self._database.execute("INSERT INTO rows VALUES (?, ?, ?)", (row["index"], text.encode(), seconds))
        self.count += 1
        self.seconds = max(self.seconds, seconds)

    def finish(self, rows: int) -> Totals:
        """Write the output in order and remove the journal.

        Args:
            rows: how many there are; the journal must hold them all.

        Raises:
            InputError: every row is bad; the journal is removed, and no output is written.
            StorageError: the disk is full; the journal stays.
        """
        assert self.count == rows, "a row is missing"
        totals = Totals(seconds=self.seconds)
        ordered = self.path.with_name(f"{self.path.name}.ordered")
        with _storage_errors(self.out, needed=self._size()):
            try:
                with ordered.open("wb") as file:
                    for (line,) in self._database.execute("SELECT row FROM rows ORDER BY position"):
                        totals.add(json.loads(line))
                        file.write(line + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
                if totals.bad == totals.rows:
                    self.remove()
                    raise all_rows_bad(totals.bad, totals.faults, str(self.out))
                record = {"made_of": self._identity, "bytes": ordered.stat().st_size, "figures": asdict(totals)}
                write_json(record_path(self.out), record)
                os.replace(ordered, self.out)
            finally:
                ordered.unlink(missing_ok=True)
        self.remove()
        return totals

    def remove(self) -> None:
        """Close and delete it. Raises: StorageError."""
        self._database.close()
        with storage_errors(self.path):
            _delete(self.path)

    def _size(self) -> int:
        return self._database.execute("SELECT coalesce(sum(length(row) + 1), 0) FROM rows").fetchone()[0]


@contextmanager
def open_journal(out: Path, identity: Mapping[str, Any]) -> Generator[Journal | Totals]:
    """The journal of an output, or the totals of the output if it is finished and depends on the same.

    Args:
        out: the file of answers.
        identity: everything that the rows depend on, as JSON values; of them `CIRCUMSTANCES` may differ.

    Raises:
        InputError: another process is writing it; it depends on something else; or it is a folder.
        StorageError: the file cannot be written.
    """
    if out.is_dir():
        raise InputError("this is a folder", where=str(out), hint="give the name of a file with --out")
    path = _journal_path(out)
    with _storage_errors(path):
        out.parent.mkdir(parents=True, exist_ok=True)
        database = _connect(path)
        is_new = not database.execute("SELECT name FROM sqlite_master").fetchall()
    remove_file = is_new
    try:
        totals = _finished_totals(out, identity)
        if not is_new:
            _refuse_other(_stored_identity(database, path), identity, path, "remove it")
        if totals is not None:
            remove_file = True  # new, or left by a process that was killed just before it removed the journal
            yield totals
            return
        with _storage_errors(path):
            if is_new:
                _create_tables(database, identity)
            journal = Journal(out, database, identity)
        remove_file = False
        yield journal
    finally:
        database.close()
        if remove_file:
            _delete(path)


def all_rows_bad(rows: int, faults: list[str], where: str) -> InputError:
    """The error for a batch that has no good row."""
    several = f"all {rows:,} rows are bad" if rows > 1 else "the only row is bad"
    return InputError("\n".join([several, *(f"  {fault}" for fault in faults)]), where=where, hint="correct the rows")


def record_path(out: Path) -> Path:
    """The file that says what an output depends on."""
    return out.with_name(f"{out.name}.record.json")


def _journal_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def _delete(path: Path) -> None:
    path.unlink(missing_ok=True)
    # SQLite removes its log when it closes the file, unless the disk is full then.
    path.with_name(f"{path.name}-wal").unlink(missing_ok=True)


def _connect(path: Path) -> sqlite3.Connection:
    """Open and lock an SQLite file, created if necessary. Raises: InputError, OSError, sqlite3.DatabaseError."""
    while True:
        path.touch()
        before = path.stat().st_ino
        database = sqlite3.connect(path, timeout=0, isolation_level=None)
        try:
            # An exclusive connection keeps its lock until it is closed, and in WAL mode needs no shared memory.
            database.execute("PRAGMA locking_mode = EXCLUSIVE")
            database.execute("PRAGMA synchronous = FULL")
            database.execute("BEGIN IMMEDIATE")
            database.execute("COMMIT")
            # The process that had it locked may have removed it in between.
            if path.exists() and path.stat().st_ino == before:
                return database
        except sqlite3.DatabaseError as error:
            database.close()
            if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY:
                raise InputError(
                    "another process is writing this output",
                    where=str(path),
                    hint="wait until it ends, or give another file with --out",
                ) from None
            if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_NOTADB:
                raise _not_a_journal(path) from None
            raise
        database.close()


def _stored_identity(database: sqlite3.Connection, path: Path) -> dict[str, Any]:
    """What the rows of a journal depend on. Raises: InputError (it is no journal)."""
    try:
        return json.loads(database.execute("SELECT identity FROM batch").fetchone()[0])
    except (sqlite3.DatabaseError, TypeError, ValueError):
        raise _not_a_journal(path) from None


def _not_a_journal(path: Path) -> InputError:
    return InputError(
        "this is not a journal of this version of corral, and cannot be resumed",
        where=str(path),
        hint="finish the batch with the version of corral that began it, or remove the file to begin again",
    )


def _create_tables(database: sqlite3.Connection, identity: Mapping[str, Any]) -> None:
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("BEGIN")
    database.execute("CREATE TABLE batch (identity TEXT NOT NULL)")
    database.execute("CREATE TABLE rows (position INTEGER PRIMARY KEY, row BLOB NOT NULL, seconds REAL NOT NULL)")
    database.execute("INSERT INTO batch VALUES (?)", (json.dumps(identity, ensure_ascii=False),))
    database.execute("COMMIT")


@contextmanager
def _storage_errors(path: Path, *, needed: int | None = None) -> Generator[None]:
    """Turns errors of SQLite and of the file system into a StorageError about `path`."""
    with storage_errors(path, needed=needed):
        try:
            yield
        except sqlite3.DatabaseError as error:
            number = _ERRNO.get(error.sqlite_errorcode & 0xFF, errno.EIO)
            raise OSError(number, str(error), str(path)) from error


def _finished_totals(out: Path, identity: Mapping[str, Any]) -> Totals | None:
    """The totals of an output that exists. Raises: InputError (it is not the output of this batch)."""
    if not out.exists():
        return None
    instead = "move it away"
    hint = f"give another file with --out, or {instead}"
    try:
        record: dict[str, Any] = json.loads(record_path(out).read_text("utf-8"))
        stored, size, totals = record["made_of"], record["bytes"], Totals(**record["figures"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError("this file exists, and is not an output of corral", where=str(out), hint=hint) from None
    _refuse_other(stored, identity, out, instead)
    if out.stat().st_size != size:
        raise InputError("this output was changed after it was written", where=str(out), hint=hint)
    return totals


def _refuse_other(stored: Mapping[str, Any], requested: Mapping[str, Any], where: Path, instead: str) -> None:
    """Raises InputError, naming what differs, unless both identities are the same."""
    differences = [
        f"other {name}" if name in _HASHED else f"{name} = {json.dumps(there)} there, {json.dumps(here)} here"
        for name, there, here in differing_conditions(stored, requested)
        if name not in CIRCUMSTANCES
    ]
    if not differences:
        return
    raise InputError(
        f"this holds the answers of another batch: {'; '.join(differences)}",
        where=str(where),
        hint=f"give another file with --out, or {instead}",
    )
