"""Reads one source into records, once: rows are parsed, hashed and kept in the cache.

The cached rows are used again while the source, its format and corral's code stay the same. Rows that cannot be used are
kept too, with the reason.
"""

from __future__ import annotations

import json
import zlib
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from corral.data import formats, sources
from corral.data.cache import cache_name, hash_code
from corral.data.example_store import json_line, record_from_json
from corral.data.formats import ContradictionError, Format, FormatError
from corral.data.formats.turns import TurnOrderError, mend_turns
from corral.data.ledger import EXAMPLES_PER_REASON, OTHER_REASONS, reason_kind
from corral.data.sources import RawRow
from corral.errors import DataError
from corral.messages import Conversation, Feedback, Preference, Record, record_key, record_to_json
from corral.progress import Progress
from corral.recipe import Source
from corral.storage import file_lock, new_directory

Ints: TypeAlias = NDArray[np.int64]
TurnSetting: TypeAlias = Literal["mend", "strict"]

VERSION = 2
EXCERPT_CHARACTERS = 2000
"""How much of an unusable row is kept to be shown."""
# A reason may quote a row's value: junk could make as many reasons as rows.
_MAX_REASONS = 10_000
_ROWS_TO_RECOGNISE = 50  # rows by which the format is recognised
_PROGRESS_EVERY = 100
_META = "meta.json"


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while content := file.read(2**20):
            checksum = zlib.crc32(content, checksum)
    return checksum


class SourceRows:
    """The rows of one source. A usable row's position is its number among the usable ones, from 0.

    Attributes:
        identity: stands for the content, in the names of what is computed from it.
        format: the name of the format that was used; `why` says how it was chosen.
        keys: sha256 of each row's content. [usable rows, 32]
        group_keys: what rows share that must be on one side: a judged answer's prompt, else the row's key. [usable rows, 32]
        mended: whether turns were left out or merged, so that the others are in order. [usable rows]
        index: the row number in the source. [usable rows]
        files: of a source of several files, each one's name and the last row number of the files before it.
        unusable: the row number in the source of each unusable row; `reasons[reason_codes[i]]` says why. [rows]
        examples: some unusable rows: `{"index", "reason", "text"}`.
    """

    def __init__(self, folder: Path) -> None:
        meta: dict[str, Any] = json.loads((folder / _META).read_text("utf-8"))
        for name, checksum in meta["crc32"].items():
            if _crc32(folder / name) != checksum:
                raise ValueError(f"{name} has another checksum")
        self.identity = folder.name
        self.format: str = meta["format"]
        self.why: str = meta["why"]
        self.reasons: list[str] = meta["reasons"]
        self.examples: list[dict[str, Any]] = meta["examples"]
        self.files: list[tuple[str, int]] = [(name, before) for name, before in meta["files"]]
        self.keys: NDArray[np.uint8] = np.load(folder / "keys.npy", mmap_mode="r").reshape(-1, 32)
        self.group_keys: NDArray[np.uint8] = np.load(folder / "group_keys.npy", mmap_mode="r").reshape(-1, 32)
        self.mended: NDArray[np.bool_] = np.load(folder / "mended.npy", mmap_mode="r")
        self.index: Ints = np.load(folder / "index.npy", mmap_mode="r")
        self.unusable: Ints = np.load(folder / "unusable.npy", mmap_mode="r")
        self.reason_codes: NDArray[np.int16] = np.load(folder / "reason_codes.npy", mmap_mode="r")
        self._ends: Ints = np.load(folder / "ends.npy", mmap_mode="r")
        self._path = folder / "records.jsonl"
        by_row = (self.keys, self.group_keys, self.mended, self.index, self._ends[1:])
        fits = {meta["usable"]} == set(map(len, by_row)) and {meta["unusable"]} == {
            len(self.unusable),
            len(self.reason_codes),
        }
        if not fits or self._ends[-1] != self._path.stat().st_size:
            raise ValueError("its files do not fit each other")

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def rows_read(self) -> int:
        """All rows that were read, usable or not."""
        return len(self.keys) + len(self.unusable)

    def row_in_file(self, index: Ints) -> tuple[Ints, Ints]:
        """Of rows by their number in the source: (the index of the file in `files`, or -1 if there is one file only; the
        number in the file). [rows] each"""
        if not self.files:
            return np.full(len(index), -1), index
        befores = np.array([before for _, before in self.files])
        files = np.searchsorted(befores, index) - 1
        return files, index - befores[files]

    def name_row(self, index: int) -> int | str:
        """A row as the user finds it: its number in the source, or `FILE:NUMBER` where there are several files."""
        if not self.files:
            return index
        name, before = self.files[bisect_left(self.files, index, key=itemgetter(1)) - 1]
        return f"{name}:{index - before}"

    def record_lines(self, positions: Ints) -> Iterator[bytes]:
        """The JSON form of the records at these positions, without line breaks."""
        with self._path.open("rb") as file:
            offset = 0
            for position in positions:
                start, end = int(self._ends[position]), int(self._ends[position + 1])
                if start != offset:
                    file.seek(start)
                yield file.read(end - start)[:-1]
                offset = end

    def record_sizes(self, positions: Ints) -> Ints:
        """Bytes of the JSON form of the records at these positions. [positions]"""
        return self._ends[positions + 1] - self._ends[positions]

    def records(self, positions: Ints) -> Iterator[Record]:
        """The records at these positions."""
        return (record_from_json(json.loads(line)) for line in self.record_lines(positions))


def load_source_rows(source: Source, cache: Path, progress: Progress, *, turns: TurnSetting = "mend") -> SourceRows:
    """A source's rows, from the cache if they are there, else read now; `turns` as in the recipe.

    Raises:
        DataError: the source cannot be read, its format is not recognised, or it changes while it is read.
        AssetError: a data asset cannot be fetched.
        StorageError: the cache cannot be written.
    """
    source_hash = sources.hash_source(source)
    settings = source.model_dump(mode="json", include={*Source.READ_BY, "format", "mapping"})
    folder = cache / cache_name("rows", VERSION, source_hash, settings, turns, _hash_reading_code())
    with file_lock(cache / f".{folder.name}.lock"):
        try:
            return SourceRows(folder)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError) as error:
            progress.say(f"the cached rows of {source.label} are damaged ({error}): they are read again")
        with new_directory(folder) as new:
            _read_into(source, new, progress, turns)
            if sources.hash_source(source) != source_hash:
                raise DataError(
                    "the source changed while it was read",
                    where=source.path,
                    hint="run again when nothing writes to it any more",
                )
        return SourceRows(folder)


def _hash_reading_code() -> str:
    """Stands for the code that turns a source into records."""
    here = Path(__file__).parent
    return hash_code(Path(__file__), here.parent / "messages.py", here / "formats", here / "sources")


@dataclass
class _UnusableRows:
    """Rows that cannot be used, with their reasons and some examples."""

    index: array[int] = field(default_factory=lambda: array("q"))
    reason_codes: array[int] = field(default_factory=lambda: array("h"))
    code_of_reason: dict[str, int] = field(default_factory=dict[str, int])
    example_counts: Counter[str] = field(default_factory=Counter[str])
    examples: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def add(self, row: RawRow, reason: str) -> None:
        if reason not in self.code_of_reason and len(self.code_of_reason) >= _MAX_REASONS:
            reason = OTHER_REASONS
        self.index.append(row.index)
        self.reason_codes.append(self.code_of_reason.setdefault(reason, len(self.code_of_reason)))
        kind = reason_kind(reason)
        if self.example_counts[kind] < EXAMPLES_PER_REASON:
            self.example_counts[kind] += 1
            text = row.fault if row.value is None else json.dumps(row.value, ensure_ascii=False, default=str)
            self.examples.append({"index": row.index, "reason": reason, "text": (text or "")[:EXCERPT_CHARACTERS]})


def _read_record(read: Format, row: Mapping[str, Any], turns: TurnSetting) -> tuple[Record, bool]:
    """(the record of a row, whether its turns were mended). Raises FormatError."""
    is_mended = False
    try:
        record = read(row)
    except TurnOrderError as error:
        if turns == "strict":
            raise
        record, is_mended = mend_turns(error), True
    return _end_with_trained(record), is_mended


def _end_with_trained(record: Record) -> Record:
    """A conversation without what follows its last answer that is to be trained: nothing would be learnt from it, and an
    evaluation takes the last answer for the right one."""
    if not isinstance(record, Conversation) or record.messages[-1].trained:
        return record
    answers = [i for i, m in enumerate(record.messages) if m.role == "assistant" and m.trained]
    return Conversation(record.messages[: answers[-1] + 1]) if answers else record


def _group_key(record: Record, key: str) -> str:
    """What rows share that must be on one side: the prompt of judged answers, else their content, `key`."""
    return record_key(record.prompt) if isinstance(record, Preference | Feedback) else key


def _read_into(source: Source, folder: Path, progress: Progress, turns: TurnSetting) -> None:
    keys, group_keys, mended = bytearray(), bytearray(), bytearray()
    index, ends, unusable = array("q"), array("q", [0]), _UnusableRows()
    files: list[tuple[str, int]] = []
    rows = sources.read_rows(source, progress)
    first = list(islice(rows, _ROWS_TO_RECOGNISE))
    if first and all(row.value is None for row in first) and source.format == "auto" and source.mapping is None:
        raise DataError(
            f"none of the first {len(first)} rows can be read: {first[0].fault}",
            where=source.label,
            hint="fix the file; broken rows among good ones are left out and counted",
        )
    chosen = formats.choose_format(source, [row.value for row in first if row.value is not None])
    with (folder / "records.jsonl").open("wb") as file:
        for done, row in enumerate(chain(first, rows), start=1):
            if row.file and (not files or files[-1][0] != row.file):
                files.append((row.file, row.before))
            if row.value is None:
                unusable.add(row, row.reason or "unreadable")
            else:
                try:
                    record, is_mended = _read_record(chosen.to_record, row.value, turns)
                    key = record_key(record)
                    keys += bytes.fromhex(key)
                    group_keys += bytes.fromhex(_group_key(record, key))
                    mended.append(is_mended)
                    line = json_line(record_to_json(record)).encode()
                    file.write(line)
                    ends.append(ends[-1] + len(line))
                    index.append(row.index)
                except ContradictionError as error:
                    # The rows before it were read on an assumption that is now known to be wrong.
                    raise DataError(f"{row.location}: {error.reason}", where=source.label, hint=error.hint) from None
                except FormatError as error:
                    unusable.add(row, error.reason)
            if done % _PROGRESS_EVERY == 0:
                progress.update(done, source.label)
    np.save(folder / "keys.npy", np.frombuffer(keys, np.uint8))
    np.save(folder / "group_keys.npy", np.frombuffer(group_keys, np.uint8))
    np.save(folder / "mended.npy", np.frombuffer(mended, np.bool_))
    np.save(folder / "index.npy", np.asarray(index, np.int64))
    np.save(folder / "ends.npy", np.asarray(ends, np.int64))
    np.save(folder / "unusable.npy", np.asarray(unusable.index, np.int64))
    np.save(folder / "reason_codes.npy", np.asarray(unusable.reason_codes, np.int16))
    meta = {
        "format": chosen.name,
        "why": chosen.why,
        "usable": len(index),
        "unusable": len(unusable.index),
        "reasons": list(unusable.code_of_reason),
        "examples": unusable.examples,
        "files": files,
        "crc32": {path.name: _crc32(path) for path in sorted(folder.iterdir())},
    }
    (folder / _META).write_text(json.dumps(meta), "utf-8")
