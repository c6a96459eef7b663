"""What became of every source row: one fate each, counted by source, side and reason.

Knows nothing about why a row has its fate, nor what is in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from corral.data.mixture import SIDES, Side

Fate: TypeAlias = Literal["kept", "truncated", "dropped", "duplicate", "not sampled"]
FATES: tuple[Fate, ...] = ("kept", "truncated", "dropped", "duplicate", "not sampled")

EXAMPLES = 5
"""Rows named for each reason."""
OTHER = "other reasons"
# A reason may quote a row's value: junk could make as many reasons as rows.
_MOST_REASONS = 100


@dataclass(slots=True)
class _Reason:
    count: int = 0
    examples: list[int] = field(default_factory=list[int])


@dataclass(slots=True)
class _Source:
    rows: int = 0
    fates: Counter[Fate] = field(default_factory=Counter[Fate])
    sides: Counter[Side] = field(default_factory=Counter[Side])
    reasons: dict[str, _Reason] = field(default_factory=dict[str, _Reason])


class Ledger:
    """Counts rows as they are read and, apart from that, as their fates are known; `check` compares the two."""

    def __init__(self) -> None:
        self._sources: dict[str, _Source] = {}

    def read(self, source: str) -> None:
        """One more row of a source was read."""
        self._sources.setdefault(source, _Source()).rows += 1

    def add(self, source: str, index: int, fate: Fate, reason: str | None = None, side: Side | None = None) -> bool:
        """A row's fate.

        Args:
            source: the source's label.
            index: the row's number in it.
            fate: what became of it.
            reason: why; given for `dropped` and no other.
            side: where it went; given for `kept` and `truncated` and no other.

        Returns: whether the row is now an example of its reason.
        """
        assert (reason is not None) == (fate == "dropped"), f"a {fate} row with the reason {reason!r}"
        assert (side is not None) == (fate in ("kept", "truncated")), f"a {fate} row on the side {side!r}"
        entry = self._sources.setdefault(source, _Source())
        entry.fates[fate] += 1
        if side is not None:
            entry.sides[side] += 1
        if reason is None:
            return False
        if reason not in entry.reasons and len(entry.reasons) >= _MOST_REASONS:
            reason = OTHER
        counted = entry.reasons.setdefault(reason, _Reason())
        counted.count += 1
        if len(counted.examples) < EXAMPLES:
            counted.examples.append(index)
            return True
        return False

    def check(self) -> None:
        """Hold that every row read has exactly one fate. Raises: AssertionError, a fault of corral's own."""
        for label, s in self._sources.items():
            fates = s.fates.total()
            assert fates == s.rows, f"ledger: {label}: {s.rows} rows were read, {fates} have a fate"
            sides, kept = s.sides.total(), s.fates["kept"] + s.fates["truncated"]
            assert sides == kept, f"ledger: {label}: {kept} rows are kept, {sides} have a side"
            reasons = sum(reason.count for reason in s.reasons.values())
            assert reasons == s.fates["dropped"], f"ledger: {label}: {reasons} reasons, {s.fates['dropped']} dropped"

    def to_json(self) -> dict[str, Any]:
        """`{"rows", "fates": {fate: rows}, "sources": {label: {"rows", "fates", "sides", "reasons"}}}`, each reason as
        `{"count", "examples": [row numbers, the first 5]}`, most frequent first. Raises: AssertionError, as `check`."""
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
                        reason: {"count": r.count, "examples": r.examples}
                        for reason, r in sorted(s.reasons.items(), key=lambda item: (-item[1].count, item[0]))
                    },
                }
                for label, s in self._sources.items()
            },
        }


def summary(ledger: Mapping[str, Any]) -> str:
    """A few lines for a terminal, from a ledger's JSON form: totals, then each source with its reasons."""
    lines = [f"{ledger['rows']:,} rows: {_counts(ledger['fates'])}"]
    for label, source in ledger["sources"].items():
        lines.append(f"  {label}: {source['rows']:,} rows: {_counts(source['fates'])}")
        if sides := _counts(source["sides"]):
            lines.append(f"    sides: {sides}")
        lines += [f"    dropped: {reason_line(reason, r)}" for reason, r in source["reasons"].items()]
    return "\n".join(lines)


def reason_line(reason: str, entry: Mapping[str, Any]) -> str:
    """One reason with its count and examples: `12 × no answer: … (rows 3, 7, 9, 20, 31 …)`."""
    count, examples = entry["count"], entry["examples"]
    more = " …" if count > len(examples) else ""
    return f"{count:,} × {reason} (row{'s' if count > 1 else ''} {', '.join(map(str, examples))}{more})"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
