"""Finds out what a recipe's training stages need: measured on this machine or estimated for another, and whether it fits.

Each stage is tried in a process of its own (`trial`): the real model and rows, a step with the longest packs of the stage,
an evaluation, a checkpoint, a `kill -9`, and the same step again from the checkpoint. Running out of memory is a result.
Estimates are those of `memory_estimate`; every measured stage says how far they were off.

A trial is one process, and training alone: merging, evaluation of answers and exports need less memory than training, and
their time is not counted.
"""

from __future__ import annotations

import multiprocessing
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
from corral.model.device import choose_device
from corral.model.loading import resolve_model
from corral.model.naming import ModelFiles, find_adapter_to_train
from corral.preflight import machine, memory_estimate, trial
from corral.preflight.machine import MemoryLimit
from corral.preflight.memory_estimate import DEVICES, Device, MemoryParts, ModelShape
from corral.preflight.plan import Figures, Plan, StagePlan, TrialResult, Verdict
from corral.preflight.remedies import Remedy, find_remedies
from corral.preflight.workload import Workload
from corral.progress import Progress
from corral.storage import tree_size
from corral.training.trained_model import TrainingSetup

if TYPE_CHECKING:
    from corral.data.prepare import Prepared
    from corral.model.adapter_files import AdapterFiles
    from corral.model.loading import DType
    from corral.recipe import Recipe, Train

_MEASURED_SPREAD = 0.05  # how much the peak varies from one run to the next
_ESTIMATE_SPREAD = 0.2
_CPU_MFU = 0.6  # share of a measured matrix product's rate
_CPU_BANDWIDTH = 10e9
_CPU_PROCESS = int(0.4e9)
_CPU_OVERHEAD = int(0.11e9)
_CPU_ALLOCATOR_WASTE = 0.35  # what the C library's allocator does not give back, measured
_GPU_MFU = 0.5  # share of a measured matrix product's rate
_DISK_RATE = 300e6  # bytes/s, where no checkpoint was written
_LONGEST_TRIAL = 180.0  # seconds that a trial to check an estimate may take on this machine
_TRIAL_PACKS = 12  # about how many packs a trial computes
_EXPORT_BYTES: dict[str, float] = {"f32": 4, "f16": 2, "q8_0": 1.07, "q4_0": 0.63, "int8": 1.02, "int4": 0.65}
_SMALL_FILES = 50_000_000


def plan(recipe: Recipe, out: Path, progress: Progress, *, device: str | None = None) -> Plan:
    """Find out what a recipe's training stages need.

    Args:
        recipe: as `recipe.load` gives it.
        out: the future run directory; nothing is written there, but a hidden folder beside it is used.
        device: one of `memory_estimate.DEVICES`, for an estimate; else this machine is measured.

    Raises:
        DataError, TemplateError, ModelError …: what a run would raise too.
        InputError: no such device.
        StorageError: nothing can be written beside `out`.
    """
    if device is not None and device not in DEVICES:
        raise InputError(f"there is no figure for the device {device!r}", where="--device", hint=", ".join(DEVICES))
    parent = machine.free_disk(out.parent)[1]
    try:
        scratch = tempfile.TemporaryDirectory(prefix=".corral-plan-", dir=parent, ignore_cleanup_errors=True)
    except OSError as error:
        raise StorageError(
            f"the run could not be written here: {error.strerror}", where=str(parent), hint="give another folder: --out"
        ) from None
    with scratch as folder:
        return _Planner(recipe, out, progress, Path(folder), device).plan()


class _Planner:
    def __init__(self, recipe: Recipe, out: Path, progress: Progress, scratch: Path, device: str | None) -> None:
        self.recipe, self.out, self.progress, self.scratch = recipe, out, progress, scratch
        self.target_device = None if device is None else DEVICES[device]
        self.notes: list[str] = []

    @cached_property
    def placement(self) -> tuple[str, DType]:
        """Device and dtype of this machine; for another machine a trial here only checks the estimate."""
        model = self.recipe.model
        chosen = choose_device() if self.target_device else choose_device(model.device, model.dtype)
        self.notes += chosen.notes
        return chosen.device, chosen.dtype

    @cached_property
    def folder(self) -> Path:
        """The base model's folder; an estimate needs no weights in it."""
        spec = self.recipe.model.base
        if self.target_device and (Path(spec) / "config.json").is_file():
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
        model, adapter = self.recipe.model, self.adapter and self.adapter.folder
        template = ModelFiles(self.folder, adapter, model.template, model.template_variables).load_template()
        self.progress.start("Preparing rows", None)
        folder = self.scratch / "prepare"
        folder.mkdir()
        return prepare(self.recipe.data, template, folder, self.recipe.seed, self.progress)

    @cached_property
    def local_memory(self) -> MemoryLimit:
        return machine.gpu_memory() if self.placement[0] == "cuda" else machine.cpu_memory()

    @property
    def memory(self) -> int:
        """Bytes that training can use on the device that is planned for."""
        return self.target_device.memory if self.target_device else self.local_memory.free

    def plan(self) -> Plan:
        recipe, target, shape = self.recipe, self.target_device, ModelShape.from_folder(self.folder)
        dtype = target.dtype(recipe.model.dtype) if target else self.placement[1]
        stages = self._plan_stages(shape, dtype)
        self.progress.stop()
        disk = self._disk_needed(shape, stages, dtype)
        disk_free, disk_folder = machine.free_disk(self.out)
        reasons = [f"stage {s.number}: {s.reason}" for s in stages]
        verdicts: list[Verdict] = [s.verdict for s in stages]
        if target is None and sum(disk.values()) > disk_free:
            verdicts.append("does not fit")
            text = f"the disk has {format_bytes(disk_free)} free and the run needs {format_bytes(sum(disk.values()))}"
            reasons.append(f"{text}: free some space, or give another folder with --out")
        for stage in stages:
            if stage.tried is not None and stage.tried.resumed is False and self.placement[0] == "cpu":
                verdicts.append("undecided")
                reasons.append("a step after kill -9 and resuming gave other numbers than before: please report this")
        return Plan(
            recipe=recipe.name,
            base=recipe.model.base,
            weights=shape.weights,
            device=target.name if target else self.placement[0],
            dtype=dtype,
            estimated=target is not None,
            source=target.source if target else "",
            memory=self.memory,
            memory_why=target.name if target else self.local_memory.reason,
            stages=stages,
            disk=disk,
            disk_free=disk_free,
            disk_place=str(disk_folder),
            verdict=max(verdicts, key=("fits", "undecided", "does not fit").index),
            reasons=reasons,
            notes=self.notes,
        )

    def _plan_stages(self, shape: ModelShape, dtype: DType) -> list[StagePlan]:
        """A plan of each stage; stages that differ only in length share one trial."""
        trials: dict[str, TrialResult] = {}
        stages: list[StagePlan] = []
        for number, train in enumerate(self.recipe.train, 1):
            if number == 1 and self.adapter is not None:
                train = train.model_copy(update={"lora": self.adapter.lora})
            key = train.model_dump_json(exclude={"steps", "epochs", "checkpoint_every", "evaluate_every"})
            stage = self._plan_stage(shape, train, number, dtype, trials.get(key))
            if stage.tried is not None:
                trials[key] = stage.tried
            stages.append(stage)
        return stages

    def _plan_stage(
        self, shape: ModelShape, train: Train, number: int, dtype: DType, earlier: TrialResult | None
    ) -> StagePlan:
        local_kind, local_dtype = self.placement
        max_length, seed, target = self.recipe.data.max_length, self.recipe.seed, self.target_device
        local_work = Workload.from_stage(train, self.prepared, max_length, seed, local_kind)
        work = Workload.from_stage(train, self.prepared, max_length, seed, "cuda") if target else local_work
        if train.batch_size > work.rows:
            self.notes.append(f"a step of {train.batch_size} examples goes through the {work.rows} rows more than once")
        trial_result = earlier or self._run_trial(shape, train, number, local_work)
        local_device = self._local_device(trial_result)
        local_estimate = (
            None if trial_result is None else _estimate_figures(shape, train, local_work, local_device, local_dtype)
        )
        estimated = None if target is None else _estimate_figures(shape, train, work, target, dtype)
        verdict, reason = self._verdict(estimated, trial_result, local_estimate)
        remedies: list[Remedy] = []
        if verdict != "fits":
            correction = 0
            if estimated is None and local_estimate and trial_result and trial_result.figures:
                correction = trial_result.figures.peak - local_estimate.peak
            spread = _MEASURED_SPREAD if correction else _ESTIMATE_SPREAD
            remedies = find_remedies(
                shape,
                train,
                number,
                work,
                self.prepared.train.lengths.tolist(),
                max_length,
                target or local_device,
                dtype,
                int(self.memory * (1 - spread)),
                correction,
            )
        trained = shape.trained_weights(train)
        return StagePlan(
            number, train, trained, work, estimated, trial_result, local_estimate, verdict, reason, remedies
        )

    def _local_device(self, trial_result: TrialResult | None) -> Device:
        """This machine, with the rate of matrix products and the process's memory as a trial measured them."""
        kind, dtype = self.placement
        measured: dict[str, Any] = trial_result.raw[0] if trial_result is not None and trial_result.raw else {}
        cuda = kind == "cuda"
        flops = float(measured.get("gemm", 1e14 if cuda else 1e11))
        return Device(
            name="this machine",
            kind="cuda" if cuda else "cpu",
            memory=self.local_memory.free,
            flops=flops,
            flops32=flops,
            bandwidth=1e12 if cuda else _CPU_BANDWIDTH,
            mfu=_GPU_MFU if cuda else _CPU_MFU,
            process=int(measured.get("process", 0.6e9 if cuda else _CPU_PROCESS)),
            overhead=int(0.2e9) if cuda else _CPU_OVERHEAD,
            allocator_waste=0.08 if cuda else _CPU_ALLOCATOR_WASTE,
            half_dtype="bfloat16" if dtype == "float32" else dtype,
            source="",
        )

    def _run_trial(self, shape: ModelShape, train: Train, number: int, work: Workload) -> TrialResult | None:
        """A trial on this machine; for an estimate, only if it fits here and is short."""
        if self.target_device is not None:
            expected = _estimate_figures(shape, train, work, self._local_device(None), self.placement[1])
            seconds = _TRIAL_PACKS * work.longest.tokens / expected.tokens_per_second
            obstacle = ""
            if not any(self.folder.glob("*.safetensors")):
                obstacle = "its weights are not here"
            elif expected.peak > 0.8 * self.local_memory.free:
                obstacle = f"it would need about {format_bytes(expected.peak)} here"
            elif seconds > _LONGEST_TRIAL:
                obstacle = f"that would take about {seconds / 60:.0f} minutes"
            if obstacle:
                self.notes.append(f"the estimate was not checked on this machine: {obstacle}")
                return None
        return _StageTrial(self, train, number, work).result()

    def _verdict(
        self, estimated: Figures | None, trial_result: TrialResult | None, local_estimate: Figures | None
    ) -> tuple[Verdict, str]:
        free = self.memory
        if estimated is not None:
            spread, peak, method = _ESTIMATE_SPREAD, estimated.peak, "estimated"
        elif trial_result is None or trial_result.figures is None:
            assert trial_result is not None
            assert local_estimate is not None
            if trial_result.out_of_memory is None:
                return "undecided", trial_result.failure
            text = f"{format_bytes(local_estimate.peak)} estimated, {format_bytes(free)} available"
            return "does not fit", f"{trial_result.failure}; {text}"
        else:
            spread, peak, method = _MEASURED_SPREAD, trial_result.figures.peak, "measured"
        text = f"{format_bytes(peak)} {method}, {format_bytes(free)} available"
        # Of an estimate only the memory that is held between steps is certain.
        certain, tolerance = (estimated.parts.held, spread) if estimated is not None else (peak, 0.0)
        if certain > free or peak > free * (1 + tolerance):
            return "does not fit", text
        if peak > free * (1 - spread):
            return "undecided", f"{text}: too close to tell"
        return "fits", text

    def _disk_needed(self, shape: ModelShape, stages: Sequence[StagePlan], dtype: str) -> dict[str, int]:
        """Bytes that a run of the recipe takes at most, by purpose."""
        model = shape.weights * {"float32": 4, "bfloat16": 2, "float16": 2}[dtype]
        needed: dict[str, int] = {}
        for stage in stages:
            name, figures = f"train-{stage.number}", stage.best_figures
            full = stage.train.method == "full"
            # Two are kept while the third is written.
            needed[f"{name}: checkpoints"] = 3 * (figures.checkpoint if figures else 0)
            if not full:
                needed[f"{name}: adapters"] = 3 * 4 * stage.trained
            needed[f"{name}: merged model"] = model * (2 if full or stage.train.merge == "best" else 1)
        for kind in (*self.recipe.export.gguf, *self.recipe.export.openvino):
            needed[f"export: {kind}"] = int(shape.weights * _EXPORT_BYTES[kind])
        needed["rows, answers, report"] = tree_size(self.scratch / "prepare") + _SMALL_FILES
        return needed


def _estimate_figures(shape: ModelShape, train: Train, work: Workload, device: Device, dtype: DType) -> Figures:
    parts = memory_estimate.memory(shape, train, work.longest, device, dtype)
    rate = memory_estimate.tokens_per_second(shape, train, work.common, device, dtype)
    per_step = memory_estimate.optimizer_seconds(shape, train, device)
    checkpoint = int(shape.trained_weights(train) * (4 + memory_estimate.MOMENT_BYTES[train.optimizer.kind]))
    seconds = _stage_seconds(work, rate, per_step, rate * 2, 0.0, checkpoint / _DISK_RATE)
    return Figures(parts, parts.total, rate, seconds, checkpoint)


def _stage_seconds(
    work: Workload, rate: float, optimizer: float, evaluation_rate: float, save: float, checkpoint: float
) -> float:
    """Seconds of a stage; rates are tokens per second, the rest seconds each. Every evaluation is assumed to save."""
    evaluations = work.evaluations * (work.evaluated / evaluation_rate + save)
    return work.tokens / rate + work.steps * optimizer + evaluations + work.checkpoints * checkpoint


class _StageTrial:
    """A trial of one stage: a child process that kills itself, and one that goes on from its checkpoint."""

    def __init__(self, planner: _Planner, train: Train, number: int, work: Workload) -> None:
        self._planner, self._work, self._number = planner, work, number
        folder = planner.scratch / f"train-{number}"
        folder.mkdir()
        recipe, (device, dtype), adapter = planner.recipe, planner.placement, planner.adapter
        self._job = trial.TrialJob(
            start=TrainingSetup(
                planner.folder, train, device, dtype, adapter.folder if adapter and number == 1 else None
            ),
            base=recipe.model.base,
            template=recipe.model.template,
            template_variables=recipe.model.template_variables,
            prepared=planner.scratch / "prepare",
            heavy=work.heavy,
            typical=work.typical,
            held_out=work.held_out,
            pack_length=work.pack_length,
            seed=recipe.seed,
            folder=folder,
            limit=planner.local_memory.free if device == "cpu" else None,
        )

    def result(self) -> TrialResult:
        """Raises CorralError where a run would raise it too, and TrainingError if a child ended without giving a reason."""
        first = self._run_child(resume=False)
        if isinstance(first, TrialResult):
            return first
        second = self._run_child(resume=True)
        if isinstance(second, TrialResult):
            return replace(second, raw=(first,))
        return TrialResult(
            self._figures(first, second), resumed=first["digest"] == second["digest"], raw=(first, second)
        )

    def _run_child(self, *, resume: bool) -> dict[str, Any] | TrialResult:
        """What a child measured, or a failed TrialResult."""
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
    ) -> dict[str, Any] | TrialResult:
        if outcome is None and exit_code == -signal.SIGKILL:
            # Nothing says who killed it; the kernel does so when memory runs out.
            return TrialResult(None, f"it was killed while {phase}: most likely the machine ran out of memory", None)
        if outcome is None:
            lines = (self._job.folder / "output.txt").read_text(errors="replace").strip().splitlines()
            raise TrainingError(
                f"the trial ended while {phase}: {lines[-1] if lines else f'exit code {exit_code}'}",
                where=f"train.{self._number}",
                hint="`corral run` would fail in the same way; its `--debug` shows more",
            )
        kind, value = outcome
        if kind == "memory":
            return TrialResult(None, f"it ran out of memory while {phase}: {value}", True)
        if kind == "error":
            raise cast("CorralError", value)
        assert resume or exit_code == -signal.SIGKILL, exit_code
        return cast("dict[str, Any]", value)

    def _figures(self, first: dict[str, Any], second: dict[str, Any]) -> Figures:
        work, lengths = self._work, self._planner.prepared.train.lengths
        tokens = int(lengths[list(work.typical)].sum())
        seconds = sum(tokens / each["typical_rate"] - each["optimizer_seconds"] for each in (first, second)) / 2
        rate = tokens / seconds
        slower, faster = sorted(each["typical_rate"] for each in (first, second))
        if faster > 1.3 * slower:
            self._planner.notes.append(
                f"one of two equal steps took {faster / slower:.1f} times as long as the other: is this machine busy?"
            )
        peak = max(first["peak"], second["peak"])
        measured = {
            "process": first["process"],
            "weights": first["weights"],
            "optimizer": first["gradients"] + first["moments"],
            "activations": first["activations"],
            "head": first["head"],
        }
        parts = MemoryParts(**measured, rest=max(0, peak - sum(measured.values())))
        evaluation_rate = work.held_out_tokens / first["evaluate_seconds"] if work.held_out else rate
        save = first.get("save_seconds", 0.0)
        stage = _stage_seconds(
            work, rate, first["optimizer_seconds"], evaluation_rate, save, first["checkpoint_seconds"]
        )
        return Figures(parts, peak, rate, stage, first["checkpoint_bytes"])
