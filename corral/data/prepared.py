"""The recipe's data → examples on disk, and back: `prepare` writes them, `Prepared.open` reads them.

Under the folder: `ledger.json`, `dropped.jsonl` (a few dropped rows of each reason, to look at) and `rows/SIDE/`, the
examples of each side. Each source is read twice, so that no more than keys are held in memory. Equal input gives equal
bytes.

This module does not know what training makes of an example, nor how ids come about: that is the template's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from corral.data.formats import FORMATS, FormatError
from corral.data.ledger import FATES, Ledger, reason_line
from corral.data.mixture import SIDES, Side, select, share_for_one, side_of
from corral.data.rows import Example, Rows, RowsWriter, json_line
from corral.data.sources import RawRow, read
from corral.errors import DataError, TemplateError
from corral.messages import Conversation, Record, record_key
from corral.progress import Progress
from corral.recipe import Data, Source
from corral.storage import new_directory, write_atomic, write_json
from corral.template import Encoded, Template

Sequences: TypeAlias = tuple[Encoded, ...]

_VERSION = 1
_EXCERPT = 2000  # characters of a dropped row that are kept to be shown
_TELL_EVERY = 100
_ROWS = "rows"
_META = "prepared.json"


@dataclass(frozen=True)
class Prepared:
    """All prepared rows. Attributes: the three sides."""

    folder: Path
    train: Rows
    validation: Rows
    test: Rows

    @classmethod
    def open(cls, folder: Path) -> Prepared:
        """What `prepare` wrote into a folder. Raises: DataError (it is missing or damaged)."""
        rows = folder / _ROWS
        try:
            meta: dict[str, Any] = json.loads((rows / _META).read_text("utf-8"))
            if meta["version"] != _VERSION:
                raise ValueError(f"they have version {meta['version']}, this corral reads {_VERSION}")
            sides = {side: Rows(rows / side) for side in SIDES}
            for side, found in sides.items():
                if len(found) != meta["examples"][side]:
                    raise ValueError(f"{side}: {len(found)} rows, {meta['examples'][side]} were written")
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise DataError(
                f"the prepared rows cannot be read: {error}",
                where=str(rows),
                hint="delete this stage's folder and run again: it is made anew",
            ) from None
        return cls(folder, **sides)

    def side(self, name: Side) -> Rows:
        """A side by its name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]

    @property
    def ledger(self) -> dict[str, Any]:
        """The ledger's JSON form."""
        return json.loads((self.folder / "ledger.json").read_text("utf-8"))

    @property
    def dropped(self) -> list[dict[str, Any]]:
        """A few dropped rows of each source and reason: `{"source", "index", "reason", "text"}`."""
        return [json.loads(line) for line in (self.folder / "dropped.jsonl").read_bytes().splitlines()]


def prepare(data: Data, template: Template, folder: Path, seed: int, progress: Progress | None = None) -> Prepared:
    """Read, check, choose, split and encode all rows, and write them into `folder`.

    Args:
        data: the recipe's section.
        template: makes ids and masks.
        folder: an existing directory; rows that are in it already are replaced as a whole.
        seed: with a row's content decides its side, its place, and whether a cap keeps it.
        progress: told how far it is.

    Raises:
        DataError: a source cannot be read; no row is left to train on; a side that was asked for is empty.
        AssetError: a data asset cannot be had.
        StorageError: the folder cannot be written.
    """
    progress = progress or Progress()
    account = _Account()
    chosen = _choose(data.sources, seed, account, progress)
    with new_directory(folder / _ROWS) as rows:
        with ExitStack() as files:
            writers: dict[Side, RowsWriter] = {side: files.enter_context(RowsWriter(rows / side)) for side in SIDES}
            _encode_all(data, template, seed, chosen, writers, account, progress)
            for writer in writers.values():
                writer.finish(seed)
        ledger = account.ledger.to_json()
        write_json(folder / "ledger.json", ledger)
        write_atomic(folder / "dropped.jsonl", "".join(json_line(row) for row in account.examples))
        keys: dict[Side, list[str]] = {side: writer.keys for side, writer in writers.items()}
        _refuse_empty(data, keys, seed, ledger)
        write_json(rows / _META, {"version": _VERSION, "examples": {side: len(keys[side]) for side in SIDES}})
    return Prepared.open(folder)


@dataclass
class _Account:
    """The ledger, and the dropped rows to be shown."""

    ledger: Ledger = field(default_factory=Ledger)
    examples: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def drop(self, source: str, row: RawRow, reason: str) -> None:
        if self.ledger.add(source, row.index, "dropped", reason):
            text = row.fault if row.value is None else json.dumps(row.value, ensure_ascii=False)[:_EXCERPT]
            self.examples.append({"source": source, "index": row.index, "reason": reason, "text": text})


def _choose(sources: Sequence[Source], seed: int, account: _Account, progress: Progress) -> dict[str, dict[int, str]]:
    """For each source the numbers and keys of its rows that are used; the others get their fate."""
    progress.start("Reading rows", None)
    chosen: dict[str, dict[int, str]] = {}
    taken: set[str] = set()
    for source in sources:
        label = source.label
        selection = select(_keys(source, account, progress), seed, cap=source.rows, taken=taken)
        for index in selection.duplicates:
            account.ledger.add(label, index, "duplicate")
        for index in selection.not_sampled:
            account.ledger.add(label, index, "not sampled")
        chosen[label] = selection.chosen
        taken.update(selection.chosen.values())
    return chosen


def _keys(source: Source, account: _Account, progress: Progress) -> Iterator[tuple[int, str]]:
    """(number, key) of each row that has the source's format; the others are dropped."""
    to_record = FORMATS[source.format]
    for done, row in enumerate(read(source, progress), start=1):
        account.ledger.read(source.label)
        if row.value is None:
            account.drop(source.label, row, row.reason or "unreadable")
        else:
            try:
                yield row.index, record_key(to_record(row.value))
            except FormatError as error:
                account.drop(source.label, row, error.reason)
        if done % _TELL_EVERY == 0:
            progress.update(done, source.label)


def _chosen_rows(source: Source, chosen: Mapping[int, str]) -> Iterator[tuple[RawRow, str, Record]]:
    """The chosen rows, read again. Raises: DataError (they are not what they were)."""
    to_record = FORMATS[source.format]
    found = 0
    for row in read(source):
        key = chosen.get(row.index)
        if key is None:
            continue
        try:
            record = to_record(row.value or {})
        except FormatError:
            break
        if record_key(record) != key:
            break
        found += 1
        yield row, key, record
    if found != len(chosen):
        raise DataError("the source changed while it was read", where=source.path, hint="run again when it is at rest")


def _encode_all(
    data: Data,
    template: Template,
    seed: int,
    chosen: Mapping[str, Mapping[int, str]],
    writers: Mapping[Side, RowsWriter],
    account: _Account,
    progress: Progress,
) -> None:
    """Encode the chosen rows and write each to its side, or drop it with the reason."""
    progress.start("Encoding rows", sum(map(len, chosen.values())))
    done = 0
    for source in data.sources:
        for row, key, record in _chosen_rows(source, chosen[source.label]):
            done += 1
            if done % _TELL_EVERY == 0:
                progress.update(done, source.label)
            try:
                sequences, truncated = _encode(record, template, data)
            except _DroppedError as error:
                account.drop(source.label, row, error.reason)
                continue
            side = side_of(key, seed, data.split)
            writers[side].add(Example(key, source.label, row.index, sequences, record), truncated=truncated)
            account.ledger.add(source.label, row.index, "truncated" if truncated else "kept", side=side)


class _DroppedError(Exception):
    """A row cannot be trained on, for a reason that goes into the ledger."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def _encode(record: Record, template: Template, data: Data) -> tuple[Sequences, bool]:
    """(the sequences of a record, whether they were truncated). Raises: _DroppedError."""
    try:
        sequences = sequences_of(record, template)
    except TemplateError as error:
        raise _DroppedError(error.what) from None
    limit = data.max_length
    overlong = any(len(s.ids) > limit for s in sequences)
    if overlong and data.overlong == "drop":
        raise _DroppedError(f"longer than {limit} tokens")
    if overlong:
        sequences = tuple(Encoded(s.ids[:limit], s.trained[:limit]) for s in sequences)
    if not all(any(s.trained[1:]) for s in sequences):
        within = f"the first {limit} tokens" if overlong else "its tokens"
        raise _DroppedError(f"fully masked: none of {within} is trained")
    return sequences, overlong


def sequences_of(record: Record, template: Template) -> Sequences:
    """The whole token sequences of a record, of any length. Raises: TemplateError (the template refuses it)."""
    match record:
        case Conversation():
            return (template.encode(record),)
        case _:
            raise AssertionError(f"no format makes a {type(record).__name__} yet")


def _refuse_empty(data: Data, keys: Mapping[Side, Sequence[str]], seed: int, ledger: Mapping[str, Any]) -> None:
    """Raises DataError where a side has no row that should have some."""
    where = ", ".join(source.path for source in data.sources)
    kept = [key for side in SIDES for key in keys[side]]
    if not kept:
        raise _nothing_left(data, ledger, where)
    if not keys["train"]:
        raise DataError(
            f"no row is left to train on: all {len(kept)} usable rows are held out",
            where=where,
            hint="lower data.split.validation and data.split.test, or add rows",
        )
    shares: dict[Literal["validation", "test"], float] = {"validation": data.split.validation, "test": data.split.test}
    for side, share in shares.items():
        if share and not keys[side]:
            least = share_for_one(kept, seed, side)
            enough = f"set data.split.{side} to {least:g} or more, " if least + sum(shares.values()) - share < 1 else ""
            raise DataError(
                f"the {side} side is empty: none of the {len(kept)} usable rows falls into its share of {share:g}",
                where=where,
                hint=f"{enough}set data.split.{side} to 0, or add rows",
            )


def _nothing_left(data: Data, ledger: Mapping[str, Any], where: str) -> DataError:
    counts = ", ".join(f"{ledger['fates'][fate]:,} {fate}" for fate in FATES if ledger["fates"][fate])
    reasons = [item for source in ledger["sources"].values() for item in source["reasons"].items()]
    reasons.sort(key=lambda item: -item[1]["count"])
    lines = [f"no row is left to train on: {ledger['rows']:,} rows read, {counts}"]
    lines += [f"  {reason_line(reason, entry)}" for reason, entry in reasons[:5]]
    hint = "mend the rows, or set the `format` of data.sources that says what they look like"
    if reasons and reasons[0][0].startswith(("longer than", "fully masked")):
        hint = f"raise data.max_length (it is {data.max_length})"
        hint += ', or set data.overlong = "truncate"' if data.overlong == "drop" else ""
    return DataError("\n".join(lines), where=where, hint=hint)
