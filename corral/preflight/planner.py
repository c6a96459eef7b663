"""Finds out what a recipe's training stages need: measured on this machine or estimated for another, and whether it fits.

Each stage is tried in a process of its own (`trial`): the real model and rows, a step with the longest packs of the stage,
an evaluation, a checkpoint, a `kill -9`, and the same step again from the checkpoint. Running out of memory is a result.
The estimate is that of `training.memory_estimate`, which also chooses the passes of a run.

A trial is one process, and training alone: merging, evaluation of answers and exports need less memory than training, and
their time is not counted.
"""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from corral.data.prepare import prepare
from corral.errors import CorralError, InputError, StorageError, TrainingError
from corral.formatting import format_bytes
from corral.model.device import choose_device, memory_limit
from corral.model.loading import resolve_model
from corral.model.naming import ModelFiles, find_adapter_to_train
from corral.preflight import trial
from corral.preflight.devices import GPUS, Gpu
from corral.preflight.plan import Measured, Plan, StagePlan, Verdict
from corral.preflight.workload import Workload
from corral.progress import Progress
from corral.storage import tree_size
from corral.system import MemoryLimit
from corral.training import memory_estimate, stage_needs
from corral.training.alignment_warnings import row_warnings, settings_warnings
from corral.training.memory_estimate import MOMENT_BYTES, ModelShape
from corral.training.passes import MARGIN, choose_passes, savings
from corral.training.stage_rows import StageRows, check_rows_taken
from corral.training.trained_model import TrainingSetup

if TYPE_CHECKING:
    from corral.data.prepare import Prepared
    from corral.model.adapter_files import AdapterFiles
    from corral.model.device import Placement
    from corral.recipe import Recipe, Train

_MEASURED_SPREAD = 0.05  # how much the peak varies from one run to the next
_DISK_RATE = 300e6  # bytes/s, where no checkpoint was written


def plan(recipe: Recipe, out: Path, progress: Progress, *, device: str | None = None) -> Plan:
    """Find out what a recipe's training stages need.

    Args:
        recipe: as `recipe.load` gives it.
        out: the future run directory; nothing is written there, but a hidden folder beside it is used.
        device: one of `devices.GPUS`, for an estimate; else this machine is measured.

    Raises:
        DataError, TemplateError, ModelError …: what a run would raise too.
        InputError: no such device.
        StorageError: nothing can be written beside `out`.
        CorralError: the system does not say how much memory there is.
    """
    if device is not None and device not in GPUS:
        raise InputError(f"there is no figure for the device {device!r}", where="--device", hint=", ".join(GPUS))
    parent = _free_disk(out.parent)[1]
    try:
        scratch = tempfile.TemporaryDirectory(prefix=".corral-plan-", dir=parent, ignore_cleanup_errors=True)
    except OSError as error:
        raise StorageError(
            f"the run could not be written here: {error.strerror}", where=str(parent), hint="give another folder: --out"
        ) from None
    with scratch as folder:
        return _Planner(recipe, out, progress, Path(folder), None if device is None else GPUS[device]).plan()


def _free_disk(path: Path) -> tuple[int, Path]:
    """Free bytes where a path is or will be, and the nearest folder that exists."""
    folder = next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())
    return shutil.disk_usage(folder).free, folder


class _Planner:
    def __init__(self, recipe: Recipe, out: Path, progress: Progress, scratch: Path, gpu: Gpu | None) -> None:
        self.recipe, self.out, self.progress, self.scratch, self.gpu = recipe, out, progress, scratch, gpu
        self.notes: list[str] = []

    @cached_property
    def placement(self) -> Placement:
        placement = choose_device(self.recipe.model.device, self.recipe.model.dtype)
        self.notes += placement.notes
        return placement

    @cached_property
    def folder(self) -> Path:
        """The base model's folder; an estimate needs no weights in it."""
        spec = self.recipe.model.base
        if self.gpu and (Path(spec) / "config.json").is_file():
            return Path(spec)
        self.progress.start(f"Fetching {spec}", None)
        return resolve_model(spec, progress=self.progress.say).folder

    @cached_property
    def adapter(self) -> AdapterFiles | None:
        """The adapter that the first stage trains further."""
        spec, train = self.recipe.model.adapter, self.recipe.train
        return None if spec is None else find_adapter_to_train(spec, self.folder, train[0].quantization)

    @cached_property
    def prepared(self) -> Prepared:
        template = ModelFiles(self.folder, self.adapter and self.adapter.folder, self.recipe).load_template()
        self.progress.start("Preparing rows", None)
        folder = self.scratch / "prepare"
        folder.mkdir()
        recipe = self.recipe
        prepared = prepare(
            recipe.data,
            template,
            folder,
            recipe.rows_seed,
            self.progress,
            split_seed=recipe.split_seed,
            mixtures=recipe.mixtures,
        )
        check_rows_taken(prepared, recipe.train)
        return prepared

    @cached_property
    def limit(self) -> MemoryLimit:
        """The memory of the device that is planned for."""
        if self.gpu:
            return MemoryLimit(self.gpu.memory, self.gpu.memory, self.gpu.name)
        limit = memory_limit(self.placement.device)
        if limit is None:
            raise CorralError(
                "this operating system does not say how much memory it has",
                hint="plan on Linux or macOS, or give --device",
            )
        return limit

    def plan(self) -> Plan:
        recipe, gpu, shape = self.recipe, self.gpu, ModelShape.from_folder(self.folder)
        dtype = gpu.dtype(recipe.model.dtype) if gpu else self.placement.dtype
        if gpu and dtype == "bfloat16" and gpu.half != dtype:
            self.notes.append(
                f'a {gpu.name} only emulates bfloat16, slowly: model.dtype = "auto" or "float16" is faster'
            )
        stages: list[StagePlan] = []
        for number in range(1, len(recipe.train) + 1):
            stages.append(self._plan_stage(shape, number, dtype, stages))
        self.progress.stop()
        disk = self._disk_needed(shape, stages, dtype)
        disk_free, disk_folder = _free_disk(self.out)
        reasons = [f"stage {s.number}: {s.reason}" for s in stages]
        verdicts: list[Verdict] = [s.verdict for s in stages]
        if gpu is None and sum(disk.values()) > disk_free:
            verdicts.append("does not fit")
            text = f"the disk has {format_bytes(disk_free)} free and the run needs {format_bytes(sum(disk.values()))}"
            reasons.append(f"{text}: free some space, or give another folder with --out")
        if (
            gpu is None
            and self.placement.device == "cpu"
            and any(s.measured and s.measured.resumed is False for s in stages)
        ):
            verdicts.append("undecided")
            reasons.append("a step after kill -9 and resuming gave other numbers than before: please report this")
        return Plan(
            recipe=recipe.name,
            base=recipe.model.base,
            weights=shape.weights,
            device=gpu.name if gpu else self.placement.device,
            dtype=dtype,
            estimated=gpu is not None,
            source=gpu.source if gpu else "",
            memory=self.limit.free,
            memory_why=self.limit.reason,
            stages=stages,
            disk=disk,
            disk_free=disk_free,
            disk_place=str(disk_folder),
            verdict=max(verdicts, key=("fits", "undecided", "does not fit").index),
            reasons=reasons,
            notes=self.notes,
        )

    def _plan_stage(self, shape: ModelShape, number: int, dtype: Any, earlier: Sequence[StagePlan]) -> StagePlan:
        kind = "cuda" if self.gpu or self.placement.device.startswith("cuda") else "cpu"
        train = self.recipe.train[number - 1]
        rows = StageRows.select(self.prepared, train, number)
        if number == 1 and self.adapter is not None:
            train = train.model_copy(update={"lora": self.adapter.lora})
        train = choose_passes(shape, train, rows.lengths, kind, dtype, self.limit.free).apply(train)
        work = Workload.from_stage(train, rows, self.recipe.training_seed(number))
        from_base = self.recipe.start_of(number) == 0 and (number > 1 or self.adapter is None)
        warnings = settings_warnings(train, self.folder if from_base else None) + row_warnings(
            self.prepared, train, rows
        )
        self.notes += [f"stage {number}: {warning}" for warning in warnings]
        if train.batch_size > work.rows:
            self.notes.append(f"a step of {train.batch_size} examples goes through the {work.rows} rows more than once")
        memory = memory_estimate.memory(shape, train, *work.longest, kind, dtype)
        trained, measured = shape.trained_weights(train), None
        if self.gpu:
            rate = self.gpu.tokens_per_second(shape, train, work.trained_share, dtype)
            moments = MOMENT_BYTES[train.optimizer.kind]
            optimizer = trained * (12 + 2 * moments) / self.gpu.bandwidth
            seconds = work.seconds(rate, optimizer, rate * 2, 0.0, trained * (4 + moments) / _DISK_RATE)
        else:
            # Stages that differ only in length share one trial.
            same = [s.measured for s in earlier if _trial_settings(s.train) == _trial_settings(train)]
            measured = same[0] if same and same[0] else _StageTrial(self, train, number, work, rows).result()
            rate = measured.tokens_per_second or None
            seconds = measured.seconds or None
        verdict, reason = self._verdict(memory, measured)
        saved: list[tuple[str, int]] = []
        if verdict != "fits":
            for setting, changed in savings(train, number, max(rows.lengths)):
                tokens = min(work.longest[0], int(changed.pack_length))
                share = work.longest[1] / work.longest[0]
                needed = memory_estimate.memory(shape, changed, tokens, int(tokens * share), kind, dtype).peak
                saved.append((setting, needed))
                if needed <= self.limit.free * (1 - MARGIN):
                    break
        names, start = self.recipe.stage_names, self.recipe.start_of(number)
        place = number, names[number - 1], names[start - 1] if start else ""
        return StagePlan(*place, train, trained, work, memory.peak, measured, rate, seconds, verdict, reason, saved)

    def _verdict(self, estimate: memory_estimate.Memory, measured: Measured | None) -> tuple[Verdict, str]:
        free = self.limit.free
        available = f"{format_bytes(free)} available"
        if measured is None:
            text = f"{format_bytes(estimate.peak)} estimated, {available}"
            # Only the memory that is held between steps is certain.
            if estimate.held > free or estimate.peak > free * (1 + MARGIN):
                return "does not fit", text
            return (
                ("undecided", f"{text}: too close to tell") if estimate.peak > free * (1 - MARGIN) else ("fits", text)
            )
        if measured.peak is None:
            if measured.out_of_memory is None:
                return "undecided", measured.failure
            return "does not fit", f"{measured.failure}; {format_bytes(estimate.peak)} estimated, {available}"
        text = f"{format_bytes(measured.peak)} measured, {available}"
        if measured.peak > free:
            return "does not fit", text
        close = measured.peak > free * (1 - _MEASURED_SPREAD)
        return ("undecided", f"{text}: too close to tell") if close else ("fits", text)

    def _disk_needed(self, shape: ModelShape, stages: Sequence[StagePlan], dtype: str) -> dict[str, int]:
        """Bytes that a run of the recipe takes at most, by purpose."""
        needed = {
            f"{self.recipe.stage_names[stage.number - 1]}: {purpose}": size
            for stage in stages
            for purpose, size in stage_needs.stage_bytes(
                shape, stage.train, dtype, stage.measured and stage.measured.checkpoint
            ).items()
        }
        for form in self.recipe.export_forms:
            needed[f"export: {form}"] = stage_needs.export_bytes(shape, form)
        needed["rows, answers, report"] = tree_size(self.scratch / "prepare") + stage_needs.OTHER_FILES
        return needed


def _trial_settings(train: Train) -> str:
    return train.model_dump_json(exclude={"name", "start", "steps", "epochs", "checkpoint_every", "evaluate_every"})


class _StageTrial:
    """A trial of one stage: a child process that kills itself, and one that goes on from its checkpoint."""

    def __init__(self, planner: _Planner, train: Train, number: int, work: Workload, rows: StageRows) -> None:
        self._planner, self._work, self._number, self._rows = planner, work, number, rows
        folder = planner.scratch / f"train-{number}"
        folder.mkdir()
        recipe, placement, adapter = planner.recipe, planner.placement, planner.adapter
        self._job = trial.TrialJob(
            start=TrainingSetup(
                planner.folder,
                train,
                placement.device,
                placement.dtype,
                adapter.folder if adapter and number == 1 else None,
            ),
            recipe=recipe,
            prepared=planner.scratch / "prepare",
            heavy=work.heavy,
            typical=work.typical,
            held_out=work.held_out,
            number=number,
            seed=recipe.training_seed(number),
            folder=folder,
            limit=planner.limit.free if placement.device == "cpu" else None,
        )

    def result(self) -> Measured:
        """Raises CorralError where a run would raise it too, and TrainingError if a child ended without giving a reason."""
        first = self._run_child(resume=False)
        if isinstance(first, Measured):
            return first
        second = self._run_child(resume=True)
        if isinstance(second, Measured):
            return replace(second, raw=(first,))
        return self._figures(first, second)

    def _run_child(self, *, resume: bool) -> dict[str, Any] | Measured:
        """What a child measured, or why it failed."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["corral.preflight.preload"])
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=trial.run_trial, args=(self._job, sender, resume))
        process.start()
        sender.close()
        phase, outcome = "starting", None
        try:
            while outcome is None:
                try:
                    kind, value = cast("tuple[str, Any]", receiver.recv())
                except EOFError:
                    break
                if kind == "phase":
                    phase = f"{value[0].lower()}{value[1:]}"
                    self._planner.progress.start(f"Trying stage {self._number}: {phase}", None)
                else:
                    outcome = kind, value
            process.join()
        finally:
            if process.is_alive():
                process.kill()
                process.join()
            receiver.close()
        return self._read_outcome(phase, outcome, process.exitcode, resume)

    def _read_outcome(
        self, phase: str, outcome: tuple[str, Any] | None, exit_code: int | None, resume: bool
    ) -> dict[str, Any] | Measured:
        if outcome is None and exit_code == -signal.SIGKILL:
            # Nothing says who killed it; the kernel does so when memory runs out.
            failure = f"it was killed while {phase}: most likely the machine ran out of memory"
            return Measured(None, failure=failure)
        if outcome is None:
            lines = (self._job.folder / "output.txt").read_text(errors="replace").strip().splitlines()
            raise TrainingError(
                f"the trial ended while {phase}: {lines[-1] if lines else f'exit code {exit_code}'}",
                where=f"train.{self._number}",
                hint="`corral run` would fail in the same way; its `--debug` shows more",
            )
        kind, value = outcome
        if kind == "memory":
            return Measured(None, failure=f"it ran out of memory while {phase}: {value}", out_of_memory=True)
        if kind == "error":
            raise cast("CorralError", value)
        assert resume or exit_code == -signal.SIGKILL, exit_code
        return cast("dict[str, Any]", value)

    def _figures(self, first: dict[str, Any], second: dict[str, Any]) -> Measured:
        work, lengths = self._work, self._rows.train.lengths
        tokens = int(lengths[list(work.typical)].sum())
        rate = 2 * tokens / sum(tokens / each["typical_rate"] - each["optimizer_seconds"] for each in (first, second))
        slower, faster = sorted(each["typical_rate"] for each in (first, second))
        if faster > 1.3 * slower:
            self._planner.notes.append(
                f"one of two equal steps took {faster / slower:.1f} times as long as the other: is this machine busy?"
            )
        evaluation_rate = work.held_out_tokens / first["evaluate_seconds"] if work.held_out else rate
        optimizer, save = first["optimizer_seconds"], first.get("save_seconds", 0.0)
        return Measured(
            peak=max(first["peak"], second["peak"]),
            tokens_per_second=rate,
            seconds=work.seconds(rate, optimizer, evaluation_rate, save, first["checkpoint_seconds"]),
            checkpoint=first["checkpoint_bytes"],
            resumed=first["digest"] == second["digest"],
            raw=(first, second),
        )
