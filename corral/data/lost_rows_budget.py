"""Refuses prepared rows that must not be trained on: nothing is left, a side is empty, or too many rows were lost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from corral.data.ledger import FATES, LOST_FATES, USED_FATES, format_reason
from corral.data.mixture import SIDES, smallest_share
from corral.data.selection import SourcePlan
from corral.errors import DataError, GateError
from corral.formatting import count_of
from corral.recipe import Data


def count_losses(plan: SourcePlan) -> tuple[float, float]:
    """(rows wanted, rows lost) of one source, for `data.max_loss`.

    Wanted are the rows that were chosen, including those beyond a weight, and the rows that could not be parsed, scaled by
    the share that a cap keeps of the others. Copies, rows beyond a cap and contaminated rows are left out on purpose and not
    wanted. Lost are wanted rows that could not be parsed or encoded, are too long, fully masked, trimmed or truncated.
    """
    usable = plan.rows.reason < 0
    counts = {fate: int((usable & (plan.fate == number)).sum()) for number, fate in enumerate(FATES)}
    beyond_cap = counts["not sampled"] - int(plan.beyond_weight.sum())
    chosen = sum(counts.values()) - beyond_cap - counts["duplicate"] - counts["near duplicate"]
    wanted_share = chosen / (chosen + beyond_cap) if chosen else 1.0
    unusable = int((~usable).sum()) * wanted_share
    lost = unusable + sum(counts[fate] for fate in LOST_FATES)
    return round(unusable + chosen - counts["contaminated"], 6), round(lost, 6)


def check_loss_budget(data: Data, ledger: Mapping[str, Any], where: Path) -> None:
    """Raises GateError if more rows are lost than `data.max_loss` allows."""
    wanted, lost = (sum(source[name] for source in ledger["sources"].values()) for name in ("asked", "lost"))
    if data.max_loss is None or lost <= data.max_loss * wanted:
        return
    lines = [
        f"{lost / wanted:.2%} of the rows asked for are lost ({lost:,.0f} of {wanted:,.0f}); `data.max_loss` allows "
        f"{data.max_loss:.2%}",
        *(f"  {line}" for line in _worst_losses(ledger)[:5]),
    ]
    raise GateError(
        "\n".join(lines),
        where=str(where),
        hint="fix what the reasons name (`corral inspect RECIPE` shows such rows), or raise data.max_loss",
    )


def _worst_losses(ledger: Mapping[str, Any]) -> list[str]:
    """Why rows were lost, the most frequent reason first."""
    losses: list[tuple[int, str]] = []
    for label, source in ledger["sources"].items():
        losses += [
            (source["fates"][fate], f"{label}: {source['fates'][fate]:,} × {fate}")
            for fate in ("trimmed", "truncated")
            if source["fates"][fate]
        ]
        reasons = ((reason, r) for reason, r in source["reasons"].items() if r["fate"] in LOST_FATES)
        losses += [(r["count"], f"{label}: {format_reason(reason, r)}") for reason, r in reasons]
    return [line for _, line in sorted(losses, key=lambda item: -item[0])]


def check_not_empty(plans: Sequence[SourcePlan], data: Data, ledger: Mapping[str, Any]) -> None:
    """Raises DataError if a side that should have rows has none, or a source lost all of its rows."""
    where = ", ".join(source.path for source in data.sources)
    counts = {side: sum(int((plan.side == n).sum()) for plan in plans) for n, side in enumerate(SIDES)}
    usable = sum(counts.values())
    _check_weighted_sources(plans, where)
    if not usable:
        raise _nothing_left_error(data, ledger, where)
    check_sources_used(plans, data, ledger, where)
    if not counts["train"]:
        taken = sum(source["contaminated"] for source in ledger["sources"].values())
        everything = "the only usable row is" if usable == 1 else f"all {usable} usable rows are"
        also = f", and {taken} share passages with them" if taken and data.contamination == "drop" else ""
        raise DataError(
            f"no row is left to train on: {everything} held out{also}",
            where=where,
            hint="lower data.split.validation and data.split.test, or add rows",
        )
    shares: dict[Literal["validation", "test"], float] = {
        "validation": data.held_out("validation"),
        "test": data.held_out("test"),
    }
    divided = sum(int((plan.side >= 0).sum()) for plan in plans if plan.source.side is None)
    for side, share in shares.items():
        if 0 < share < 1 and not counts[side]:
            least = smallest_share(divided) if divided else 1.0
            other = sum(s for s in shares.values() if s < 1) - share
            enough = f"set data.split.{side} to {least:g} or more, " if least + other < 1 else ""
            raise DataError(
                f"the {side} side is empty: none of the {count_of(divided, 'usable row')} falls into its share of {share:g}",
                where=where,
                hint=f"{enough}set data.split.{side} to 0, or add rows",
            )
        if share >= 1 and not counts[side]:
            raise DataError(
                f"the {side} side is empty: the other side takes all {count_of(divided, 'usable row')}",
                where=where,
                hint=f"lower the numbers in data.split, set data.split.{side} to 0, or add rows",
            )


def check_sources_used(plans: Sequence[SourcePlan], data: Data, ledger: Mapping[str, Any], where: str) -> None:
    """Raises DataError if every row of a source is lost, or a source that is held out has no row to evaluate on."""
    _check_lost_sources(data, ledger, where)
    for plan in plans:
        if plan.source.is_held_out and not (plan.side >= 0).any():
            raise DataError(
                f"the source {plan.source.label!r} is for the {plan.source.side} side, and none of its {len(plan.rows):,} "
                "rows can be used",
                where=plan.source.path,
                hint="give it a `format` or `mapping` that fits its rows, or raise data.max_length; the ledger says what "
                "became of them",
            )


def _check_weighted_sources(plans: Sequence[SourcePlan], where: str) -> None:
    """Raises DataError if a source that has a weight has no rows to train on, and others have."""
    could_train = [int(((plan.side == SIDES.index("train")) | plan.beyond_weight).sum()) for plan in plans]
    for plan, rows in zip(plans, could_train, strict=True):
        if plan.source.weight is not None and not rows and any(could_train):
            raise DataError(
                f"the source {plan.source.label!r} has the weight {plan.source.weight:g} and no row to train on: there is "
                "no mixture with such a share",
                where=where,
                hint="remove this source, or every `weight`; the ledger says what became of its rows",
            )


def _check_lost_sources(data: Data, ledger: Mapping[str, Any], where: str) -> None:
    """Raises DataError if every row of a source is lost, which would hardly be noticed among larger sources."""
    for label, source in ledger["sources"].items():
        lost = sum(source["fates"][fate] for fate in LOST_FATES.difference(USED_FATES))
        if lost and lost == source["rows"]:
            lines = _reason_lines(source["reasons"].items())
            everything = "the only row" if lost == 1 else f"all {lost:,} rows"
            raise DataError(
                "\n".join([f"{everything} of the source {label!r} {'is' if lost == 1 else 'are'} lost", *lines]),
                where=where,
                hint=_fit_hint(source["reasons"].items(), data)
                or "give this source the `format` or `mapping` that fits its rows, or remove it",
            )


def _nothing_left_error(data: Data, ledger: Mapping[str, Any], where: str) -> DataError:
    counts = ", ".join(f"{ledger['fates'][fate]:,} {fate}" for fate in FATES if ledger["fates"][fate])
    all_reasons = (item for source in ledger["sources"].values() for item in source["reasons"].items())
    reasons = [(reason, entry) for reason, entry in all_reasons if entry["fate"] in LOST_FATES]
    lines = [f"no row is left to train on: {count_of(ledger['rows'], 'row')} read, {counts}", *_reason_lines(reasons)]
    hint = "fix the rows, or set the `format` of data.sources that says what they look like"
    return DataError("\n".join(lines), where=where, hint=_fit_hint(reasons, data) or hint)


def _fit_hint(reasons: Iterable[tuple[str, Mapping[str, Any]]], data: Data) -> str:
    """What to change if most of the lost rows are too long, else nothing."""
    worst = max(reasons, key=lambda item: item[1]["count"], default=("", None))[0]
    if not worst.startswith(("longer than", "fully masked: none of the first")):
        return ""
    hint = f"raise data.max_length (it is {data.max_length})"
    return hint + (', or set data.overlong = "truncate"' if data.overlong != "truncate" else "")


def _reason_lines(reasons: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """The five most frequent reasons."""
    ordered = sorted(reasons, key=lambda item: -item[1]["count"])
    return [f"  {format_reason(reason, entry)}" for reason, entry in ordered[:5]]
