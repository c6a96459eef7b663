"""The result of `corral plan`: peaks of memory, time and disk space of each training stage, and how a terminal shows it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias

from rich.console import Group
from rich.table import Table
from rich.text import Text

from corral.formatting import format_bytes, format_duration
from corral.preflight.workload import Workload
from corral.recipe import Train

Verdict: TypeAlias = Literal["fits", "does not fit", "undecided"]


@dataclass(frozen=True, slots=True)
class Measured:
    """What a trial of a stage measured.

    Args:
        peak: bytes of memory at the peak; None if the trial failed.
        failure: why it failed.
        out_of_memory: whether it failed for lack of memory; None if that is not known.
        resumed: whether the step after `kill -9` gave the same bits; None if the trial did not get that far.
        checkpoint: bytes of one.
        raw: all figures of the two processes.
    """

    peak: int | None
    tokens_per_second: float = 0.0
    seconds: float = 0.0
    checkpoint: int = 0
    failure: str = ""
    out_of_memory: bool | None = None
    resumed: bool | None = None
    raw: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One training stage.

    Args:
        number: from 1.
        name: of its folder.
        start: the name of the stage whose model it starts from; empty for the base model.
        train: its settings, with numbers in place of `auto`.
        trained: number of weights that are trained.
        work: its workload.
        estimate: bytes at the peak, by `memory_estimate`.
        measured: on this machine; None for another.
        tokens_per_second, seconds: measured, or by the other device's data sheet; None if the trial failed.
        verdict: whether its memory suffices, with `reason`.
        savings: settings that would need less, cheapest first, each with those before it: (setting, estimated bytes).
    """

    number: int
    name: str
    start: str
    train: Train
    trained: int
    work: Workload
    estimate: int
    measured: Measured | None
    tokens_per_second: float | None
    seconds: float | None
    verdict: Verdict
    reason: str
    savings: list[tuple[str, int]]

    @property
    def estimate_error(self) -> float | None:
        """How far the estimate is above (+) or below (−) the measured peak, as a share of it."""
        return None if self.measured is None or not self.measured.peak else self.estimate / self.measured.peak - 1


@dataclass(frozen=True, slots=True)
class Plan:
    """A recipe's training stages on a machine.

    Args:
        device: its name; `estimated` if it is not this machine, with the `source` of its figures.
        memory: bytes that training can have there; `memory_why` says what sets the limit.
        disk: bytes that the run will take, by purpose.
        disk_free: bytes free in the folder `disk_place`, where the run will be.
        verdict: of memory, disk and resuming together, with `reasons`.
    """

    recipe: str
    base: str
    weights: int
    device: str
    dtype: str
    estimated: bool
    source: str
    memory: int
    memory_why: str
    stages: list[StagePlan]
    disk: dict[str, int]
    disk_free: int
    disk_place: str
    verdict: Verdict
    reasons: list[str]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        stages = [
            asdict(replace(stage, train=None))  # pyright: ignore[reportArgumentType]
            | {"train": stage.train.model_dump(mode="json"), "estimate_off": stage.estimate_error}
            for stage in self.stages
        ]
        return json.loads(json.dumps(asdict(replace(self, stages=[])) | {"stages": stages}))


def render(plan: Plan) -> Group:
    """A plan as text and tables for a terminal, 100 columns wide."""
    where = f"an estimate for {plan.device}: {plan.source}" if plan.estimated else f"measured here ({plan.device})"
    lines: list[Any] = [f"{plan.recipe}: {plan.base}, {_format_count(plan.weights)} weights, {plan.dtype}", where]
    for stage in plan.stages:
        lines += ["", *_stage_lines(stage)]
    lines += ["", _peaks(plan)]
    for stage in plan.stages:
        if stage.verdict != "fits" and not (stage.measured and stage.measured.out_of_memory is None):
            lines += _saving_lines(stage, plan.memory)
    if not plan.estimated:
        lines += ["", _disk_table(plan)]
    lines += ["", *(f"note: {note}" for note in plan.notes)]
    colour = {"fits": "green", "does not fit": "red", "undecided": "yellow"}[plan.verdict]
    lines.append(Text(f"verdict: {plan.verdict}", style=f"bold {colour}"))
    lines += [f"  {reason}" for reason in plan.reasons]
    return Group(*(Text(line) if isinstance(line, str) else line for line in lines))


def _stage_lines(stage: StagePlan) -> list[str]:
    train, work = stage.train, stage.work
    quantised = "" if train.quantization == "none" else f", base in {train.quantization}"
    what = "all weights" if train.method == "full" else f"LoRA r {train.lora.rank}{quantised}"
    again = ", gradient checkpointing" if train.gradient_checkpointing else ""
    lines = [
        f"stage {stage.number}, {stage.name}, from {stage.start or 'the base model'}: {train.objective}, {what}, "
        f"{_format_count(stage.trained)} weights trained",
        f"{work.steps:,} steps of {train.batch_size} rows, {work.tokens:,} tokens, in packs of at most "
        f"{train.pack_length:,} tokens{again}",
    ]
    if stage.seconds is not None:
        lines.append(
            f"time: {format_duration(stage.seconds)} for the stage, at {stage.tokens_per_second:,.0f} tokens/s, with "
            f"{work.evaluations} evaluations and {work.checkpoints} checkpoints"
            + (f"; the reference first reads {work.reference:,} tokens" if work.reference else "")
        )
    if stage.measured is not None and stage.measured.resumed is not None:
        same = "the same bits as before" if stage.measured.resumed else "other bits than before"
        lines.append(f"kill -9 and resume: the next step gave {same}")
    return lines


def _peaks(plan: Plan) -> Table:
    """Peaks of memory of all stages, beside what there is."""
    table = Table("memory at the peak of a step", box=None, pad_edge=False)
    for title in (*(() if plan.estimated else ("measured",)), "estimated", f"available ({plan.memory_why})"):
        table.add_column(title, justify="right")
    for stage in plan.stages:
        off = "" if stage.estimate_error is None else f" ({stage.estimate_error:+.0%})"
        peaks = [f"{format_bytes(stage.estimate)}{off}", format_bytes(plan.memory)]
        if not plan.estimated:
            peaks.insert(0, format_bytes(stage.measured.peak) if stage.measured and stage.measured.peak else "–")
        table.add_row(f"  stage {stage.number}", *peaks)
    return table


def _saving_lines(stage: StagePlan, memory: int) -> list[Any]:
    if not stage.savings:
        return [f"stage {stage.number}: no setting would save enough: take a smaller model or a larger machine"]
    table = Table("change (with those above it)", "estimated", box=None, pad_edge=False)
    for setting, needed in stage.savings:
        table.add_row(f"--set {setting}", format_bytes(needed))
    last = (
        [] if stage.savings[-1][1] <= memory else ["all of these are not enough: take a smaller model, or shorter rows"]
    )
    return ["", f"what to change in stage {stage.number}, cheapest first:", table, *last]


def _disk_table(plan: Plan) -> Table:
    table = Table("disk", box=None, pad_edge=False)
    table.add_column("at most", justify="right")
    for name, size in plan.disk.items():
        table.add_row(f"  {name}", format_bytes(size))
    table.add_row("  together", format_bytes(sum(plan.disk.values())))
    table.add_row(f"  free at {plan.disk_place}", format_bytes(plan.disk_free))
    return table


def _format_count(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"
