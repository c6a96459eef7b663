"""The result of `corral plan`: memory, time and disk space of each training stage, and how a terminal shows it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, TypeAlias

from rich.console import Group
from rich.table import Table
from rich.text import Text

from corral.formatting import format_bytes, format_duration
from corral.preflight.memory_estimate import MemoryParts
from corral.preflight.remedies import Remedy
from corral.preflight.workload import Workload
from corral.recipe import Train

Verdict: TypeAlias = Literal["fits", "does not fit", "undecided"]

_PART_LABELS = {
    "process": "the process itself",
    "weights": "weights",
    "optimizer": "gradients and optimizer",
    "activations": "activations kept for the backward pass",
    "head": "output layer and its logits",
    "rest": "everything else",
}


@dataclass(frozen=True, slots=True)
class Figures:
    """What a stage needs.

    Args:
        parts: memory at the peak of a step.
        peak: their sum, or the measured peak.
        tokens_per_second: trained on, optimizer left out.
        seconds: of the whole stage: steps, evaluations, checkpoints.
        checkpoint: bytes of one checkpoint.
    """

    parts: MemoryParts
    peak: int
    tokens_per_second: float
    seconds: float
    checkpoint: int


@dataclass(frozen=True, slots=True)
class TrialResult:
    """The result of a trial of a stage.

    Args:
        figures: what the stage needs; None if the trial failed.
        failure: why it failed.
        out_of_memory: whether it failed for lack of memory; None if that is not known.
        resumed: whether the step after `kill -9` gave the same bits; None if the trial did not get that far.
        raw: all figures of the two processes.
    """

    figures: Figures | None
    failure: str = ""
    out_of_memory: bool | None = None
    resumed: bool | None = None
    raw: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One training stage.

    Args:
        number: from 1.
        trained: number of weights that are trained.
        work: its workload.
        estimated: the estimate for the device given with --device.
        tried: the trial on this machine; None if there was none.
        here: the estimate for this machine, to compare with `tried`.
        verdict: whether its memory suffices, with `reason`.
        remedies: what to change if it does not.
    """

    number: int
    train: Train
    trained: int
    work: Workload
    estimated: Figures | None
    tried: TrialResult | None
    here: Figures | None
    verdict: Verdict
    reason: str
    remedies: list[Remedy]

    @property
    def best_figures(self) -> Figures | None:
        """The estimate for the device given, else what was measured, else the estimate for this machine."""
        return self.estimated or (self.tried and self.tried.figures) or self.here

    @property
    def estimate_error(self) -> dict[str, float] | None:
        """How far the estimate for this machine is above (+) or below (−) what was measured, as a share."""
        if self.here is None or self.tried is None or self.tried.figures is None:
            return None
        measured = self.tried.figures
        return {
            "memory": self.here.peak / measured.peak - 1,
            "tokens_per_second": self.here.tokens_per_second / measured.tokens_per_second - 1,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """A recipe's training stages on a machine.

    Args:
        device: its name; `estimated` if it is not this machine.
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
        lines += ["", *_stage_lines(plan, stage)]
    if not plan.estimated:
        lines += ["", *_disk_table(plan)]
    lines += ["", *(f"note: {note}" for note in plan.notes)]
    colour = {"fits": "green", "does not fit": "red", "undecided": "yellow"}[plan.verdict]
    lines.append(Text(f"verdict: {plan.verdict}", style=f"bold {colour}"))
    lines += [f"  {reason}" for reason in plan.reasons]
    return Group(*(Text(line) if isinstance(line, str) else line for line in lines))


def _stage_lines(plan: Plan, stage: StagePlan) -> list[Any]:
    train, work = stage.train, stage.work
    quantised = "" if train.quantization == "none" else f", base in {train.quantization}"
    what = "all weights" if train.method == "full" else f"LoRA r {train.lora.rank}{quantised}"
    lines: list[Any] = [
        f"stage {stage.number}: {train.objective}, {what}, {_format_count(stage.trained)} weights trained",
        f"{work.steps:,} steps of {train.batch_size} rows, {work.tokens:,} tokens; the longest pack has "
        f"{work.longest.tokens:,} tokens, {work.longest.trained:,} of them trained",
        _memory_table(plan, stage),
    ]
    figures = stage.best_figures
    if figures is not None:
        evaluated = f"{work.evaluations} evaluations and {work.checkpoints} checkpoints"
        lines.append(
            f"time: {format_duration(figures.seconds)} for the stage, at {figures.tokens_per_second:,.0f} tokens/s, "
            f"with {evaluated}"
        )
    if stage.tried is not None and stage.tried.resumed is not None:
        same = "the same bits as before" if stage.tried.resumed else "other bits than before"
        lines.append(f"kill -9 and resume: the next step gave {same}")
    if stage.estimate_error is not None:
        memory, rate = (stage.estimate_error[key] for key in ("memory", "tokens_per_second"))
        lines.append(f"the same estimate for this machine is off by {memory:+.0%} in memory, {rate:+.0%} in tokens/s")
    if stage.verdict != "fits" and not (stage.tried and stage.tried.figures is None and not stage.tried.out_of_memory):
        lines += _remedy_lines(stage)
    return lines


def _memory_table(plan: Plan, stage: StagePlan) -> Table:
    table = Table("memory at the peak of a step", box=None, pad_edge=False)
    columns: list[tuple[str, MemoryParts, int]] = []
    if stage.tried is not None and stage.tried.figures is not None:
        columns.append(("measured here", stage.tried.figures.parts, stage.tried.figures.peak))
    if stage.here is not None:
        columns.append(("estimate for here", stage.here.parts, stage.here.peak))
    if stage.estimated is not None:
        columns.insert(0, (f"estimate for {plan.device}", stage.estimated.parts, stage.estimated.peak))
    for title, _, _ in columns:
        table.add_column(title, justify="right")
    for field in fields(MemoryParts):
        table.add_row(
            f"  {_PART_LABELS[field.name]}", *(format_bytes(getattr(parts, field.name)) for _, parts, _ in columns)
        )
    table.add_row("  together", *(format_bytes(peak) for _, _, peak in columns))
    table.add_row(f"  available ({plan.memory_why})", format_bytes(plan.memory))
    return table


def _remedy_lines(stage: StagePlan) -> list[Any]:
    if not stage.remedies:
        return ["no change of the recipe would save enough: take a smaller model or a larger machine"]
    table = Table("", "change (with those above it)", "predicted", "cost", box=None, pad_edge=False)
    for remedy in stage.remedies:
        settings = " ".join(f"--set {setting}" for setting in remedy.settings)
        table.add_row("→" if remedy.fits else "", settings, format_bytes(remedy.memory), remedy.cost)
    last = "all of these together are not enough: take a smaller model or a larger machine"
    return ["what to change, cheapest first:", table, *([] if stage.remedies[-1].fits else [last])]


def _disk_table(plan: Plan) -> list[Any]:
    table = Table("disk", box=None, pad_edge=False)
    table.add_column("at most", justify="right")
    for name, size in plan.disk.items():
        table.add_row(f"  {name}", format_bytes(size))
    table.add_row("  together", format_bytes(sum(plan.disk.values())))
    table.add_row(f"  free at {plan.disk_place}", format_bytes(plan.disk_free))
    return [table]


def _format_count(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"
