"""The rows of one source, understood: read once, turned into records, hashed, and kept on disk for as long as source,
format and corral's own code stay the same.

Rows that cannot be used are kept too, with the reason. This module does not know which rows are used, for what, or how
they become tokens.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from corral.data import formats, sources
from corral.data.cache import cache_name, hash_code
from corral.data.example_store import json_line, record_from_json
from corral.data.formats import ContradictionError, FormatError
from corral.data.ledger import OTHER_REASONS, reason_kind
from corral.data.sources import RawRow
from corral.errors import DataError
from corral.messages import Record, record_key, record_to_json
from corral.progress import Progress
from corral.recipe import Source
from corral.storage import file_lock, new_directory

Ints: TypeAlias = NDArray[np.int64]

VERSION = 1
EXAMPLES = 5
"""Rows of each kind of reason that are kept to be shown."""
EXCERPT_CHARACTERS = 2000
"""Characters of such a row."""
# A reason may quote a row's value: junk could make as many reasons as rows.
_MOST_REASONS = 10_000
_LOOK_AT = 50  # rows by which a format is recognised
_TELL_EVERY = 100
_META = "meta.json"


class SourceRows:
    """What one source holds. A usable row's place is its number among the usable ones, from 0.

    Attributes:
        identity: stands for the content, in names of what is computed from it.
        format: the name of the format that was taken; `why` says for what reason.
        keys: [usable rows, 32] sha256 of each row's content.
        index: [usable rows] its number in the source.
        unusable: [rows] number in the source of each row that cannot be used; `reasons[reason_of[i]]` says why.
        examples: some of those: `{"index", "reason", "text"}`.
    """

    def __init__(self, folder: Path) -> None:
        meta: dict[str, Any] = json.loads((folder / _META).read_text("utf-8"))
        self.identity = folder.name
        self.format: str = meta["format"]
        self.why: str = meta["why"]
        self.reasons: list[str] = meta["reasons"]
        self.examples: list[dict[str, Any]] = meta["examples"]
        self.keys: NDArray[np.uint8] = np.load(folder / "keys.npy", mmap_mode="r").reshape(-1, 32)
        self.index: Ints = np.load(folder / "index.npy", mmap_mode="r")
        self.unusable: Ints = np.load(folder / "unusable.npy", mmap_mode="r")
        self.reason_codes: NDArray[np.int16] = np.load(folder / "reason_of.npy", mmap_mode="r")
        self._ends: Ints = np.load(folder / "ends.npy", mmap_mode="r")
        self._path = folder / "records.jsonl"
        usable, unusable = meta["usable"], meta["unusable"]
        lengths = (len(self.keys), len(self.index), len(self._ends) - 1, len(self.unusable), len(self.reason_codes))
        if lengths != (usable, usable, usable, unusable, unusable) or self._ends[-1] != self._path.stat().st_size:
            raise ValueError("its files do not fit each other")

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def rows_read(self) -> int:
        """Rows that were read, usable or not."""
        return len(self.keys) + len(self.unusable)

    def record_lines(self, places: Ints) -> Iterator[bytes]:
        """The JSON form of the records at these places, as bytes without a line break."""
        with self._path.open("rb") as file:
            at = 0
            for place in places:
                start, end = int(self._ends[place]), int(self._ends[place + 1])
                if start != at:
                    file.seek(start)
                yield file.read(end - start)[:-1]
                at = end

    def records(self, places: Ints) -> Iterator[Record]:
        """The records at these places."""
        return (record_from_json(json.loads(line)) for line in self.record_lines(places))


def load_source_rows(source: Source, cache: Path, progress: Progress) -> SourceRows:
    """A source's rows, read and understood now unless that was done before.

    Raises:
        DataError: the source cannot be read, its format cannot be told, or it changes while it is read.
        AssetError: a data asset cannot be had.
        StorageError: the cache cannot be written.
    """
    identity = sources.hash_source(source)
    how = source.model_dump(mode="json", include={"config", "split", "format", "mapping"})
    folder = cache / cache_name("rows", VERSION, identity, how, _code())
    with file_lock(cache / f".{folder.name}.lock"):
        try:
            return SourceRows(folder)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError) as error:
            progress.say(f"the cached rows of {source.label} are damaged ({error}): they are read again")
        with new_directory(folder) as new:
            _write(source, new, progress)
            if sources.hash_source(source) != identity:
                raise DataError(
                    "the source changed while it was read", where=source.path, hint="run again when it is at rest"
                )
        return SourceRows(folder)


def _code() -> str:
    """Stands for the code that decides what becomes of a row."""
    here = Path(__file__).parent
    packages = [here / name if (here / name).is_dir() else here / f"{name}.py" for name in ("formats", "sources")]
    return hash_code(Path(__file__), here.parent / "messages.py", *packages)


@dataclass
class _Unusable:
    """Rows that cannot be used, counted by reason."""

    index: array[int] = field(default_factory=lambda: array("q"))
    reason_of: array[int] = field(default_factory=lambda: array("h"))
    numbers: dict[str, int] = field(default_factory=dict[str, int])
    shown: Counter[str] = field(default_factory=Counter[str])
    examples: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def add(self, row: RawRow, reason: str) -> None:
        if reason not in self.numbers and len(self.numbers) >= _MOST_REASONS:
            reason = OTHER_REASONS
        number = self.numbers.setdefault(reason, len(self.numbers))
        self.index.append(row.index)
        self.reason_of.append(number)
        kind = reason_kind(reason)
        if self.shown[kind] < EXAMPLES:
            self.shown[kind] += 1
            text = row.fault if row.value is None else json.dumps(row.value, ensure_ascii=False, default=str)
            self.examples.append({"index": row.index, "reason": reason, "text": (text or "")[:EXCERPT_CHARACTERS]})


def _write(source: Source, folder: Path, progress: Progress) -> None:
    keys, index, ends, unusable = bytearray(), array("q"), array("q", [0]), _Unusable()
    rows = sources.read_rows(source, progress)
    first = list(islice(rows, _LOOK_AT))
    if first and all(row.value is None for row in first) and source.format == "auto" and source.mapping is None:
        raise DataError(
            f"none of the first {len(first)} rows can be read: {first[0].fault}",
            where=source.label,
            hint="mend the file; broken rows among good ones are left out and counted",
        )
    chosen = formats.choose_format(source, [row.value for row in first if row.value is not None])
    with (folder / "records.jsonl").open("wb") as file:
        for done, row in enumerate(chain(first, rows), start=1):
            if row.value is None:
                unusable.add(row, row.reason or "unreadable")
            else:
                try:
                    record = chosen.to_record(row.value)
                    keys += bytes.fromhex(record_key(record))
                    line = json_line(record_to_json(record)).encode()
                    file.write(line)
                    ends.append(ends[-1] + len(line))
                    index.append(row.index)
                except ContradictionError as error:
                    # What was kept before it was read on an assumption that is wrong.
                    raise DataError(f"{row.location}: {error.reason}", where=source.label, hint=error.hint) from None
                except FormatError as error:
                    unusable.add(row, error.reason)
            if done % _TELL_EVERY == 0:
                progress.update(done, source.label)
    np.save(folder / "keys.npy", np.frombuffer(keys, np.uint8))
    np.save(folder / "index.npy", np.asarray(index, np.int64))
    np.save(folder / "ends.npy", np.asarray(ends, np.int64))
    np.save(folder / "unusable.npy", np.asarray(unusable.index, np.int64))
    np.save(folder / "reason_of.npy", np.asarray(unusable.reason_of, np.int16))
    meta = {
        "format": chosen.name,
        "why": chosen.why,
        "usable": len(index),
        "unusable": len(unusable.index),
        "reasons": list(unusable.numbers),
        "examples": unusable.examples,
    }
    (folder / _META).write_text(json.dumps(meta), "utf-8")
