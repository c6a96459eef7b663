"""How long the rows are, in tokens: a histogram from the ledger's table, for a terminal and for a page.

Counts whole rows, before any cut; bins double in width. This module does not know what the rows hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

Group: TypeAlias = Literal["trained on", "cut", "left out"]
GROUPS: tuple[Group, ...] = ("trained on", "cut", "left out")
_OF_FATE: dict[str, Group] = {"kept": "trained on", "truncated": "cut"}
_FIRST = 16
_BAR = 40


@dataclass(frozen=True, slots=True)
class Bin:
    """Rows of `least` to `most` tokens: how many of each group."""

    min_tokens: int
    max_tokens: int
    counts: tuple[int, ...]

    @property
    def total(self) -> int:
        """Rows of all groups."""
        return sum(self.counts)


def read_histogram(table: Path) -> list[Bin]:
    """Bins of the rows that were encoded, ascending, from the shortest row's to the longest one's; read group by group."""
    from pyarrow import parquet

    counts = np.zeros((64, len(GROUPS)), np.int64)
    file: Any = parquet.ParquetFile(table)
    with file:
        for number in range(file.num_row_groups):
            columns: Any = file.read_row_group(number, columns=["tokens", "fate"])
            tokens = np.asarray(columns["tokens"].fill_null(0).to_numpy(), np.int64)
            fates: Any = columns["fate"].combine_chunks()
            groups = [GROUPS.index(_OF_FATE.get(fate, "left out")) for fate in fates.dictionary.to_pylist()]
            group = np.array(groups, np.int64)[np.asarray(fates.indices)]
            known = tokens > 0
            np.add.at(counts, (_bin(tokens[known]), group[known]), 1)
    some = np.flatnonzero(counts.sum(axis=1))
    if not len(some):
        return []
    return [
        Bin(_FIRST << (n - 1) if n else 1, (_FIRST << n) - 1, tuple(counts[n].tolist()))
        for n in range(int(some[0]), int(some[-1]) + 1)
    ]


def _bin(tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.maximum(0, np.frexp(tokens.astype(np.float64))[1] - _FIRST.bit_length() + 1)


def to_lines(bins: Sequence[Bin]) -> list[str]:
    """One line for each bin, with a bar: `█` trained on, `▓` cut, `░` left out."""
    if not bins:
        return []
    most = max(b.total for b in bins)
    lines = ["tokens       rows   █ trained on  ▓ cut  ░ left out"]
    for b in bins:
        parts = zip("█▓░", _widths(b, _BAR / most), strict=True)
        lines.append(
            f"{b.min_tokens:>5}–{b.max_tokens:<5} {b.total:>7,} {''.join(sign * width for sign, width in parts)}".rstrip()
        )
    return lines


def _widths(b: Bin, scale: float) -> list[int]:
    # What is there at all must be seen.
    return [max(1, round(count * scale)) if count else 0 for count in b.counts]


def to_html(bins: Sequence[Bin]) -> str:
    """A table with bars drawn in SVG; classes `trained`, `cut` and `out` colour them."""
    if not bins:
        return ""
    most = max(b.total for b in bins)
    rows: list[str] = []
    for b in bins:
        bar: list[str] = []
        at = 0.0
        for name, count in zip(("trained", "cut", "out"), b.counts, strict=True):
            width = 100 * count / most
            bar.append(
                f'<rect class="{name}" x="{at:.2f}" y="0" width="{width:.2f}" height="1"></rect>' if count else ""
            )
            at += width
        svg = f'<svg class="bar" viewBox="0 0 100 1" preserveAspectRatio="none">{"".join(bar)}</svg>'
        figures = "".join(f"<td>{count:,}</td>" for count in b.counts)
        rows.append(f"<tr><th>{b.min_tokens:,}–{b.max_tokens:,}</th>{figures}<td>{svg}</td></tr>")
    heads = "".join(f"<th>{name}</th>" for name in GROUPS)
    return f'<div class="wide"><table><tr><th>tokens</th>{heads}<th></th></tr>{"".join(rows)}</table></div>'
