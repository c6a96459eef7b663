"""Runs the stages of a recipe in order: finished ones are skipped, interrupted ones resumed, changed ones redone.

`run.stage_record` decides what is skipped. The model of the last training stage is promoted when that stage has ended well. A
finished stage whose model fails its gate ends the run there, unless no other stage needs it; what may run without it (`corral
evaluate`) takes it as it is. A run that has no model yet then stands for the one that the stage started from.
Of several processes the first runs all stages; the others join it in those that train.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import corral
from corral.errors import GateError, InputError, RunError, StorageError
from corral.formatting import format_bytes
from corral.interrupts import Interrupts
from corral.pipeline.context import RunContext, Stage
from corral.pipeline.evaluate_stage import EvaluateStage
from corral.pipeline.export_stage import ExportStage
from corral.pipeline.prepare_stage import PrepareStage
from corral.pipeline.report_stage import ReportStage
from corral.pipeline.train_stage import TrainStage
from corral.progress import Progress
from corral.recipe import Recipe
from corral.run.directory import Run, environment
from corral.run.promotion import promote, promote_start
from corral.run.stage_record import (
    StageFolder,
    claim_stage,
    find_stage,
    finish_stage,
    is_finished,
    is_superseded,
    missing_output,
    read_fingerprint,
    record_interruption,
)
from corral.storage import tree_size, write_atomic, write_json
from corral.training.distributed import World


def stages(context: RunContext) -> list[Stage]:
    """The stages of a recipe, in order."""
    recipe = context.recipe
    after: list[Stage] = [EvaluateStage(context)]
    if recipe.export_forms:
        # A variant that is an exported form needs it before.
        first = any(variant.form is not None for variant in recipe.evaluate.variants)
        after.insert(0 if first else 1, ExportStage(context))
    training = [TrainStage(context, number) for number in range(1, len(recipe.train) + 1)]
    return [PrepareStage(context), *training, *after, ReportStage(context)]


def execute(
    recipe: Recipe,
    out: Path,
    progress: Progress,
    *,
    allowed: Collection[str] | None = None,
    redo: Collection[str] = (),
    world: World | None = None,
    profile: bool = False,
) -> dict[str, str]:
    """Run the stages of a recipe in a run directory.

    Args:
        allowed: stages that may run now, by default all; if another stage is not finished, that is an error.
        redo: stages to run again in any case, and those that depend on them.
        world: the processes that train together; this is the first one, and the others call `follow`.
        profile: record where the time of some training steps goes.

    Returns: for each stage `done` (now) or `skipped` (it was finished).

    Raises:
        CorralError: a stage failed; what was finished before it is kept.
        RunError: a stage that is not allowed is not finished.
        Stopped: by a signal; calling again resumes.
    """
    interrupts = Interrupts(lambda: progress.say("stopping after this step; interrupt once more to stop at once"))
    path = out / "recipe.toml"
    before = path.read_text("utf-8") if path.is_file() else None
    with Run.open(out, recipe) as run, interrupts:
        try:
            context = RunContext(run, recipe, progress, interrupts, world or World(), profile)
            return _Pipeline(context, allowed, redo).run()
        except BaseException:
            if allowed is not None and before is not None:
                write_atomic(path, before)  # the changed settings took no effect
            raise
        finally:
            progress.stop()


def follow(world: World) -> None:
    """Take part in the training stages of the first process, in the run directory that it names, until it ends.

    Raises:
        CorralError: a stage failed.
        PeerError: another process has ended.
        Stopped: by a signal to any of the processes.
        SystemExit: the first process failed outside a training stage; with its exit code.
    """
    interrupts = Interrupts()
    with interrupts:
        while "end" not in (message := world.receive_from_main()):
            run = Run(Path(message["run"]))
            context = RunContext(run, run.recipe, Progress(), interrupts, world)
            stage = TrainStage(context, message["number"])
            with world.peer_errors():
                stage.run(StageFolder(stage.name, run.path / stage.name, message["fingerprint"], done=False))
    if message["end"]:
        raise SystemExit(message["end"])


class _Pipeline:
    """The stages of one run, taken in order."""

    def __init__(self, context: RunContext, allowed: Collection[str] | None, redo: Collection[str]) -> None:
        self.context, self.allowed, self.redo = context, allowed, set(redo)
        self.stages = stages(context)
        self.fingerprints: dict[str, str] = {}
        self.outcome: dict[str, str] = {}
        self.asked: set[str] = set()
        self.started = False
        names = [stage.name for stage in self.stages]
        for name in redo:
            if name not in names:
                raise InputError(f"the recipe has no stage {name!r}", where="--redo", hint=f"it has {', '.join(names)}")

    def run(self) -> dict[str, str]:
        """Run what is missing. Returns: for each stage `done` or `skipped`."""
        run = self.context.run.path
        for stage in self.stages:
            found = self._find(stage)
            if found is None:
                continue
            folder, inputs = found
            if not folder.done:
                self._check_needs(stage, folder)
                if own := [change for change in folder.changed if not change.startswith("stages.")]:
                    changed = f"{', '.join(own[:3])}{' …' if len(own) > 3 else ''}"
                    self.context.progress.say(
                        f"{stage.name} is made again, as {changed} changed; what it was is kept in {run / 'superseded'}"
                    )
                self.started = True
                self.context.run.write_recipe(self.context.recipe)  # before the first change, and not if there is none
                folder = claim_stage(run, stage.name, inputs, redo=stage.name in self.redo)
            self.fingerprints[stage.name] = folder.fingerprint
            self.outcome[stage.name] = "skipped" if folder.done else "done"
            if not folder.done:
                self._run_stage(stage, folder)
            if isinstance(stage, TrainStage):
                self._promote(stage, folder)
        self.context.run.write_recipe(self.context.recipe)
        self._write_lineage()
        return self.outcome

    def _promote(self, stage: TrainStage, folder: StageFolder) -> None:
        """Let the run stand for the model of the last training stage.

        Raises: GateError (the model of a stage that is the last, or that another starts from, fails its gate).
        """
        recipe = self.context.recipe
        starts = [recipe.start_of(number) for number in range(1, len(recipe.train) + 1)]
        is_last = stage.number == len(starts)
        error = stage.gate_error(folder)
        if error is None:
            if is_last:
                promote(self.context.run.path, folder, "the last training stage; its contract holds")
        elif not self._may_run(stage):
            if is_last:
                self._check_forms(folder, error)
        elif is_last or stage.number in starts[stage.number :]:
            self._promote_start(stage)
            raise error
        else:  # another stage starts where this one did
            self.context.progress.say(f"{error.what}; no other stage starts from it")

    def _promote_start(self, stage: TrainStage) -> None:
        """Give a run without a model that of the stage from which a stage that may not be promoted started."""
        if stage.start:
            run, name = self.context.run.path, self.context.recipe.stage_names[stage.start - 1]
            if promote_start(run, StageFolder(name, run / name, self.fingerprints[name], done=True), stage.name):
                self.context.progress.say(
                    f"the run stands for the model of {name}, which {stage.name} started from, until another is promoted"
                )

    def _check_forms(self, last: StageFolder, error: GateError) -> None:
        """Exported forms are those of the promoted model, and cannot be evaluated as forms of a last stage that is not.

        Raises: GateError (the recipe evaluates one).
        """
        fingerprint = {last.name: last.fingerprint}
        is_promoted = self.context.promoted_stage(fingerprint) == fingerprint
        forms = [variant.name for variant in self.context.recipe.evaluate.variants if variant.form is not None]
        if forms and not is_promoted and "evaluate" in (self.allowed or ()):
            raise GateError(
                f"a model that is not promoted is not exported, so {', '.join(forms)} cannot be evaluated: {error.what}",
                where=str(last.path),
                hint=f"evaluate without: --set evaluate.variants=[]; or {error.hint}",
            )

    def _find(self, stage: Stage) -> tuple[StageFolder, dict[str, Any]] | None:
        """The stage's folder as it is, and its inputs; None for a stage that may not run and that no other needs.

        Raises: RunError (it is not done and may not run, or has lost a file).
        """
        run, name, say = self.context.run.path, stage.name, self.context.progress.say
        if not self._may_run(stage):
            # What it was made from may be on another machine; it only has to be there.
            if not is_finished(run / name):
                if not isinstance(stage, PrepareStage | TrainStage):
                    return None
                raise RunError(
                    f"the stage {name!r} of this run is not finished",
                    where=str(run),
                    hint="`corral run RECIPE` runs the missing stages",
                )
            return StageFolder(name, run / name, read_fingerprint(run, name) or "", done=True), {}
        inputs = stage.inputs(self.fingerprints)
        if any(before in self.redo for before in inputs.get("stages", ())):
            self.redo.add(name)
        folder = find_stage(run, name, inputs)
        is_costly = isinstance(stage, PrepareStage | TrainStage)
        if folder.done and not folder.made_by and not is_costly:
            self.redo.add(name)  # what it was made from is not known
        if name in self.redo:
            return replace(folder, done=False), inputs
        if not folder.done and is_superseded(run, name, inputs):
            say(f"{name} is brought back from {run / 'superseded'}")
            return claim_stage(run, name, inputs), inputs
        if folder.done and folder.made_by != corral.__version__:
            version = f"corral {folder.made_by}" if folder.made_by else "an older version"
            say(f"{name} was made by {version} and stays as it is; --redo {name} makes it again")
        elif isinstance(stage, TrainStage) and (lost := missing_output(run / name)) is not None and not folder.changed:
            raise RunError(
                f"the finished stage {name} has lost {lost}, or it has another size",
                where=str(run / name / lost),
                hint=f"copy it again; or train again: --redo {name}",
            )
        return folder, inputs

    def _may_run(self, stage: Stage) -> bool:
        return self.allowed is None or stage.name in self.allowed

    def _check_needs(self, next_stage: Stage, folder: StageFolder) -> None:
        """Ask the stage that is to run, and all later ones that will have to, for what they need, before any begins."""
        run, disk = self.context.run.path, 0
        fingerprints = self.fingerprints | {next_stage.name: folder.fingerprint}
        for stage in self.stages[self.stages.index(next_stage) :]:
            done = False
            if stage is not next_stage and not self._may_run(stage):
                done = True
            elif stage is not next_stage and isinstance(next_stage, PrepareStage):
                done = is_finished(run / stage.name)  # it depends on the rows whether it stays so
            elif stage is not next_stage:
                inputs = stage.inputs(fingerprints)
                found = find_stage(run, stage.name, inputs)
                fingerprints[stage.name] = found.fingerprint
                done = (found.done or is_superseded(run, stage.name, inputs)) and stage.name not in self.redo
            if not done and stage.name not in self.asked:
                self.asked.add(stage.name)
                disk += stage.needs()
                if stage is next_stage and not folder.changed and stage.name not in self.redo:
                    disk -= tree_size(folder.path)  # of an interrupted attempt
        free = shutil.disk_usage(run).free
        if disk > free:
            raise StorageError(
                f"the disk has {format_bytes(free)} free, and this run needs about {format_bytes(disk)}",
                where=str(run),
                hint="free some space, or give another directory with --out; `corral plan` lists what needs it",
            )

    def _run_stage(self, stage: Stage, folder: StageFolder) -> None:
        context, run, began = self.context, self.context.run, time.perf_counter()
        placement = context.placement if isinstance(stage, TrainStage) else context.placement_here
        made_with = environment() | asdict(placement)
        write_json(run.path / "environment.json", made_with)
        if isinstance(stage, TrainStage):
            message = {"run": str(run.path.resolve()), "number": stage.number, "fingerprint": folder.fingerprint}
            context.world.send_to_others(message)
        try:
            with context.world.peer_errors():
                stage.run(folder)
        except BaseException as error:
            context.progress.stop()
            reason = error.what if isinstance(error, GateError) else ""
            with suppress(StorageError):  # on a full disk the first error is the one to report
                record_interruption(folder, time.perf_counter() - began, reason)
            if reason and isinstance(stage, TrainStage):
                self._promote_start(stage)
            raise
        context.progress.stop()
        finish_stage(folder, time.perf_counter() - began, made_with, stage.disposable)
        self._write_lineage()

    def _write_lineage(self) -> None:
        """Write which stages make up the run as it is now. Later ones may still be those of other settings: they are named
        once it is known that they are not."""
        context, recipe = self.context, self.context.recipe
        known = None if self.started else context.recorded_model.get("template")
        model = {
            "spec": recipe.model.base,
            "identity": context.base_identity,
            "template": known or context.template.digest,
        }
        facts = {"recipe": recipe.name, "seed": recipe.seed, "model": model, "read_from": context.read_from}
        context.run.write_lineage(list(self.fingerprints), facts)
