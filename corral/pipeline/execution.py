"""Which stages a recipe needs, in order: skip what is done, resume what was interrupted, redo what changed.

Of several processes the first goes through them; the others follow it into those that train.

Knows nothing about what a stage does (stages) or how progress is shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corral.errors import RunError, StorageError
from corral.interrupts import Interrupts, Stopped
from corral.pipeline import evaluate_stage, stages
from corral.pipeline.stages import Work
from corral.progress import Progress
from corral.recipe import Recipe
from corral.run.directory import Run, Stage, environment
from corral.storage import write_atomic, write_json
from corral.training.distributed import World


@dataclass(frozen=True, slots=True)
class Step:
    """A stage in a recipe's pipeline: its name, what it depends on, and its body."""

    name: str
    inputs: Callable[[Mapping[str, str]], dict[str, Any]]
    """Fingerprints of earlier stages → everything this one depends on."""
    body: Callable[[Work, Stage], None]
    training: int = 0
    """Number of the training stage, from 1, which all processes take part in; 0 for other stages."""


def steps(work: Work) -> list[Step]:
    """The stages of a recipe, in order."""
    from corral.data.sources import hash_source

    recipe = work.recipe
    seed = recipe.seed
    device, dtype = work.placement

    def prepare_inputs(_: Mapping[str, str]) -> dict[str, Any]:
        # What is in a file counts, not where it lies: a run may be moved with its data.
        data = recipe.data.model_dump(mode="json", exclude={"sources": {"__all__": {"path"}}})
        rows = {source.label: hash_source(source, work.progress) for source in recipe.data.sources}
        return {"data": data, "sources": rows, "template": work.template.fingerprint, "seed": seed}

    def train_step(number: int) -> Step:
        config = recipe.train[number - 1]
        before = "prepare" if number == 1 else stages.stage_name(recipe, number - 1)

        def inputs(done: Mapping[str, str]) -> dict[str, Any]:
            return {
                # How many processes hold what part of it changes no result: a run may go on with others.
                "train": config.model_dump(mode="json", exclude={"sharding"}),
                "base": work.base.identity,
                "dtype": dtype,
                "device": device,
                "seed": seed,
                "prepare": done["prepare"],
                "before": done[before],
            }

        return Step(stages.stage_name(recipe, number), inputs, lambda w, s: stages.train(w, s, number), number)

    export_step = Step(
        "export",
        lambda done: {"merge": done["merge"], "export": [str(form) for form in stages.forms(recipe)]},
        stages.export,
    )
    evaluate_step = Step("evaluate", lambda done: evaluate_stage.inputs(work, done), evaluate_stage.evaluate)
    after_merge = [evaluate_step, *([export_step] if stages.forms(recipe) else [])]
    if evaluate_stage.wants_forms(work):
        after_merge.reverse()
    trained = stages.stage_name(recipe, len(recipe.train))
    return [
        Step("prepare", prepare_inputs, stages.prepare),
        *(train_step(number) for number in range(1, len(recipe.train) + 1)),
        Step("merge", lambda done: {"trained": done[trained]}, stages.merge),
        *after_merge,
        Step("report", lambda done: {**done, "name": recipe.name}, stages.report),
    ]


def execute(
    recipe: Recipe,
    out: Path,
    progress: Progress,
    *,
    only: Collection[str] | None = None,
    world: World | None = None,
    profile: bool = False,
) -> dict[str, str]:
    """Fill a run directory.

    Args:
        world: the processes that train together; this is the first, and the others `follow`.
        profile: record where the time of some training steps goes.
        only: stages that may be done now; another one that is not done yet is an error. By default all may.

    Returns: for each stage `done` (now) or `skipped` (was done).

    Raises:
        CorralError: as the stages say; what was done before is kept.
        RunError: a stage outside `only` is not done.
        Stopped: by a signal; calling again goes on from there.
    """
    interrupts = Interrupts(lambda: progress.say("stopping after this step; once more to stop at once"))
    path = out / "recipe.toml"
    before = path.read_text("utf-8") if only is not None and path.is_file() else None
    with Run.open(out, recipe) as run, interrupts:
        try:
            return _stages(Work(run, recipe, progress, interrupts, world or World(), profile), only)
        except BaseException as error:
            if before is not None:  # what was asked for in addition did not come about
                write_atomic(path, before)
            if isinstance(error, KeyboardInterrupt):
                raise Stopped(interrupts.signal) from None
            raise
        finally:
            progress.stop()


def follow(world: World) -> None:
    """Take part in what the first process trains, in the run directory that it names, until it says that it has ended.

    Raises:
        CorralError: a stage's own.
        PeerError: another process has ended.
        Stopped: by a signal here, or on request of any process.
        SystemExit: the first process has failed elsewhere, with its exit code.
    """
    interrupts = Interrupts()
    with interrupts:
        try:
            while "end" not in (message := world.receive_from_main()):
                run = Run(Path(message["run"]))
                work = Work(run, run.recipe, Progress(), interrupts, world)
                stage = Stage(message["stage"], run.path / message["stage"], message["fingerprint"], done=False)
                with world.peer_errors():
                    stages.train(work, stage, message["number"])
        except KeyboardInterrupt:
            raise Stopped(interrupts.signal) from None
    if message["end"]:
        raise SystemExit(message["end"])


def _stages(work: Work, only: Collection[str] | None) -> dict[str, str]:
    run = work.run
    outcome: dict[str, str] = {}
    done: dict[str, str] = {}
    for step in steps(work):
        may = only is None or step.name in only
        stage = (run.claim_stage if may else run.find_stage)(step.name, step.inputs(done))
        done[step.name] = stage.fingerprint
        outcome[step.name] = "skipped" if stage.done else "done"
        if stage.done:
            continue
        if not may:
            raise RunError(
                f"the stage {step.name!r} of this run is not done for these settings and this machine",
                where=str(run.path),
                hint="`corral run RECIPE` does what is missing",
            )
        _require_extras(work)
        device, dtype = work.placement
        write_json(
            run.path / "environment.json",
            environment() | {"device": device, "dtype": dtype, "engine": evaluate_stage.engine_name(work)},
        )
        _execute(step, work, stage)
        base = work.base
        model = {"spec": work.recipe.model.base, "identity": base.identity, "template": work.template.digest}
        # Stages not reached yet may stand for older settings: they are named when they are done again.
        run.write_lineage(list(done), {"recipe": work.recipe.name, "seed": work.recipe.seed, "model": model})
    return outcome


def _require_extras(work: Work) -> None:
    """Refuse now what would be missing after hours of training. Raises: MissingExtraError."""
    from corral.extras import require

    engines = {evaluate_stage.engine_name(work), *(variant.engine for variant in work.recipe.evaluate.variants)}
    if "openvino" in engines or any(form.target == "openvino" for form in stages.forms(work.recipe)):
        require("openvino_genai", "openvino")
        require("openvino_tokenizers", "openvino")
    for name in work.recipe.trackers:
        require(name, "trackers")
    if any(stage.optimizer.kind != "adamw" for stage in work.recipe.train):
        require("bitsandbytes", "quant")
    if any(stage.quantization != "none" for stage in work.recipe.train):
        from corral.model.quantisation import import_bitsandbytes

        import_bitsandbytes()


def _execute(step: Step, work: Work, stage: Stage) -> None:
    began = time.perf_counter()
    if step.training:
        run = str(work.run.path.resolve())
        work.world.send_to_others(
            {"stage": stage.name, "number": step.training, "fingerprint": stage.fingerprint, "run": run}
        )
    try:
        with work.world.peer_errors():
            step.body(work, stage)
    except BaseException:
        work.progress.stop()
        with suppress(StorageError):  # on a full disk the first error is the one to tell
            work.run.record_interruption(stage, time.perf_counter() - began)
        raise
    work.progress.stop()
    work.run.finish_stage(stage, time.perf_counter() - began)
