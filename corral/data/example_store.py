"""The examples of one side on disk: written row by row, read by number.

Token ids and masks are memory-mapped `.npy` arrays. Records are JSONL, with the offset of each line in another array, so
that reading one example touches its own bytes only.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from corral.data.ledger import FATES, Fate
from corral.data.mixture import rank
from corral.messages import Conversation, Feedback, Preference, Record, Text
from corral.template import Encoded

Ints: TypeAlias = NDArray[np.int64]


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


@dataclass(frozen=True, slots=True)
class RowOrigin:
    """Where an example comes from, as in `Example`."""

    key: str
    source: str
    index: int | str


class ExampleStore(Sequence[Example]):
    """The examples of one side, read from disk on access.

    The shuffled order depends on content and seed alone, so the first n are a fair sample. An example of a repeated source
    occurs several times.

    Attributes:
        lengths: tokens of each example, all its sequences together. [examples]
        trained_tokens: tokens of each that count in the loss: trained, and not the first of a sequence. [examples]
        fates: what became of its row, as index into `FATES`. [examples]
        distinct_count: examples without their repeats.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._order = _load(folder, "order")
        self._ids = _load(folder, "ids")
        self._trained = _load(folder, "trained")
        self._sequences = _load(folder, "sequences")
        self._examples = _load(folder, "examples")
        self.distinct_count = len(self._examples) - 1
        self._records = _load(folder, "records")
        self.trained_tokens: Ints = np.asarray(_load(folder, "trained_tokens"))[self._order]
        self.fates: NDArray[np.int8] = np.asarray(_load(folder, "fates"))[self._order]
        bounds = self._sequences[self._examples]
        self.lengths: Ints = np.diff(bounds)[self._order]
        size = (folder / "records.jsonl").stat().st_size
        if not (bounds[-1] == len(self._ids) == len(self._trained) and self._records[-1] == size):
            raise ValueError(f"{folder.name}: the arrays do not fit each other")

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        stored = int(self._order[index])
        first, last = self._examples[stored], self._examples[stored + 1]
        start, end = int(self._records[stored]), int(self._records[stored + 1])
        with (self._folder / "records.jsonl").open("rb") as file:
            file.seek(start)
            row: dict[str, Any] = json.loads(file.read(end - start))
        sequences = tuple(self._sequence(i) for i in range(first, last))
        return Example(row["key"], row["source"], row["index"], sequences, record_from_json(row))

    def _sequence(self, number: int) -> Encoded:
        part = slice(int(self._sequences[number]), int(self._sequences[number + 1]))
        return Encoded(tuple(self._ids[part].tolist()), tuple(self._trained[part].tolist()))


class ExampleWriter:
    """Writes the files of an `ExampleStore`: examples in the order in which they are added, and the shuffled order.

    Args:
        folder: created here.
        seed: decides the shuffled order, with the keys.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        folder.mkdir()
        self._folder, self._seed = folder, seed
        self._ids = _ArrayWriter(folder / "ids.npy", np.dtype("<u4"))
        self._trained = _ArrayWriter(folder / "trained.npy", np.dtype("?"))
        self._records = (folder / "records.jsonl").open("wb")
        # Eight bytes a row each: what stays in memory until the end must be small.
        self._sequence_ends, self._example_ends, self._record_ends = (array("q", [0]) for _ in range(3))
        self._trained_tokens = array("q")
        self._fates = array("b")
        self._ranks, self._ranked = array("d"), array("q")

    def __enter__(self) -> ExampleWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._ids.file.close()
        self._trained.file.close()
        self._records.close()

    def __len__(self) -> int:
        """Examples so far, repeats included."""
        return len(self._ranked)

    def add(
        self,
        origin: RowOrigin,
        record: bytes,
        ids: NDArray[np.uint32],
        trained: NDArray[np.bool_],
        lengths: Sequence[int],
        *,
        fate: Fate,
        repeat: int = 1,
    ) -> None:
        """Write one example.

        Args:
            origin: its key, source and row number.
            record: a JSON object.
            ids: of all its sequences.
            trained: for each id whether it is trained.
            lengths: of its sequences.
            fate: of its row.
            repeat: how often it occurs in the shuffled order.
        """
        self._ids.append(ids)
        self._trained.append(trained)
        starts = np.cumsum([0, *lengths[:-1]])
        for length in lengths:
            self._sequence_ends.append(self._sequence_ends[-1] + length)
        self._example_ends.append(len(self._sequence_ends) - 1)
        head = json.dumps({"key": origin.key, "source": origin.source, "index": origin.index}, separators=(",", ":"))
        line = head[:-1].encode() + b"," + record[1:] + b"\n"
        self._records.write(line)
        self._record_ends.append(self._record_ends[-1] + len(line))
        for copy in range(repeat):
            self._ranks.append(rank(f"{origin.key}/{copy}" if copy else origin.key, self._seed, "order"))
            self._ranked.append(len(self._fates))
        # The first token of a sequence is predicted from nothing.
        self._trained_tokens.append(int(trained.sum()) - int(trained[starts].sum()))
        self._fates.append(FATES.index(fate))

    def finish(self) -> None:
        """Write the arrays that are known only at the end."""
        self._ids.finish()
        self._trained.finish()
        self._records.flush()
        order = np.asarray(self._ranked, np.int64)[np.argsort(np.asarray(self._ranks), kind="stable")]
        integers = np.dtype("<i8")
        for name, values, dtype in (
            ("sequences", self._sequence_ends, integers),
            ("examples", self._example_ends, integers),
            ("records", self._record_ends, integers),
            ("trained_tokens", self._trained_tokens, integers),
            ("fates", self._fates, np.dtype("i1")),
            ("order", order, integers),
        ):
            writer = _ArrayWriter(self._folder / f"{name}.npy", dtype)
            with writer.file:
                writer.append(np.asarray(values))
                writer.finish()


class _ArrayWriter:
    """Appends to a one-dimensional `.npy` file. (`numpy.save` reports a full disk without its error number.)"""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.file = path.open("wb")
        self._dtype = dtype
        self._count = 0
        self._write_header()

    def append(self, values: NDArray[Any]) -> None:
        self.file.write(values.astype(self._dtype, copy=False).tobytes())
        self._count += len(values)

    def finish(self) -> None:
        self.file.seek(0)
        self._write_header()
        self.file.flush()

    def _write_header(self) -> None:
        # numpy pads it so that the first dimension may grow to any number of digits.
        description = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": description, "fortran_order": False, "shape": (self._count,)}
        np.lib.format.write_array_header_1_0(self.file, header)


def _load(folder: Path, name: str) -> NDArray[Any]:
    return np.load(folder / f"{name}.npy", mmap_mode="r")


def json_line(row: Mapping[str, Any]) -> str:
    """A row as a line of JSON."""
    # ASCII, as a row may hold half a surrogate pair, which UTF-8 cannot encode.
    return json.dumps(row, separators=(",", ":")) + "\n"


def record_from_json(row: Mapping[str, Any]) -> Record:
    """The inverse of `messages.record_to_json`; other keys are ignored."""
    if "text" in row:
        return Text(row["text"])
    if "messages" in row:
        return Conversation.from_json(dict(row))
    prompt = Conversation.from_json({"messages": row["prompt"]})
    if "chosen" in row:
        return Preference(prompt, row["chosen"], row["rejected"])
    return Feedback(prompt, row["completion"], row["score"])
