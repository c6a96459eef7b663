"""When prepared rows are not to be trained on: nothing is left, a side is empty, or too much was lost.

This module does not know how rows came to their fates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from corral.data.ledger import FATES, LOST_FATES, format_reason
from corral.data.mixture import SIDES, smallest_share
from corral.data.selection import SourcePlan
from corral.errors import DataError, GateError
from corral.recipe import Data


def count_losses(plan: SourcePlan) -> tuple[float, float]:
    """(rows asked for, rows lost) of one source, for `data.max_loss`.

    Asked for are the rows that were chosen, and those that could not be understood: where a cap keeps a part of the
    others, the same part of them. Copies, rows beyond a cap and contaminated rows are left out on purpose and are not asked
    for; rows beyond a weight are, as they were found good before. Lost are rows that could not be understood or encoded, are
    too long, fully masked, or truncated.
    """
    counts = {fate: int((plan.fate == number).sum()) for number, fate in enumerate(FATES)}
    beyond_cap = counts["not sampled"] - int(plan.beyond_weight.sum())
    chosen = sum(counts.values()) - beyond_cap - counts["duplicate"] - counts["near duplicate"]
    asked_share = chosen / (chosen + beyond_cap) if chosen else 1.0
    unusable = len(plan.rows.unusable) * asked_share
    lost = unusable + sum(counts[fate] for fate in LOST_FATES)
    return round(unusable + chosen - counts["contaminated"], 6), round(lost, 6)


def check_loss_budget(data: Data, ledger: Mapping[str, Any], where: Path) -> None:
    """Raises GateError if more rows are lost than `data.max_loss` allows."""
    asked, lost = (sum(source[name] for source in ledger["sources"].values()) for name in ("asked", "lost"))
    if data.max_loss is None or lost <= data.max_loss * asked:
        return
    lines = [
        f"{lost / asked:.2%} of the rows asked for are lost ({lost:,.0f} of {asked:,.0f}); `data.max_loss` allows "
        f"{data.max_loss:.2%}",
        *(f"  {line}" for line in _worst(ledger)[:5]),
    ]
    raise GateError(
        "\n".join(lines),
        where=str(where),
        hint="mend what the reasons name (`corral inspect RECIPE` shows such rows), or raise data.max_loss",
    )


def _worst(ledger: Mapping[str, Any]) -> list[str]:
    """Why rows were lost, the most frequent reason first."""
    found: list[tuple[int, str]] = []
    for label, source in ledger["sources"].items():
        if cut := source["fates"]["truncated"]:
            found.append((cut, f"{label}: {cut:,} × truncated"))
        reasons = ((reason, r) for reason, r in source["reasons"].items() if r["fate"] in LOST_FATES)
        found += [(r["count"], f"{label}: {format_reason(reason, r)}") for reason, r in reasons]
    return [line for _, line in sorted(found, key=lambda item: -item[0])]


def check_not_empty(plans: Sequence[SourcePlan], data: Data, ledger: Mapping[str, Any]) -> None:
    """Raises DataError where a side has no row that should have some."""
    where = ", ".join(source.path for source in data.sources)
    counts = {side: sum(int((plan.side == n).sum()) for plan in plans) for n, side in enumerate(SIDES)}
    usable = sum(counts.values())
    _refuse_weight_of_nothing(plans, where)
    if not usable:
        raise _nothing_left(data, ledger, where)
    _refuse_lost_source(ledger, where)
    if not counts["train"]:
        taken = sum(source["contaminated"] for source in ledger["sources"].values())
        also = f", and {taken} share passages with them" if taken and data.contamination == "drop" else ""
        raise DataError(
            f"no row is left to train on: all {usable} usable rows are held out{also}",
            where=where,
            hint="lower data.split.validation and data.split.test, or add rows",
        )
    shares: dict[Literal["validation", "test"], float] = {"validation": data.split.validation, "test": data.split.test}
    for side, share in shares.items():
        if 0 < share < 1 and not counts[side]:
            least = smallest_share(usable)
            other = sum(s for s in shares.values() if s < 1) - share
            enough = f"set data.split.{side} to {least:g} or more, " if least + other < 1 else ""
            raise DataError(
                f"the {side} side is empty: none of the {usable} usable rows falls into its share of {share:g}",
                where=where,
                hint=f"{enough}set data.split.{side} to 0, or add rows",
            )
        if share >= 1 and not counts[side]:
            raise DataError(
                f"the {side} side is empty: the other side takes all {usable} usable rows",
                where=where,
                hint=f"lower the numbers in data.split, set data.split.{side} to 0, or add rows",
            )


def _refuse_weight_of_nothing(plans: Sequence[SourcePlan], where: str) -> None:
    """Raises DataError where a source that has a weight has no rows for it, and others have."""
    could_train = [int(((plan.side == SIDES.index("train")) | plan.beyond_weight).sum()) for plan in plans]
    for plan, rows in zip(plans, could_train, strict=True):
        if plan.source.weight is not None and not rows and any(could_train):
            raise DataError(
                f"the source {plan.source.label!r} has the weight {plan.source.weight:g} and no row to train on: there is "
                "no mixture with such a share",
                where=where,
                hint="remove this source, or every `weight`; the ledger says what became of its rows",
            )


def _refuse_lost_source(ledger: Mapping[str, Any], where: str) -> None:
    """Raises DataError where every row of a source is lost: among larger ones that would hardly be seen."""
    for label, source in ledger["sources"].items():
        lost = sum(source["fates"][fate] for fate in LOST_FATES if fate != "truncated")
        if lost and lost == source["rows"]:
            reasons = sorted(source["reasons"].items(), key=lambda item: -item[1]["count"])
            raise DataError(
                "\n".join(
                    [
                        f"all {lost:,} rows of the source {label!r} are lost",
                        *(f"  {format_reason(reason, entry)}" for reason, entry in reasons[:5]),
                    ]
                ),
                where=where,
                hint="give this source the `format` or `mapping` that fits its rows, or remove it",
            )


def _nothing_left(data: Data, ledger: Mapping[str, Any], where: str) -> DataError:
    counts = ", ".join(f"{ledger['fates'][fate]:,} {fate}" for fate in FATES if ledger["fates"][fate])
    everything = (item for source in ledger["sources"].values() for item in source["reasons"].items())
    reasons = [(reason, entry) for reason, entry in everything if entry["fate"] in LOST_FATES]
    reasons.sort(key=lambda item: -item[1]["count"])
    lines = [f"no row is left to train on: {ledger['rows']:,} rows read, {counts}"]
    lines += [f"  {format_reason(reason, entry)}" for reason, entry in reasons[:5]]
    hint = "mend the rows, or set the `format` of data.sources that says what they look like"
    if reasons and reasons[0][0].startswith(("longer than", "fully masked")):
        hint = f"raise data.max_length (it is {data.max_length})"
        hint += ', or set data.overlong = "truncate"' if data.overlong == "drop" else ""
    return DataError("\n".join(lines), where=where, hint=hint)
