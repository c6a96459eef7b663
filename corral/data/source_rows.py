"""Reads one source into records, once: rows are parsed, hashed and kept in the cache.

The cached rows are used again while the source, its format and corral's code stay the same. Rows that cannot be used are
kept too, with the reason.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from corral.data import formats, sources
from corral.data.cache import cache_name, hash_code
from corral.data.formats import ContradictionError, Format, FormatError
from corral.data.formats.turns import TurnOrderError, mend_turns
from corral.data.ledger import EXAMPLES_PER_REASON, MAX_REASONS, OTHER_REASONS, reason_kind
from corral.data.row_store import CHUNK_ROWS, RowStore
from corral.data.sources import RawRow
from corral.errors import DataError
from corral.formatting import json_line
from corral.messages import Conversation, Feedback, Preference, Record, record_from_json, record_key, record_to_json
from corral.progress import Progress
from corral.recipe import Data, Source
from corral.storage import file_lock, new_directory

Ints: TypeAlias = NDArray[np.int64]

KeyName: TypeAlias = Literal["key", "group_key", "prompt_key"]

VERSION = 4
EXCERPT_CHARACTERS = 2000
"""How much of an unusable row is kept to be shown."""
_ROWS_TO_RECOGNISE = 50  # rows by which the format is recognised
_PROGRESS_EVERY = 100
_PIECE_BYTES = 4 * 2**20  # of records that are held at once; their tokens and words take many times as much memory
_META = "meta.json"


class SourceRows:
    """The rows of one source. A row's position is its number among all that were read, from 0.

    The store holds for each row `key` (sha256 of its content), `group_key` (what rows share that must be on one side: a judged
    answer's prompt, a document in parts, else the row's key), `prompt_key` (the same, but of a conversation what comes before
    its last answer: see `split_key`), `mended` (whether turns were left out or merged), `file` (index
    into `files`), `row` (its number in the file), `record` (its JSON form, or null if it cannot be used), and `reason` (index
    into `reasons`, or -1).

    Attributes:
        identity: stands for the content, in the names of what is computed from it.
        format: the name of the format that was used; `why` says how it was chosen.
        files: of a source of several files, each one's name.
        is_judged: whether answers are compared or scored in some row.
        reasons: why rows cannot be used.
        examples: some unusable rows: `{"position", "reason", "text"}`.
        reason: of each row, index into `reasons`, or -1 if it can be used. [rows]
    """

    def __init__(self, folder: Path) -> None:
        meta: dict[str, Any] = json.loads((folder / _META).read_text("utf-8"))
        self.identity = folder.name
        self.format: str = meta["format"]
        self.why: str = meta["why"]
        self.files: list[str] = meta["files"]
        self.is_judged: bool = meta["judged"]
        self.reasons: list[str] = meta["reasons"]
        self.examples: list[dict[str, Any]] = meta["examples"]
        self.store = RowStore(folder)
        if len(self.store) != meta["rows"]:
            raise ValueError(f"{len(self.store)} of {meta['rows']} rows are there")
        self.reason: NDArray[np.int16] = self.store.column("reason")

    def __len__(self) -> int:
        return len(self.store)

    @property
    def usable(self) -> Ints:
        """Positions of the rows that can be used, ascending."""
        return np.flatnonzero(self.reason < 0)

    def keys(self, positions: Ints, name: KeyName = "key") -> NDArray[np.uint8]:
        """sha256 of the content of each row, or of what its group shares. [positions, 32]"""
        return self.store.column(name, positions)

    def name_rows(self, positions: Ints) -> list[int | str]:
        """Rows as the user finds them: the number in the file, or `FILE:NUMBER` where there are several files."""
        files, rows = (self.store.column(name, positions).tolist() for name in ("file", "row"))
        return [row if file < 0 else f"{self.files[file]}:{row}" for file, row in zip(files, rows, strict=True)]

    def record_lines(self, positions: Ints) -> Iterator[bytes]:
        """The JSON form of the records at these positions."""
        return (value.as_py() for _, batch in self.store.read(positions) for value in batch["record"])

    def records(self, positions: Ints) -> Iterator[Record]:
        """The records at these positions."""
        return (record_from_json(json.loads(line)) for line in self.record_lines(positions))

    def split(self, positions: Ints) -> Iterator[Ints]:
        """The positions of usable rows in pieces of `CHUNK_ROWS`, or of a few megabytes where rows are as long as books."""
        from pyarrow import compute

        binary_length: Any = compute.binary_length  # type: ignore[reportUnknownMemberType]
        for part, batch in self.store.read(positions):
            pieces = np.cumsum(binary_length(batch["record"]).to_numpy()) // _PIECE_BYTES
            yield from np.split(part, np.flatnonzero(np.diff(pieces)) + 1)


def split_key(sources: Iterable[SourceRows]) -> KeyName:
    """The name of the key that rows share which must be on one side, in all sources of a recipe.

    Where answers are judged, conversations are grouped by their prompts too: a model must not be fine-tuned on the better
    answer of a pair that it is tested on.
    """
    return "prompt_key" if any(rows.is_judged for rows in sources) else "group_key"


@dataclass(frozen=True, slots=True)
class RowSettings:
    """What becomes of the messages of every row."""

    turns: Literal["mend", "strict"] = "mend"
    """As `data.turns`."""
    keep_system: bool = True
    """Whether rows keep their own system messages."""

    @classmethod
    def from_recipe(cls, data: Data) -> RowSettings:
        """The settings of `[data]`."""
        return cls(data.turns, data.system_override is None)


def load_source_rows(
    source: Source, cache: Path, progress: Progress, settings: RowSettings = RowSettings()
) -> SourceRows:
    """A source's rows, from the cache if they are there, else read now.

    Raises:
        DataError: the source cannot be read, its format is not recognised, or it changes while it is read.
        AssetError: a data asset cannot be fetched.
        StorageError: the cache cannot be written.
    """
    source_hash = sources.hash_source(source)
    read_by = source.model_dump(mode="json", include={*Source.READ_BY, "format", "mapping"})
    folder = cache / cache_name("rows", VERSION, source_hash, read_by, asdict(settings), _hash_reading_code())
    with file_lock(cache / f".{folder.name}.lock"):
        try:
            return SourceRows(folder)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            progress.say(f"the cached rows of {source.label} are damaged ({error}): they are read again")
        with new_directory(folder) as new:
            _read_into(source, new, progress, settings)
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
class _RowWriter:
    """Writes the rows of a `SourceRows`, and collects what its `meta.json` says of all of them."""

    store: RowStore
    files: list[str] = field(default_factory=list[str])
    rows: int = 0
    is_judged: bool = False
    code_of_reason: dict[str, int] = field(default_factory=dict[str, int])
    example_counts: Counter[str] = field(default_factory=Counter[str])
    examples: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    _unsaved: list[tuple[Any, ...]] = field(default_factory=list[tuple[Any, ...]])
    _unsaved_bytes: int = 0
    _group_keys: tuple[str, str] = ("", "")

    def add(self, row: RawRow, record: Record, is_mended: bool) -> None:
        """A row that can be used."""
        key = record_key(record)
        prompt = _prompt_of(record)
        judged = isinstance(record, Preference | Feedback)
        self.is_judged |= judged
        if not row.continues:
            prompt_key = key if prompt is None else record_key(prompt)
            self._group_keys = prompt_key if judged else key, prompt_key
        line = json_line(record_to_json(record)).encode()[:-1]
        self._add(row, line, *map(bytes.fromhex, (key, *self._group_keys)), is_mended, -1)

    def add_unusable(self, row: RawRow, reason: str) -> None:
        if reason not in self.code_of_reason and len(self.code_of_reason) >= MAX_REASONS:
            reason = OTHER_REASONS
        kind = reason_kind(reason)
        if self.example_counts[kind] < EXAMPLES_PER_REASON:
            self.example_counts[kind] += 1
            text = row.fault if row.value is None else json.dumps(row.value, ensure_ascii=False, default=str)
            self.examples.append({"position": self.rows, "reason": reason, "text": (text or "")[:EXCERPT_CHARACTERS]})
        code = self.code_of_reason.setdefault(reason, len(self.code_of_reason))
        self._add(row, None, bytes(32), bytes(32), bytes(32), False, code)

    def _add(self, row: RawRow, record: bytes | None, *values: Any) -> None:
        if row.file and (not self.files or self.files[-1] != row.file):
            self.files.append(row.file)
        self._unsaved.append((len(self.files) - 1, row.index, record, *values))
        self.rows += 1
        self._unsaved_bytes += len(record or b"")
        if len(self._unsaved) == CHUNK_ROWS or self._unsaved_bytes > _PIECE_BYTES:
            self.save()

    def save(self) -> None:
        """Save the rows that are not saved yet."""
        import pyarrow as pa

        if not self._unsaved:
            return
        files, rows, records, *all_keys, mended, reasons = zip(*self._unsaved, strict=True)
        keys = (np.frombuffer(b"".join(each), np.uint8).reshape(-1, 32) for each in all_keys)
        columns = {
            "file": np.array(files, np.int32),
            "row": np.array(rows, np.int64),
            "record": pa.array(records, pa.large_binary()),
            **dict(zip(("key", "group_key", "prompt_key"), keys, strict=True)),
            "mended": np.array(mended, np.bool_),
            "reason": np.array(reasons, np.int16),
        }
        self.store.save(np.arange(self.rows - len(files), self.rows), columns)
        self._unsaved.clear()
        self._unsaved_bytes = 0


def _prompt_of(record: Record) -> Conversation | None:
    """What comes before the answer, or before the last one; None for a document."""
    if isinstance(record, Preference | Feedback):
        return record.prompt
    if isinstance(record, Conversation):
        return record.split_answer()[0] if record.answered else record
    return None


def _read_record(read: Format, row: Mapping[str, Any], settings: RowSettings) -> tuple[Record, bool]:
    """(the record of a row, whether its turns were mended). Raises FormatError."""
    is_mended = False
    try:
        record = read(row)
    except TurnOrderError as error:
        if settings.turns == "strict":
            raise
        record, is_mended = mend_turns(error), True
    record = _end_with_trained(record)
    return record if settings.keep_system else _without_system(record), is_mended


def _end_with_trained(record: Record) -> Record:
    """A conversation without what follows its last answer that is to be trained: nothing would be learnt from it, and an
    evaluation takes the last answer for the right one."""
    if not isinstance(record, Conversation) or record.messages[-1].trained:
        return record
    answers = [i for i, m in enumerate(record.messages) if m.role == "assistant" and m.trained]
    return Conversation(record.messages[: answers[-1] + 1]) if answers else record


def _without_system(record: Record) -> Record:
    if isinstance(record, Preference | Feedback):
        prompt = _without_system(record.prompt)
        assert isinstance(prompt, Conversation)
        return replace(record, prompt=prompt)
    if isinstance(record, Conversation) and record.messages[0].role == "system":
        return Conversation(record.messages[1:])
    return record


def _read_into(source: Source, folder: Path, progress: Progress, settings: RowSettings) -> None:
    rows = sources.read_rows(source, progress)
    first = list(islice(rows, _ROWS_TO_RECOGNISE))
    if first and all(row.value is None for row in first) and source.format == "auto" and source.mapping is None:
        raise DataError(
            f"the first row cannot be read: {first[0].fault}"
            if len(first) == 1
            else f"none of the first {len(first)} rows can be read: {first[0].fault}",
            where=source.label,
            hint="fix the file; broken rows among good ones are left out and counted",
        )
    chosen = formats.choose_format(source, [row.value for row in first if row.value is not None])
    writer = _RowWriter(RowStore(folder))
    for done, row in enumerate(chain(first, rows), start=1):
        if row.value is None:
            writer.add_unusable(row, row.reason or "unreadable")
        else:
            try:
                writer.add(row, *_read_record(chosen.to_record, row.value, settings))
            except ContradictionError as error:
                # The rows before it were read on an assumption that is now known to be wrong.
                raise DataError(f"{row.location}: {error.reason}", where=source.label, hint=error.hint) from None
            except FormatError as error:
                writer.add_unusable(row, error.reason)
        if done % _PROGRESS_EVERY == 0:
            progress.update(done, source.label)
    writer.save()
    meta = {
        "format": chosen.name,
        "why": chosen.why,
        "rows": writer.rows,
        "files": writer.files,
        "judged": writer.is_judged,
        "reasons": list(writer.code_of_reason),
        "examples": writer.examples,
    }
    (folder / _META).write_text(json.dumps(meta), "utf-8")
