"""Runs the stages of a recipe in order: finished ones are skipped, interrupted ones resumed, changed ones redone.

`run.stage_record` decides what is skipped. Of several processes the first runs all stages; the others join it in those that
train.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from corral.errors import RunError, StorageError, require
from corral.interrupts import Interrupts
from corral.pipeline import evaluate_stage, export_stage, merge_stage, prepare_stage, report_stage, train_stage
from corral.pipeline.context import RunContext, training_stage_name
from corral.progress import Progress
from corral.recipe import Recipe
from corral.run.directory import Run, environment
from corral.run.stage_record import Stage, claim_stage, find_stage, finish_stage, record_interruption
from corral.storage import write_atomic, write_json
from corral.training.distributed import World


@dataclass(frozen=True, slots=True)
class StageDefinition:
    """A stage of a recipe's pipeline: its name, what it depends on, and its body."""

    name: str
    inputs: Callable[[Mapping[str, str]], dict[str, Any]]
    """Fingerprints of the stages before it → everything that it depends on."""
    body: Callable[[RunContext, Stage], None]
    training: int = 0
    """Number of the training stage, from 1, which all processes take part in; 0 for other stages."""


def stages(context: RunContext) -> list[StageDefinition]:
    """The stages of a recipe, in order."""
    recipe = context.recipe
    training = [
        StageDefinition(
            training_stage_name(recipe, number),
            partial(train_stage.inputs, context, number),
            partial(train_stage.train, number=number),
            number,
        )
        for number in range(1, len(recipe.train) + 1)
    ]
    after_merge = [StageDefinition("evaluate", partial(evaluate_stage.inputs, context), evaluate_stage.evaluate)]
    if export_stage.requested_forms(recipe):
        export = StageDefinition("export", partial(export_stage.inputs, context), export_stage.export)
        after_merge.insert(0 if evaluate_stage.evaluates_exports(recipe) else 1, export)
    return [
        StageDefinition("prepare", partial(prepare_stage.inputs, context), prepare_stage.prepare),
        *training,
        StageDefinition("merge", partial(merge_stage.inputs, context), merge_stage.merge),
        *after_merge,
        StageDefinition("report", partial(report_stage.inputs, context), report_stage.report),
    ]


def execute(
    recipe: Recipe,
    out: Path,
    progress: Progress,
    *,
    allowed: Collection[str] | None = None,
    world: World | None = None,
    profile: bool = False,
) -> dict[str, str]:
    """Run the stages of a recipe in a run directory.

    Args:
        allowed: stages that may run now, by default all; if another stage is not finished, that is an error.
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
    before = path.read_text("utf-8") if allowed is not None and path.is_file() else None
    with Run.open(out, recipe) as run, interrupts:
        try:
            return _run_stages(RunContext(run, recipe, progress, interrupts, world or World(), profile), allowed)
        except BaseException:
            if before is not None:  # the changed settings took no effect
                write_atomic(path, before)
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
            stage = Stage(message["stage"], run.path / message["stage"], message["fingerprint"], done=False)
            with world.peer_errors():
                train_stage.train(context, stage, message["number"])
    if message["end"]:
        raise SystemExit(message["end"])


def _run_stages(context: RunContext, allowed: Collection[str] | None) -> dict[str, str]:
    run = context.run
    outcome: dict[str, str] = {}
    done: dict[str, str] = {}
    for definition in stages(context):
        name = definition.name
        is_allowed = allowed is None or name in allowed
        stage = (claim_stage if is_allowed else find_stage)(run.path, name, definition.inputs(done))
        done[name] = stage.fingerprint
        outcome[name] = "skipped" if stage.done else "done"
        if stage.done:
            continue
        if not is_allowed:
            raise RunError(
                f"the stage {name!r} of this run is not finished with these settings on this machine",
                where=str(run.path),
                hint="`corral run RECIPE` runs the missing stages",
            )
        _require_extras(context)
        machine = asdict(context.placement) | {"engine": evaluate_stage.evaluation_engine(context)}
        write_json(run.path / "environment.json", environment() | machine)
        _run_stage(definition, context, stage)
        base = context.base
        model = {"spec": context.recipe.model.base, "identity": base.identity, "template": context.template.digest}
        # Later stages may still be those of older settings: the lineage names them once they are done again.
        run.write_lineage(list(done), {"recipe": context.recipe.name, "seed": context.recipe.seed, "model": model})
    return outcome


def _require_extras(context: RunContext) -> None:
    """Check now for packages that would be missing after hours of training. Raises: MissingExtraError."""
    engines = {
        evaluate_stage.evaluation_engine(context),
        *(variant.engine for variant in context.recipe.evaluate.variants),
    }
    if "openvino" in engines or any(form.target == "openvino" for form in export_stage.requested_forms(context.recipe)):
        require("openvino_genai", "openvino")
        require("openvino_tokenizers", "openvino")
    for name in context.recipe.trackers:
        require(name, "trackers")
    if any(stage.optimizer.kind != "adamw" for stage in context.recipe.train):
        require("bitsandbytes", "quant")
    if any(stage.quantization != "none" for stage in context.recipe.train):
        from corral.model.quantisation import import_bitsandbytes

        import_bitsandbytes()


def _run_stage(definition: StageDefinition, context: RunContext, stage: Stage) -> None:
    began = time.perf_counter()
    if definition.training:
        run = str(context.run.path.resolve())
        context.world.send_to_others(
            {"stage": stage.name, "number": definition.training, "fingerprint": stage.fingerprint, "run": run}
        )
    try:
        with context.world.peer_errors():
            definition.body(context, stage)
    except BaseException:
        context.progress.stop()
        with suppress(StorageError):  # on a full disk the first error is the one to report
            record_interruption(stage, time.perf_counter() - began)
        raise
    context.progress.stop()
    finish_stage(stage, time.perf_counter() - began)
