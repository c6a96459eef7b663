"""Before training: what a recipe's stages need on this machine, measured, or on another one, estimated; and whether that fits.

Each stage is tried in a process of its own (`trial`): the real model and rows, a step with the longest packs of the stage, an
evaluation, a checkpoint, a `kill -9`, and the same step again from the checkpoint. That it runs out of memory is a result.
Estimates are those of `estimate`, and every measured stage says how far they were off.

The trial is of one process, and of training alone: merging, evaluation of answers and exports need less memory than
training does, and their time is not counted. Knows nothing about how a plan is shown, and touches no run.
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

from corral.errors import CorralError, InputError, StorageError, TrainingError
from corral.preflight import estimate, machine, trial
from corral.preflight.estimate import DEVICES, Device, MemoryParts, ModelShape
from corral.preflight.machine import MemoryLimit
from corral.preflight.plan import Figures, Plan, StagePlan, TrialResult, Verdict
from corral.preflight.remedies import Remedy, find_remedies
from corral.preflight.workload import Workload
from corral.progress import Progress

if TYPE_CHECKING:
    from corral.data.prepare import Prepared
    from corral.model.loading import DType
    from corral.recipe import Recipe, Train

_MEASURED_SPREAD = 0.05  # how much the peak varies from one run to the next
_ESTIMATE_SPREAD = 0.2
_CPU_MFU = 0.6  # of a measured matrix product's rate
_CPU_BANDWIDTH = 10e9
_CPU_PROCESS = int(0.4e9)
_CPU_BESIDES = int(0.11e9)
_CPU_SPREAD = 0.35  # what the C library's allocator holds back, measured
_GPU_SHARE_OF_GEMM = 0.5
_DISK_RATE = 300e6  # bytes/s, where no checkpoint was written
_LONGEST_TRIAL = 180.0  # seconds that a trial to check an estimate may take here
_TRIAL_PACKS = 12  # that a trial computes, about
_EXPORTED: dict[str, float] = {"f32": 4, "f16": 2, "q8_0": 1.07, "q4_0": 0.63, "int8": 1.02, "int4": 0.65}
_SMALL_FILES = 50_000_000


def plan(recipe: Recipe, out: Path, progress: Progress, *, device: str | None = None) -> Plan:
    """Find out what a recipe's training stages need.

    Args:
        recipe: as `recipe.load` gives it.
        out: where the run is going to be; only the free space there is looked at, and a hidden folder beside it is used.
        device: one of `estimate.DEVICES`, for an estimate; else this machine is measured.

    Raises:
        DataError, TemplateError, ModelError …: what a run would raise too.
        InputError: no such device.
        StorageError: nothing can be written where the run is going to be.
    """
    if device is not None and device not in DEVICES:
        raise InputError(f"there is no figure for the device {device!r}", where="--device", hint=", ".join(DEVICES))
    place = machine.free_disk(out.parent)[1]
    try:
        scratch = tempfile.TemporaryDirectory(prefix=".corral-plan-", dir=place, ignore_cleanup_errors=True)
    except OSError as error:
        raise StorageError(
            f"the run could not be written here: {error.strerror}", where=str(place), hint="give another place: --out"
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
        from corral.model.device import choose_device

        model = self.recipe.model
        # For another machine, what it has counts; this one only checks the estimate.
        return choose_device("auto", "auto") if self.target_device else choose_device(model.device, model.dtype)

    @cached_property
    def folder(self) -> Path:
        """The base model's folder; for an estimate one with no weights will do."""
        from corral.model.loading import resolve_model

        spec = self.recipe.model.base
        if self.target_device and (Path(spec) / "config.json").is_file():
            return Path(spec)
        self.progress.start(f"Fetching {spec}", None)
        return resolve_model(spec, progress=self.progress.say).folder

    @cached_property
    def prepared(self) -> Prepared:
        from corral.data.prepare import prepare
        from corral.model.loading import load_tokenizer
        from corral.template import Template

        template = Template.load(load_tokenizer(self.folder), self.recipe.model.template)
        self.progress.start("Preparing rows", None)
        folder = self.scratch / "prepare"
        folder.mkdir()
        return prepare(self.recipe.data, template, folder, self.recipe.seed, self.progress)

    @cached_property
    def memory_limit(self) -> MemoryLimit:
        return machine.gpu_memory() if self.placement[0] == "cuda" else machine.cpu_memory()

    def plan(self) -> Plan:
        recipe, shape = self.recipe, ModelShape.from_folder(self.folder)
        wanted = self.target_device.dtype(recipe.model.dtype) if self.target_device else self.placement[1]
        prepared = self.prepared
        tried: dict[str, TrialResult] = {}
        stages: list[StagePlan] = []
        for number, train in enumerate(recipe.train, 1):
            key = train.model_dump_json(exclude={"steps", "epochs", "checkpoint_every", "evaluate_every"})
            stages.append(self._plan_stage(shape, train, number, prepared, wanted, tried.get(key)))
            if stages[-1].tried is not None:
                tried[key] = stages[-1].tried
        self.progress.stop()
        needed = self._disk_needed(shape, stages, wanted)
        free, place = machine.free_disk(self.out)
        reasons = [f"stage {s.number}: {s.reason}" for s in stages]
        verdicts: list[Verdict] = [s.verdict for s in stages]
        if not self.target_device:
            verdicts.append("fits" if sum(needed.values()) <= free else "does not fit")
            if verdicts[-1] != "fits":
                text = f"the disk has {free / 1e9:.1f} GB free and the run needs {sum(needed.values()) / 1e9:.1f} GB"
                reasons.append(f"{text}: make room, or give another place with --out")
        for stage in stages:
            if stage.tried is not None and stage.tried.resumed is False and self.placement[0] == "cpu":
                verdicts.append("undecided")
                reasons.append("a step after kill -9 and resuming gave other numbers than before: please report this")
        verdict = max(verdicts, key=("fits", "undecided", "does not fit").index)
        memory = self.target_device.memory if self.target_device else self.memory_limit.free
        return Plan(
            recipe=recipe.name,
            base=recipe.model.base,
            weights=shape.weights,
            device=self.target_device.name if self.target_device else self.placement[0],
            dtype=wanted,
            estimated=self.target_device is not None,
            source=self.target_device.source if self.target_device else "",
            memory=memory,
            memory_why=self.target_device.name if self.target_device else self.memory_limit.reason,
            stages=stages,
            disk=needed,
            disk_free=free,
            disk_place=str(place),
            verdict=verdict,
            reasons=reasons,
            notes=self.notes,
        )

    def _plan_stage(
        self, shape: ModelShape, train: Train, number: int, prepared: Prepared, dtype: DType, before: TrialResult | None
    ) -> StagePlan:
        kind, own = self.placement
        max_length, seed = self.recipe.data.max_length, self.recipe.seed
        here = Workload.from_stage(train, prepared, max_length, seed, kind)
        work = here if self.target_device is None else Workload.from_stage(train, prepared, max_length, seed, "cuda")
        if train.batch_size > work.rows:
            self.notes.append(f"a step of {train.batch_size} examples goes through the {work.rows} rows more than once")
        tried = before or self._run_trial(shape, train, number, here)
        machine = self._this_device(tried)
        checked = None if tried is None else _estimate_figures(shape, train, here, machine, own)
        asked = None if self.target_device is None else _estimate_figures(shape, train, work, self.target_device, dtype)
        verdict, reason = self._verdict(asked, tried, checked)
        changes: list[Remedy] = []
        if verdict != "fits":
            device, correction = self.target_device or machine, 0
            limit = self.target_device.memory if self.target_device else self.memory_limit.free
            if asked is None and checked is not None and tried is not None and tried.figures is not None:
                correction = tried.figures.peak - checked.peak
            lengths = prepared.train.lengths.tolist()
            spread = _ESTIMATE_SPREAD if not correction else _MEASURED_SPREAD
            size = int(limit * (1 - spread))
            changes = find_remedies(shape, train, number, work, lengths, max_length, device, dtype, size, correction)
        trained = shape.trained_weights(train)
        return StagePlan(number, train, trained, work, asked, tried, checked, verdict, reason, changes)

    def _this_device(self, tried: TrialResult | None) -> Device:
        """This machine as a device, with the rate of products and the process's memory as they were measured."""
        kind, dtype = self.placement
        raw: dict[str, Any] = tried.raw[0] if tried is not None and tried.raw else {}
        gemm = float(raw.get("gemm", 1e11 if kind == "cpu" else 1e14))
        mfu, bandwidth = (_CPU_MFU, _CPU_BANDWIDTH) if kind == "cpu" else (_GPU_SHARE_OF_GEMM, 1e12)
        half: DType = "bfloat16" if dtype == "float32" else dtype
        besides, spread = (int(0.2e9), 0.08) if kind == "cuda" else (_CPU_BESIDES, _CPU_SPREAD)
        process = int(raw.get("process", 0.6e9 if kind == "cuda" else _CPU_PROCESS))
        memory = self.memory_limit.free
        return Device(
            "this machine",
            "cuda" if kind == "cuda" else "cpu",
            memory,
            gemm,
            gemm,
            bandwidth,
            mfu,
            process,
            besides,
            spread,
            half,
            "",
        )

    def _run_trial(self, shape: ModelShape, train: Train, number: int, work: Workload) -> TrialResult | None:
        """A trial here; for an estimate only where that can be had in reasonable time."""
        if self.target_device is not None:
            expected = _estimate_figures(shape, train, work, self._this_device(None), self.placement[1])
            seconds = _TRIAL_PACKS * work.longest.tokens / expected.tokens_per_second
            why = ""
            if not any(self.folder.glob("*.safetensors")):
                why = "its weights are not here"
            elif expected.peak > 0.8 * self.memory_limit.free:
                why = f"it would need about {expected.peak / 1e9:.0f} GB here"
            elif seconds > _LONGEST_TRIAL:
                why = f"that would take about {seconds / 60:.0f} minutes"
            if why:
                self.notes.append(f"the estimate was not checked on this machine: {why}")
                return None
        return _StageTrial(self, train, number, work).result()

    def _verdict(self, asked: Figures | None, tried: TrialResult | None, here: Figures | None) -> tuple[Verdict, str]:
        free = self.target_device.memory if self.target_device else self.memory_limit.free
        if asked is not None:
            spread, peak, what = _ESTIMATE_SPREAD, asked.peak, "estimated"
        elif tried is None or tried.figures is None:
            assert tried is not None
            assert here is not None
            if tried.out_of_memory is None:
                return "undecided", tried.failure
            return "does not fit", f"{tried.failure}; {here.peak / 1e9:.1f} GB estimated, {free / 1e9:.1f} GB there"
        else:
            spread, peak, what = _MEASURED_SPREAD, tried.figures.peak, "measured"
        text = f"{peak / 1e9:.1f} GB {what}, {free / 1e9:.1f} GB there"
        # What is held all the time is known; the rest of an estimate is not.
        if peak > free * (1 + (spread if what == "estimated" else 0)) or (
            asked is not None and asked.parts.held > free
        ):
            return "does not fit", text
        if peak > free * (1 - spread):
            return "undecided", f"{text}: too close to tell"
        return "fits", text

    def _disk_needed(self, shape: ModelShape, stages: Sequence[StagePlan], dtype: str) -> dict[str, int]:
        """Bytes that a run of the recipe takes at most."""
        model = shape.weights * {"float32": 4, "bfloat16": 2, "float16": 2}[dtype]
        found: dict[str, int] = {}
        for stage in stages:
            name, needed = f"train-{stage.number}", stage.best_figures
            full = stage.train.method == "full"
            # Two are kept while the third is written.
            found[f"{name}: checkpoints"] = 3 * (needed.checkpoint if needed else 0)
            if not full:
                found[f"{name}: adapters"] = 3 * 4 * stage.trained
            found[f"{name}: merged model"] = model * (2 if full or stage.train.merge == "best" else 1)
        for kind in (*self.recipe.export.gguf, *self.recipe.export.openvino):
            found[f"export: {kind}"] = int(shape.weights * _EXPORTED[kind])
        rows = sum(f.stat().st_size for f in (self.scratch / "prepare").rglob("*") if f.is_file())
        found["rows, answers, report"] = rows + _SMALL_FILES
        return found


def _estimate_figures(shape: ModelShape, train: Train, work: Workload, device: Device, dtype: DType) -> Figures:
    parts = estimate.memory(shape, train, work.longest, device, dtype)
    rate = estimate.tokens_per_second(shape, train, work.common, device, dtype)
    per_step = estimate.optimizer_seconds(shape, train, device)
    checkpoint = int(shape.trained_weights(train) * (4 + estimate.MOMENT_BYTES[train.optimizer.kind]))
    seconds = _stage_seconds(work, rate, per_step, rate * 2, 0.0, checkpoint / _DISK_RATE)
    return Figures(parts, parts.total, rate, seconds, checkpoint)


def _stage_seconds(
    work: Workload, rate: float, optimizer: float, evaluation: float, save: float, checkpoint: float
) -> float:
    """Of a stage, from tokens a second and the seconds of what happens now and then; each evaluation is taken to save."""
    evaluated = work.evaluations * (work.evaluated / evaluation + save)
    return work.tokens / rate + work.steps * optimizer + evaluated + work.checkpoints * checkpoint


class _StageTrial:
    """A trial of one stage: the child that dies, and the one that goes on."""

    def __init__(self, planner: _Planner, train: Train, number: int, work: Workload) -> None:
        from corral.training.trained_model import Start

        self._planner, self._work = planner, work
        folder = planner.scratch / f"train-{number}"
        folder.mkdir()
        recipe, (device, dtype) = planner.recipe, planner.placement
        self._job = trial.TrialJob(
            start=Start(planner.folder, train, device, dtype),
            base=recipe.model.base,
            template=recipe.model.template,
            prepared=planner.scratch / "prepare",
            heavy=work.heavy,
            typical=work.typical,
            held_out=work.held_out,
            pack_length=work.pack_length,
            seed=recipe.seed,
            folder=folder,
            limit=planner.memory_limit.free if device == "cpu" else None,
        )
        self._title = f"Trying stage {number}"

    def result(self) -> TrialResult:
        """Raises: CorralError (what a run would raise too), TrainingError (a child failed without saying why)."""
        first = self._child(resume=False)
        if isinstance(first, TrialResult):
            return first
        second = self._child(resume=True)
        if isinstance(second, TrialResult):
            return replace(second, raw=(first,))
        return TrialResult(
            self._figures(first, second), resumed=first["digest"] == second["digest"], raw=(first, second)
        )

    def _child(self, *, resume: bool) -> dict[str, Any] | TrialResult:
        """What a child found, or why it did not come to its end."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["corral.preflight.preload"])
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=trial.run_trial, args=(self._job, theirs, resume))
        process.start()
        theirs.close()
        phase, found = "starting", None
        try:
            while found is None:
                try:
                    kind, value = cast("tuple[str, Any]", ours.recv())
                except EOFError:
                    break
                if kind == "phase":
                    phase = value
                    self._planner.progress.start(f"{self._title}: {value[0].lower()}{value[1:]}", None)
                else:
                    found = kind, value
            process.join()
        finally:
            if process.is_alive():
                process.kill()
                process.join()
            ours.close()
        return self._outcome(phase, found, process.exitcode, resume)

    def _outcome(
        self, phase: str, found: tuple[str, Any] | None, code: int | None, resume: bool
    ) -> dict[str, Any] | TrialResult:
        doing = f"{phase[0].lower()}{phase[1:]}"
        if found is None and code == -signal.SIGKILL:
            # Nobody says who killed it; the kernel does so when memory ends.
            return TrialResult(None, f"it was killed while {doing}: most likely the machine ran out of memory", None)
        if found is None:
            lines = (self._job.folder / "output.txt").read_text(errors="replace").strip().splitlines()
            raise TrainingError(
                f"the trial ended while {doing}: {lines[-1] if lines else f'exit code {code}'}",
                where=f"train.{self._title.split()[-1]}",
                hint="`corral run` would fail in the same way; its `--debug` shows more",
            )
        kind, value = found
        if kind == "memory":
            return TrialResult(None, f"it ran out of memory while {doing}: {value}", True)
        if kind == "error":
            raise cast("CorralError", value)
        assert resume or code == -signal.SIGKILL, code  # it was to die so
        return cast("dict[str, Any]", value)

    def _figures(self, first: dict[str, Any], second: dict[str, Any]) -> Figures:
        work, lengths = self._work, self._planner.prepared.train.lengths
        tokens = int(lengths[list(work.typical)].sum())
        seconds = sum(tokens / each["typical_rate"] - each["optimizer_seconds"] for each in (first, second)) / 2
        rate = tokens / seconds
        slower, faster = sorted(each["typical_rate"] for each in (first, second))
        if faster > 1.3 * slower:
            self._planner.notes.append(
                f"the same step took {faster / slower:.1f} times as long once as the other time: is this machine busy?"
            )
        peak = max(first["peak"], second["peak"])
        known = {
            "process": first["process"],
            "weights": first["weights"],
            "optimizer": first["gradients"] + first["moments"],
            "activations": first["activations"],
            "head": first["head"],
        }
        parts = MemoryParts(**known, rest=max(0, peak - sum(known.values())))
        evaluation = work.held_out_tokens / first["evaluate_seconds"] if work.held_out else rate
        save = first.get("save_seconds", 0.0)
        whole = _stage_seconds(work, rate, first["optimizer_seconds"], evaluation, save, first["checkpoint_seconds"])
        return Figures(parts, peak, rate, whole, first["checkpoint_bytes"])
