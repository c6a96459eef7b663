"""The ledger: what became of every source row.

`Ledger` counts fates by source, side and reason for the JSON summary; `LedgerWriter` writes the table of all rows.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from corral.data.mixture import SIDES, Side
from corral.data.row_store import text_column
from corral.formatting import count_of
from corral.storage import storage_errors

Fate: TypeAlias = Literal[
    "kept",
    "trimmed",
    "split",
    "truncated",
    "dropped",
    "fully masked",
    "duplicate",
    "near duplicate",
    "contaminated",
    "not sampled",
]
FATES: tuple[Fate, ...] = get_args(Fate)
USED_FATES: tuple[Fate, ...] = ("kept", "trimmed", "split", "truncated")
"""Fates of rows that are on a side. `trimmed`: some turns are left out or merged; `split`: in several examples; `truncated`:
cut at the maximum length."""
LOST_FATES: frozenset[Fate] = frozenset({"trimmed", "truncated", "dropped", "fully masked"})
"""Fates that count against `data.max_loss`: the row was wanted, and not all of it is trained on."""
FATES_WITH_REASON: frozenset[Fate] = frozenset({"dropped", "fully masked", "not sampled"})

EXAMPLES_PER_REASON = 5
"""Row numbers that are recorded for each kind of reason."""
LEDGER_FILE = "ledger.parquet"
OTHER_REASONS = "other reasons"
MAX_REASONS = 10_000
"""Different reasons that are kept of a source: one may quote its row, and junk make as many as there are rows."""
# Formats have fewer kinds of reasons; the limit bounds the ledger whatever rows hold.
_MAX_KINDS = 100
_QUOTED_VALUE = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\b\d[\d,.]*")


def reason_kind(reason: str) -> str:
    """A reason without the values and numbers that it quotes of its row. Rows are counted by kind and keep the reason."""
    return _QUOTED_VALUE.sub("…", reason)


@dataclass(slots=True)
class _Reason:
    fate: Fate
    text: str
    """The reason, or its kind once two rows differ in it."""
    count: int = 0
    examples: list[int | str] = field(default_factory=list[int | str])


@dataclass(slots=True)
class _Source:
    rows: int = 0
    fates: Counter[Fate] = field(default_factory=Counter[Fate])
    sides: Counter[Side] = field(default_factory=Counter[Side])
    reasons: dict[str, _Reason] = field(default_factory=dict[str, _Reason])
    """By kind."""


class Ledger:
    """Counts the rows that are read and, separately, those with a fate; `check` compares the two."""

    def __init__(self) -> None:
        self._sources: dict[str, _Source] = {}

    def add_read(self, source: str, rows: int = 1) -> None:
        """Count rows of a source that were read."""
        self._sources.setdefault(source, _Source()).rows += rows

    def add_fate(
        self, source: str, row: int | str, fate: Fate, reason: str | None = None, side: Side | None = None
    ) -> None:
        """Count a row with its fate.

        Args:
            source: the source's label.
            row: its number in it, or file and number.
            fate: what became of it.
            reason: why; given exactly for the fates in `FATES_WITH_REASON`.
            side: where it went; given exactly for the fates in `USED_FATES`.
        """
        assert (reason is not None) == (fate in FATES_WITH_REASON), f"a {fate} row with the reason {reason!r}"
        assert (side is not None) == (fate in USED_FATES), f"a {fate} row on the side {side!r}"
        entry = self._sources.setdefault(source, _Source())
        entry.fates[fate] += 1
        if side is not None:
            entry.sides[side] += 1
        if reason is None:
            return
        kind = reason_kind(reason)
        if fate == "dropped" and kind not in entry.reasons and len(entry.reasons) >= _MAX_KINDS:
            kind = reason = OTHER_REASONS
        counted = entry.reasons.setdefault(kind, _Reason(fate, reason))
        counted.count += 1
        if counted.text != reason:
            counted.text = kind
        if len(counted.examples) < EXAMPLES_PER_REASON:
            counted.examples.append(row)

    def check(self) -> None:
        """Check that every row read has exactly one fate. Raises AssertionError, as a mismatch is a bug in corral."""
        for label, s in self._sources.items():
            fates = s.fates.total()
            assert fates == s.rows, f"ledger: {label}: {s.rows} rows were read, {fates} have a fate"
            sides, kept = s.sides.total(), sum(s.fates[fate] for fate in USED_FATES)
            assert sides == kept, f"ledger: {label}: {kept} rows are kept, {sides} have a side"
            reasons = sum(reason.count for reason in s.reasons.values())
            left_out = sum(s.fates[fate] for fate in FATES_WITH_REASON)
            assert reasons == left_out, f"ledger: {label}: {reasons} reasons, {left_out} rows that have one"

    def to_json(self) -> dict[str, Any]:
        """`{"rows", "fates": {fate: rows}, "sources": {label: {"rows", "fates", "sides", "reasons"}}}`, each reason as
        `{"fate", "count", "examples": [rows, the first 5]}`, most frequent first. Raises AssertionError, as `check`.
        """
        self.check()
        totals = sum((s.fates for s in self._sources.values()), Counter[Fate]())
        return {
            "rows": totals.total(),
            "fates": {fate: totals[fate] for fate in FATES},
            "sources": {
                label: {
                    "rows": s.rows,
                    "fates": {fate: s.fates[fate] for fate in FATES},
                    "sides": {side: s.sides[side] for side in SIDES},
                    "reasons": {
                        r.text: {"fate": r.fate, "count": r.count, "examples": r.examples}
                        for r in sorted(s.reasons.values(), key=lambda r: (-r.count, r.text))
                    },
                }
                for label, s in self._sources.items()
            },
        }


def format_summary(ledger: Mapping[str, Any]) -> str:
    """A few lines for a terminal, from a ledger's JSON form: totals, then each source with its reasons."""
    lines = [f"{count_of(ledger['rows'], 'row')}: {_counts(ledger['fates'])}"]
    for label, source in ledger["sources"].items():
        lines.append(f"  {label}: {count_of(source['rows'], 'row')}: {_counts(source['fates'])}")
        if sides := _counts(source["sides"]):
            lines.append(f"    sides: {sides}")
        lines += [f"    {fact}" for fact in source_notes(source)]
        lines += [
            f"    {'' if reason.startswith(r['fate']) else r['fate'] + ': '}{format_reason(reason, r)}"
            for reason, r in source["reasons"].items()
        ]
    return "\n".join(lines)


def source_notes(source: Mapping[str, Any]) -> list[str]:
    """What a source's entry in the JSON summary says besides its counts, as sentences."""
    notes: list[str] = [source["why"]] if "why" in source else []
    if 0 < source.get("training_share", 1) < 1:
        notes.append(f"{source['training_share']:.1%} of the training examples ({source['training_examples']:,})")
    if ends := source.get("lost_ends"):
        notes.append(f"{count_of(ends, 'answer')} lost the end token")
    for name, one, other in (
        ("contaminated", "training", "held-out rows"),
        ("trained_on", "test", "rows that were trained on"),
    ):
        if shared := source.get(name):
            examples = ", ".join(map(str, source[f"{name}_rows"])) + (" …" if shared > EXAMPLES_PER_REASON else "")
            share = f"row{'s share' if shared > 1 else ' shares'} passages"
            notes.append(f"{shared:,} {one} {share} with {other} (row{'s' if shared > 1 else ''} {examples})")
    if lost := source.get("lost"):
        notes.append(
            f"lost: {lost:,.0f} of {count_of(round(source['asked']), 'row')} asked for ({lost / source['asked']:.2%})"
        )
    return notes


def format_reason(reason: str, entry: Mapping[str, Any]) -> str:
    """One reason with its count and examples: `12 × no answer: … (rows 3, 7, 9, 20, 31 …)`."""
    count, examples = entry["count"], entry["examples"]
    more = " …" if count > len(examples) else ""
    return f"{count:,} × {reason} (row{'s' if count > 1 else ''} {', '.join(map(str, examples))}{more})"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)


@dataclass(frozen=True, slots=True)
class RowFates:
    """Rows of one source, in columns of [rows].

    Args:
        row: number in the source or, if it has several files, in the file; ascending.
        file: index into `files`, or -1 if the source has one file only.
        fate: index into `FATES`.
        reason: index into `reasons`, or -1.
        side: index into `SIDES`, or -1.
        key: sha256 of the content as hex, or None if the row could not be parsed.
        tokens: of the whole row, or -1 if it was not encoded.
        trained_tokens: that count in the loss, or -1.
        lost_end: whether the end of an answer was cut off.
        original: of a copy, the row that it copies, as `SOURCE row N`; else None.
        contaminated: whether it shares a passage with a held-out row.
        reasons: the reasons' texts.
    """

    row: NDArray[np.int64]
    file: NDArray[np.int64]
    files: Sequence[str]
    fate: NDArray[np.int8]
    reason: NDArray[np.int32]
    side: NDArray[np.int8]
    key: Sequence[str | None]
    tokens: NDArray[np.int64]
    trained_tokens: NDArray[np.int64]
    lost_end: NDArray[np.bool_]
    original: Sequence[str | None]
    contaminated: NDArray[np.bool_]
    reasons: list[str]


class LedgerWriter:
    """Writes `ledger.parquet`: one line for each source row, in the order of sources and rows. The file appears when the
    block ends without an error. Raises StorageError."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        text = pa.dictionary(pa.int32(), pa.string())
        self._schema: Any = pa.schema(
            [
                ("source", text),
                ("file", text),
                ("row", pa.int64()),
                ("fate", text),
                ("reason", text),
                ("side", text),
                ("key", pa.string()),
                ("tokens", pa.int64()),
                ("trained_tokens", pa.int64()),
                ("lost_end", pa.bool_()),
                ("original", pa.string()),
                ("contaminated", pa.bool_()),
            ]
        )
        self._path, self._unfinished = path, path.with_name(f".{path.name}")
        with storage_errors(path):
            self._writer: Any = parquet.ParquetWriter(self._unfinished, self._schema, compression="zstd")

    def __enter__(self) -> LedgerWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            with storage_errors(self._path):
                self._writer.close()
                if kind is None:
                    os.replace(self._unfinished, self._path)
        finally:
            self._unfinished.unlink(missing_ok=True)

    def add(self, source: str, rows: RowFates) -> None:
        """Write rows of a source as a row group. More of the source may follow."""
        import pyarrow as pa

        def nullable(values: NDArray[np.int64]) -> Any:
            return pa.array(values, mask=values < 0)

        columns: list[Any] = [
            text_column(np.zeros(len(rows.row), np.int32), [source]),
            text_column(rows.file, rows.files),
            pa.array(rows.row),
            text_column(rows.fate, FATES),
            text_column(rows.reason, rows.reasons),
            text_column(rows.side, SIDES),
            pa.array(rows.key, pa.string()),
            nullable(rows.tokens),
            nullable(rows.trained_tokens),
            pa.array(rows.lost_end),
            pa.array(rows.original, pa.string()),
            pa.array(rows.contaminated),
        ]
        with storage_errors(self._path):
            self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema))
