"""The examples of one side on disk: written in groups, read by number."""

from __future__ import annotations

import copy
import hashlib
import json
from abc import abstractmethod
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from corral.data.mixture import rank
from corral.data.row_store import Column, RowStore, split_list_column, split_positions, to_arrow
from corral.messages import RECORD_TYPES, Record, record_from_json, record_type
from corral.template import Encoded

Ints: TypeAlias = NDArray[np.int64]

_ROWS_PER_FILE = 5000
_TOKENS_PER_FILE = 2_000_000


@dataclass(frozen=True, slots=True)
class Example:
    """One prepared row.

    Args:
        key: sha256 of its content.
        source: the label of its source.
        index: its row number there, or `FILE:NUMBER` where the source has several files.
        sequences: its token sequences: one for a conversation.
        record: the whole record, even if its sequences are truncated.
    """

    key: str
    source: str
    index: int | str
    sequences: tuple[Encoded, ...]
    record: Record


ExampleType = TypeVar("ExampleType", bound=Example, covariant=True)


class ExampleSequence(Sequence[ExampleType]):
    """Examples that are made when they are asked for, by number."""

    @abstractmethod
    def example(self, index: int) -> ExampleType:
        """One example."""

    @overload
    def __getitem__(self, index: int) -> ExampleType: ...
    @overload
    def __getitem__(self, index: slice) -> list[ExampleType]: ...
    def __getitem__(self, index: int | slice) -> ExampleType | list[ExampleType]:
        if isinstance(index, slice):
            return [self.example(i) for i in range(*index.indices(len(self)))]
        return self.example(index)


class SizedExamples(ExampleSequence[Example]):
    """Examples whose sizes are known without making them.

    Attributes:
        lengths: tokens of each example, all its sequences together. [examples]
        trained_tokens: tokens of each that count in the loss: trained, and not the first of a sequence. [examples]
    """

    lengths: Ints
    trained_tokens: Ints

    @cached_property
    @abstractmethod
    def digest(self) -> str:
        """sha256 (hex) of all that training or evaluation reads of them, in order."""

    @property
    def loss_lengths(self) -> Ints:
        """Tokens of the sequences that the loss reads: all but those read for a statistic alone. [examples]"""
        return self.lengths


@dataclass(frozen=True, slots=True)
class SequenceFigures:
    """Of the sequences of some examples, in order. [sequences] each

    Args:
        example: the number of its example.
        place: its number among the sequences of its example.
        stored: what repeats of an example share, and no two others.
        length: tokens.
        start: tokens before the first trained one.
        trained: tokens that count in the loss.
        content, prompt: sha256 of its ids, and of those before the first trained one. [sequences, 32]
    """

    example: Ints
    place: Ints
    stored: Ints
    length: Ints
    start: Ints
    trained: Ints
    content: NDArray[np.uint8]
    prompt: NDArray[np.uint8]


class ExampleStore(SizedExamples):
    """The examples of one side, read from disk on access.

    The shuffled order depends on content and seed alone, so the first n are a fair sample. An example of a repeated source
    occurs several times.

    Attributes:
        fates: what became of its row, as index into `FATES`. [examples]
        distinct_count: examples without their repeats.

    Raises ValueError if rows are missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._examples, order = RowStore(folder / "examples"), RowStore(folder / "order")
        self._stored: Ints = order.column("example")
        self.lengths = order.column("length")
        self.trained_tokens = order.column("trained_tokens")
        self.fates: NDArray[np.int8] = order.column("fate")
        self.distinct_count = len(self._examples)
        if damaged := (*self._examples.damaged, *order.damaged):
            raise ValueError(f"{folder.name}: {damaged[0].name} is damaged")
        if len(np.unique(self._stored)) != self.distinct_count:
            raise ValueError(f"{folder.name}: {self.distinct_count} examples, {len(self._stored)} in their order")

    def select(
        self, sources: Collection[str] | None = None, types: Collection[type[Record]] | None = None
    ) -> ExampleStore:
        """The examples of some sources and record types alone, in the same order; nothing is copied.

        Args:
            sources: labels of sources; by default all.
            types: of their records; by default all.
        """
        chosen = np.ones(len(self._examples), bool)
        if sources is not None:
            chosen &= self._is_of_source(sources)
        if types is not None:
            chosen &= np.isin(self._contents["type"], [RECORD_TYPES.index(each) for each in types])
        kept = chosen[self._stored]
        view = copy.copy(self)
        view.__dict__.pop("digest", None)
        view._stored, view.lengths, view.fates = self._stored[kept], self.lengths[kept], self.fates[kept]
        view.trained_tokens = self.trained_tokens[kept]
        view.distinct_count = len(np.unique(view._stored))
        return view

    def _is_of_source(self, labels: Collection[str]) -> NDArray[np.bool_]:
        """Whether each stored example is of one of these sources. [stored examples]"""
        import pyarrow as pa
        from pyarrow import compute

        is_in: Any = compute.is_in  # type: ignore[reportUnknownMemberType]
        values: Any = pa.array(list(labels), pa.string())
        batches = self._examples.read(self._examples.positions)
        parts = [is_in(batch["source"], value_set=values).to_numpy(zero_copy_only=False) for _, batch in batches]
        return np.concatenate([np.zeros(0, bool), *parts])

    def records(self) -> Iterator[Record]:
        """The record of each example, its repeats left out, in the order in which they are stored."""
        for _, batch in self._examples.read(np.unique(self._stored)):
            yield from (record_from_json(json.loads(line.as_py())) for line in batch["record"])

    def is_of(self, kind: type[Record]) -> NDArray[np.bool_]:
        """Whether the record of each example is of this type. [examples]"""
        return self._contents["type"][self._stored] == RECORD_TYPES.index(kind)

    def sequence_figures(self) -> SequenceFigures:
        """The figures of all sequences, those of repeats included."""
        positions = np.unique(self._stored)
        parts = [_sequence_columns(batch) for _, batch in self._examples.read(positions)]
        if not parts:
            none, no_keys = np.zeros(0, np.int64), np.zeros((0, 32), np.uint8)
            return SequenceFigures(none, none, none, none, none, none, no_keys, no_keys)
        counts, *columns = (np.concatenate(column) for column in zip(*parts, strict=True))
        number = np.searchsorted(positions, self._stored)
        example = np.repeat(np.arange(len(self)), counts[number])
        place = np.arange(len(example)) - np.repeat(np.cumsum(counts[number]) - counts[number], counts[number])
        at = (np.cumsum(counts) - counts)[number][example] + place
        length, start, trained, content, prompt = (column[at] for column in columns)
        return SequenceFigures(example, place, self._stored[example], length, start, trained, content, prompt)

    def key_pairs(self) -> list[tuple[str, str]]:
        """(the key of its row, its own key) of each example; they differ for a window of a row. [examples]

        In place of a row's key, rows that were stored without it have a name that its windows share.
        """
        positions = np.unique(self._stored)
        keys: list[tuple[str, str]] = []
        for _, batch in self._examples.read(positions):
            if "row_key" in batch.schema.names:
                rows = batch["row_key"].to_pylist()
            else:
                places = zip(*(batch[name].to_pylist() for name in ("source", "file", "row")), strict=True)
                rows = [hashlib.sha256(repr(place).encode()).hexdigest() for place in places]
            keys += zip(rows, batch["key"].to_pylist(), strict=True)
        return [keys[i] for i in np.searchsorted(positions, self._stored)]

    def keys_among(self, keys: Collection[str]) -> set[str]:
        """Those of the keys that an example has, or the row of which it is a window."""
        wanted = set(keys)
        batches = (batch for _, batch in self._examples.read(np.unique(self._stored)))
        columns = (batch[name] for batch in batches for name in ("key", "row_key") if name in batch.schema.names)
        return {key for column in columns for key in column.to_pylist() if key in wanted}

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of all that training or evaluation reads: keys, records, ids and masks, in order, repeats included.

        The names of sources and files, and the numbers of rows in them, are no part of it.
        """
        digests, digest = self._contents["digest"], hashlib.sha256()
        for positions in split_positions(self._stored):
            digest.update(digests[positions].tobytes())
        return digest.hexdigest()

    @cached_property
    def _contents(self) -> Mapping[str, NDArray[Any]]:
        """The columns of `_content_columns`, also of rows that were stored without them. [stored examples]"""
        positions = self._examples.positions
        if not len(positions):
            return {"type": np.zeros(0, np.int8), "digest": np.zeros((0, 32), np.uint8)}
        if "digest" in self._examples.locate(0)[0].schema.names:
            return {name: self._examples.column(name, positions) for name in ("type", "digest")}
        parts = [_content_columns(batch) for _, batch in self._examples.read(positions)]
        return {name: np.concatenate([part[name] for part in parts]) for name in ("type", "digest")}

    def __len__(self) -> int:
        return len(self._stored)

    def example(self, index: int) -> Example:
        """The example at a place in the order."""
        rows, offset = self._examples.locate(int(self._stored[index]))
        row: dict[str, Any] = rows.slice(offset, 1).select(["key", "source", "file", "row", "record"]).to_pylist()[0]
        sequences = tuple(
            Encoded(tuple(ids.values.to_numpy().tolist()), tuple(trained.values.to_pylist()))
            for ids, trained in zip(rows["ids"][offset].values, rows["trained"][offset].values, strict=True)
        )
        name = row["row"] if row["file"] is None else f"{row['file']}:{row['row']}"
        return Example(row["key"], row["source"], name, sequences, record_from_json(json.loads(row["record"])))


class ExampleWriter:
    """Writes an `ExampleStore`: examples in the order in which they are added, and the shuffled order.

    Args:
        folder: created here.
        seed: decides the shuffled order, with the keys.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        folder.mkdir()
        self._examples, self._order = RowStore(folder / "examples"), RowStore(folder / "order")
        self._seed = seed
        self._unsaved: list[Any] = []
        self._unsaved_rows = self._unsaved_tokens = 0
        # What stays in memory until the end must be small: some bytes an example.
        self._stored, self._ranks = array("q"), array("d")
        self._lengths, self._trained, self._fates = array("q"), array("q"), array("b")

    def __len__(self) -> int:
        """Examples so far, repeats included."""
        return len(self._stored)

    def add(self, columns: Mapping[str, Column], fates: NDArray[np.int8], repeat: int = 1) -> None:
        """Write examples.

        Args:
            columns: Arrow arrays: `key` and `row_key` (hex; of the example and of its row), `source`, `file` (null where the
                source has one), `row`, `record` (JSON), and `ids` and `trained`: of each example the lists of its sequences.
                [examples]
            fates: of their rows, as index into `FATES`. [examples]
            repeat: how often each occurs in the shuffled order.
        """
        import pyarrow as pa

        lengths, trained = _count_tokens(columns["trained"])
        first = len(self._lengths)
        self._lengths.extend(lengths.tolist())
        self._trained.extend(trained.tolist())
        self._fates.extend(fates.tolist())
        for number, key in enumerate(columns["key"].to_pylist(), start=first):
            for number_of_copy in range(repeat):
                self._ranks.append(rank(f"{key}/{number_of_copy}" if number_of_copy else key, self._seed, "order"))
                self._stored.append(number)
        contents = {name: to_arrow(column) for name, column in _content_columns(columns).items()}
        self._unsaved.append(pa.table({**columns, **contents}))
        self._unsaved_rows += len(lengths)
        self._unsaved_tokens += int(lengths.sum())
        if self._unsaved_rows >= _ROWS_PER_FILE or self._unsaved_tokens >= _TOKENS_PER_FILE:
            self._save()

    def _save(self) -> None:
        import pyarrow as pa

        if self._unsaved_rows:
            table: Any = pa.concat_tables(self._unsaved).combine_chunks()
            first = len(self._lengths) - self._unsaved_rows
            columns = {name: table[name].chunk(0) for name in table.column_names}
            self._examples.save(np.arange(first, len(self._lengths)), columns)
        self._unsaved, self._unsaved_rows, self._unsaved_tokens = [], 0, 0

    def finish(self) -> None:
        """Write what is not written yet, and the order."""
        self._save()
        order = np.asarray(self._stored, np.int64)[self._shuffle()]
        columns = {
            "example": order,
            "length": np.asarray(self._lengths, np.int64)[order],
            "trained_tokens": np.asarray(self._trained, np.int64)[order],
            "fate": np.asarray(self._fates, np.int8)[order],
        }
        self._order.save(np.arange(len(order)), columns)

    def _shuffle(self) -> Ints:
        """The order by rank. Of rows of equal content, which have one rank, all but the first get another."""
        ranks = np.array(self._ranks)
        order = np.argsort(ranks, kind="stable")
        copy = 0
        for before, i in pairwise(order.tolist()):
            copy = copy + 1 if self._ranks[i] == self._ranks[before] else 0
            if copy:
                ranks[i] = rank(f"{self._ranks[i]!r}/{copy}", self._seed, "order")
        return np.argsort(ranks, kind="stable")


def _content_columns(columns: Mapping[str, Column]) -> dict[str, NDArray[Any]]:
    """What is known of examples by their content alone.

    Args:
        columns: as in `ExampleWriter.add`.

    Returns: `type`: of the record, as index into `RECORD_TYPES`; `digest`: sha256 of key, record, ids and masks.
    """
    sequences, bounds = split_list_column(columns["ids"])
    ids, starts = split_list_column(sequences)
    flags = split_list_column(split_list_column(columns["trained"])[0])[0]
    ids, trained = ids.to_numpy().astype("<u4", copy=False), flags.to_numpy(zero_copy_only=False)
    keys, records = columns["key"].to_pylist(), columns["record"].to_pylist()
    types, digests = np.empty(len(keys), np.int8), np.empty((len(keys), 32), np.uint8)
    for i, (key, record, (first, last)) in enumerate(zip(keys, records, pairwise(bounds), strict=True)):
        types[i] = RECORD_TYPES.index(record_type(json.loads(record)))
        part = slice(int(starts[first]), int(starts[last]))
        lengths = np.diff(starts[first : last + 1]).astype("<i8")
        pieces = (lengths.tobytes(), ids[part].tobytes(), trained[part].tobytes(), record)
        digest = hashlib.sha256(f"{key} {len(lengths)}\n".encode())
        for piece in pieces:
            digest.update(piece)
        digests[i] = np.frombuffer(digest.digest(), np.uint8)
    return {"type": types, "digest": digests}


def _sequence_columns(rows: Mapping[str, Column]) -> tuple[NDArray[Any], ...]:
    """(sequences of each example; of each sequence its length, start, trained tokens, content and prompt as in
    `SequenceFigures`)."""
    sequences, example_bounds = split_list_column(rows["ids"])
    ids, bounds = split_list_column(sequences)
    ids = ids.to_numpy().astype("<u4", copy=False)
    flags = split_list_column(split_list_column(rows["trained"])[0])[0].to_numpy(zero_copy_only=False)
    trained = np.append(np.flatnonzero(flags), len(flags))
    first = np.minimum(trained[np.searchsorted(trained, bounds[:-1])], bounds[1:])
    flags[bounds[:-1]] = False
    counts = np.diff(np.concatenate([[0], np.cumsum(flags)])[bounds])
    contents, prompts = (
        np.frombuffer(
            b"".join(
                hashlib.sha256(ids[start:end].tobytes()).digest() for start, end in zip(bounds[:-1], ends, strict=True)
            ),
            np.uint8,
        ).reshape(-1, 32)
        for ends in (bounds[1:], first)
    )
    return np.diff(example_bounds), np.diff(bounds), first - bounds[:-1], counts, contents, prompts


def _count_tokens(trained: Any) -> tuple[Ints, Ints]:
    """(tokens of each example, those of them that count in the loss), from the lists of its sequences. [examples] each"""
    sequences, example_bounds = split_list_column(trained)
    flags, bounds = split_list_column(sequences)
    flags = flags.to_numpy(zero_copy_only=False)
    # The first token of a sequence is predicted from nothing.
    flags[bounds[:-1]] = False
    counts = np.concatenate([[0], np.cumsum(flags)])
    ends = bounds[example_bounds]
    return np.diff(ends), np.diff(counts[ends])
