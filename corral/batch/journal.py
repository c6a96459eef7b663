"""What is finished of a batch: a journal beside the output while it grows, then the output itself, in order.

`OUT.partial` begins with a line that says what its answers were made of; then comes a row as soon as it is done, in whatever
order. A half-written last line does not count. Of the rows themselves only their places in the file are held in memory: eight
bytes each. At the end they are copied in order beside OUT, renamed into its place, and the journal is removed;
`OUT.record.json` says what OUT was made of. Knows nothing about prompts, or how rows come about.
"""

from __future__ import annotations

import fcntl
import json
import os
from array import array
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from corral.errors import InputError
from corral.storage import storage_errors, write_json

_ABSENT = -1
_LINE_BREAKS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}  # JSON lets them stand; who splits lines may not
_SHOWN = 5


@dataclass(slots=True)
class Totals:
    """What a finished output holds."""

    rows: int = 0
    bad: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    faults: list[str] = field(default_factory=list[str])
    """Of the first few bad rows."""

    def count(self, row: Mapping[str, Any]) -> None:
        """Take a row into account."""
        self.rows += 1
        self.prompt_tokens += row.get("prompt_tokens", 0)
        self.tokens += row.get("tokens", 0)
        if "error" in row:
            self.bad += 1
            if len(self.faults) < _SHOWN:
                self.faults.append(f"row {row['index']}: {row['error']}")


class Journal:
    """Finished rows of one output; `open_journal` makes one. Holds a lock until it is closed."""

    def __init__(self, out: Path, file: FileIO, made_of: Mapping[str, Any]) -> None:
        self.out = out
        self.path = _partial(out)
        self.count = 0
        """Rows in it."""
        self._file = file
        self._made_of = made_of
        self._places = array("q")
        self._end = 0

    def __contains__(self, index: int) -> bool:
        return index < len(self._places) and self._places[index] != _ABSENT

    def add(self, row: Mapping[str, Any]) -> None:
        """KeepRow a finished row; it survives the end of this process, however it comes. Raises: StorageError."""
        text = json.dumps(row, ensure_ascii=False, allow_nan=False).translate(_LINE_BREAKS)
        line = text.encode() + b"\n"
        self._write(line)
        self._note(row["index"], self._end - len(line))

    def finish(self, rows: int) -> Totals:
        """Write the output, in order, and remove the journal.

        Args:
            rows: how many there are; each must be in.

        Raises:
            InputError: every row is bad; the journal is removed, and no output is written.
            StorageError: the disk is full; the journal stays.
        """
        figures = Totals()
        ordered = self.path.with_name(f"{self.path.name}.ordered")
        with storage_errors(self.out, needed=self._end):
            try:
                with self.path.open("rb") as journal, ordered.open("wb") as file:
                    for place in self._places[:rows]:
                        assert place != _ABSENT, "a row is missing"
                        journal.seek(place)
                        line = journal.readline()
                        figures.count(json.loads(line))
                        file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
                if figures.bad == figures.rows:
                    self.path.unlink()
                    raise all_rows_bad(figures.bad, figures.faults, str(self.out))
                record = {"made_of": self._made_of, "bytes": ordered.stat().st_size, "figures": asdict(figures)}
                write_json(record_path(self.out), record)
                os.replace(ordered, self.out)
            finally:
                ordered.unlink(missing_ok=True)
            self.path.unlink()
        return figures

    def discard(self) -> None:
        """Remove it. Raises: StorageError."""
        with storage_errors(self.path):
            self.path.unlink()

    def _load(self) -> None:
        """Take up what is there. Raises: InputError (it was made of something else)."""
        with self.path.open("rb") as file:
            head = file.readline()
            if _whole(head, "made_of") is None:
                self._restart()
                return
            _refuse_other(json.loads(head)["made_of"], self._made_of, self.path, "remove it")
            self._end = len(head)
            for line in file:
                row = _whole(line, "index")
                if row is None:
                    break
                self._note(row["index"], self._end)
                self._end += len(line)
        with storage_errors(self.path):
            os.ftruncate(self._file.fileno(), self._end)

    def _restart(self) -> None:
        with storage_errors(self.path):
            os.ftruncate(self._file.fileno(), 0)
        self._write(json.dumps({"made_of": self._made_of}, ensure_ascii=False).encode() + b"\n")

    def _write(self, line: bytes) -> None:
        with storage_errors(self.path):
            left = memoryview(line)
            while left:
                left = left[self._file.write(left) :]
        self._end += len(line)

    def _note(self, index: int, place: int) -> None:
        if index >= len(self._places):
            self._places.extend([_ABSENT] * (index + 1 - len(self._places)))
        self.count += self._places[index] == _ABSENT
        self._places[index] = place


@contextmanager
def open_journal(out: Path, made_of: Mapping[str, Any]) -> Generator[Journal | Totals]:
    """The journal of an output; or, where the output is already there and made of the same, its figures.

    Args:
        out: where the finished rows are to be.
        made_of: everything the rows depend on, as JSON values.

    Raises:
        InputError: another process is writing it; what is there was made of something else; or it is a folder.
        StorageError: the place cannot be written.
    """
    if out.is_dir():
        raise InputError("this is a folder", where=str(out), hint="give the name of a file with --out")
    with storage_errors(_partial(out)):
        out.parent.mkdir(parents=True, exist_ok=True)
    file = _locked(_partial(out))
    try:
        done = _finished(out, made_of)
        journal = Journal(out, file, made_of)
        journal._load()  # pyright: ignore[reportPrivateUsage]
        if done is not None:
            journal.path.unlink()  # empty, or left by a process that was killed just before it would have done so
        yield done or journal
    finally:
        if os.fstat(file.fileno()).st_size == 0:
            _partial(out).unlink(missing_ok=True)
        file.close()


def all_rows_bad(rows: int, faults: list[str], where: str) -> InputError:
    """The error for a batch that has no good row."""
    several = f"all {rows:,} rows are bad" if rows > 1 else "the only row is bad"
    return InputError("\n".join([several, *(f"  {fault}" for fault in faults)]), where=where, hint="mend the rows")


def record_path(out: Path) -> Path:
    """Where it stands what an output was made of."""
    return out.with_name(f"{out.name}.record.json")


def _partial(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def _whole(line: bytes, key: str) -> dict[str, Any] | None:
    """The object with that key that a line holds, if it was written to its end. After a power failure it may hold anything."""
    try:
        value: Any = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return value if isinstance(value, dict) and key in value else None


def _locked(path: Path) -> FileIO:
    """The file, created if need be, which no other process has. Raises: InputError, StorageError."""
    while True:
        with storage_errors(path):
            file = FileIO(path, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who had it may have removed it between the opening and the lock.
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file
        except BlockingIOError:
            file.close()
            raise InputError(
                "another process is writing this output",
                where=str(path),
                hint="wait until it ends, or give another file with --out",
            ) from None
        except FileNotFoundError:
            pass
        file.close()


def _finished(out: Path, made_of: Mapping[str, Any]) -> Totals | None:
    """The figures of an output that is there. Raises: InputError (it is not what would be written)."""
    if not out.exists():
        return None
    way_out = "move it away"
    try:
        record: dict[str, Any] = json.loads(record_path(out).read_text("utf-8"))
        found, size, figures = record["made_of"], record["bytes"], Totals(**record["figures"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            "this file exists, and is no output of corral's",
            where=str(out),
            hint=f"give another file with --out, or {way_out}",
        ) from None
    _refuse_other(found, made_of, out, way_out)
    if out.stat().st_size != size:
        raise InputError(
            "this output was changed after it was written",
            where=str(out),
            hint=f"give another file with --out, or {way_out}",
        )
    return figures


def _refuse_other(found: Mapping[str, Any], wanted: Mapping[str, Any], where: Path, way_out: str) -> None:
    """Raises InputError, naming what differs, unless both are the same."""
    if found == wanted:
        return
    there, here = _flat(found), _flat(wanted)
    names = [name for name in dict.fromkeys((*there, *here)) if there.get(name) != here.get(name)]
    raise InputError(
        f"this was made of something else: {'; '.join(_difference(name, there, here) for name in names)}",
        where=str(where),
        hint=f"give another file with --out, or {way_out}",
    )


def _difference(name: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    if isinstance(there.get(name), str) and len(there[name]) == 64:
        return f"other {name}"
    return f"{name} = {json.dumps(there.get(name))} there, {json.dumps(here.get(name))} here"


def _flat(value: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` → `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{before}{key}.") if isinstance(item, dict) and item else {f"{before}{key}": item}
    return flat
