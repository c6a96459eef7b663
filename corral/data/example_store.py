"""The examples of one side on disk: written in groups, read by number."""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from corral.data.mixture import rank
from corral.data.row_store import Column, RowStore, split_list_column
from corral.messages import Record, record_from_json
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


class ExampleStore(Sequence[Example]):
    """The examples of one side, read from disk on access.

    The shuffled order depends on content and seed alone, so the first n are a fair sample. An example of a repeated source
    occurs several times.

    Attributes:
        lengths: tokens of each example, all its sequences together. [examples]
        trained_tokens: tokens of each that count in the loss: trained, and not the first of a sequence. [examples]
        fates: what became of its row, as index into `FATES`. [examples]
        distinct_count: examples without their repeats.

    Raises ValueError if rows are missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._examples, order = RowStore(folder / "examples"), RowStore(folder / "order")
        self._stored: Ints = order.column("example")
        self.lengths: Ints = order.column("length")
        self.trained_tokens: Ints = order.column("trained_tokens")
        self.fates: NDArray[np.int8] = order.column("fate")
        self.distinct_count = len(self._examples)
        if damaged := (*self._examples.damaged, *order.damaged):
            raise ValueError(f"{folder.name}: {damaged[0].name} is damaged")
        if len(np.unique(self._stored)) != self.distinct_count:
            raise ValueError(f"{folder.name}: {self.distinct_count} examples, {len(self._stored)} in their order")

    def __len__(self) -> int:
        return len(self._stored)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
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
            columns: Arrow arrays: `key` (hex), `source`, `file` (null where the source has one), `row`, `record` (JSON), and
                `ids` and `trained`: of each example the lists of its sequences. [examples]
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
            for copy in range(repeat):
                self._ranks.append(rank(f"{key}/{copy}" if copy else key, self._seed, "order"))
                self._stored.append(number)
        self._unsaved.append(pa.table(dict(columns)))
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
