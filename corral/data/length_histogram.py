"""A histogram of row lengths in tokens, from the ledger's table, for the terminal and for a page.

Lengths are those before truncation; bins double in width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

Group: TypeAlias = Literal["trained on", "cut", "left out"]
GROUPS: tuple[Group, ...] = ("trained on", "cut", "left out")
_GROUP_OF_FATE: dict[str, Group] = {
    "kept": "trained on",
    "trimmed": "trained on",
    "split": "trained on",
    "truncated": "cut",
}
_FIRST_BIN_END = 16
_BAR_WIDTH = 40


@dataclass(frozen=True, slots=True)
class Bin:
    """How many rows of each group have `min_tokens` to `max_tokens` tokens."""

    min_tokens: int
    max_tokens: int
    counts: tuple[int, ...]

    @property
    def total(self) -> int:
        """Rows of all groups."""
        return sum(self.counts)


def read_histogram(table: Path) -> list[Bin]:
    """Bins of the rows that were encoded, from the shortest row's bin to the longest one's. Reads one row group at a time."""
    from pyarrow import parquet

    counts = np.zeros((64, len(GROUPS)), np.int64)
    file: Any = parquet.ParquetFile(table)
    with file:
        for number in range(file.num_row_groups):
            columns: Any = file.read_row_group(number, columns=["tokens", "fate"])
            tokens = np.asarray(columns["tokens"].fill_null(0).to_numpy(), np.int64)
            fates: Any = columns["fate"].combine_chunks()
            groups = [GROUPS.index(_GROUP_OF_FATE.get(fate, "left out")) for fate in fates.dictionary.to_pylist()]
            group = np.array(groups, np.int64)[np.asarray(fates.indices)]
            encoded = tokens > 0
            np.add.at(counts, (_bin_numbers(tokens[encoded]), group[encoded]), 1)
    filled = np.flatnonzero(counts.sum(axis=1))
    if not len(filled):
        return []
    return [
        Bin(_FIRST_BIN_END << (n - 1) if n else 1, (_FIRST_BIN_END << n) - 1, tuple(counts[n].tolist()))
        for n in range(int(filled[0]), int(filled[-1]) + 1)
    ]


def _bin_numbers(tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.maximum(0, np.frexp(tokens.astype(np.float64))[1] - _FIRST_BIN_END.bit_length() + 1)


def to_lines(bins: Sequence[Bin]) -> list[str]:
    """One line per bin, with a bar: `█` trained on, `▓` cut, `░` left out."""
    if not bins:
        return []
    largest = max(b.total for b in bins)
    lines = ["tokens       rows   █ trained on  ▓ cut  ░ left out"]
    for b in bins:
        # A group that has any rows gets at least one character.
        widths = [max(1, round(count * _BAR_WIDTH / largest)) if count else 0 for count in b.counts]
        bar = "".join(sign * width for sign, width in zip("█▓░", widths, strict=True))
        lines.append(f"{b.min_tokens:>5}–{b.max_tokens:<5} {b.total:>7,} {bar}".rstrip())
    return lines


def to_html(bins: Sequence[Bin]) -> str:
    """A table with bars drawn in SVG; classes `trained`, `cut` and `out` colour them."""
    if not bins:
        return ""
    largest = max(b.total for b in bins)
    rows: list[str] = []
    for b in bins:
        bar: list[str] = []
        left = 0.0
        for name, count in zip(("trained", "cut", "out"), b.counts, strict=True):
            width = 100 * count / largest
            if count:
                bar.append(f'<rect class="{name}" x="{left:.2f}" y="0" width="{width:.2f}" height="1"></rect>')
            left += width
        svg = f'<svg class="bar" viewBox="0 0 100 1" preserveAspectRatio="none">{"".join(bar)}</svg>'
        figures = "".join(f"<td>{count:,}</td>" for count in b.counts)
        rows.append(f"<tr><th>{b.min_tokens:,}–{b.max_tokens:,}</th>{figures}<td>{svg}</td></tr>")
    heads = "".join(f"<th>{name}</th>" for name in GROUPS)
    return f'<div class="wide"><table><tr><th>tokens</th>{heads}<th></th></tr>{"".join(rows)}</table></div>'
