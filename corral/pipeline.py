"""Which stages a recipe needs, in order: skip what is done, resume what was interrupted, redo what changed.

Knows nothing about what a stage does (stages) or how progress is shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corral import stages
from corral.interrupts import Interrupts
from corral.progress import Progress
from corral.recipe import Recipe
from corral.run import Run, Stage, environment
from corral.stages import Work
from corral.storage import write_json


@dataclass(frozen=True, slots=True)
class Step:
    """A stage in a recipe's pipeline: its name, what it depends on, and its body."""

    name: str
    inputs: Callable[[Mapping[str, str]], dict[str, Any]]
    """Fingerprints of earlier stages → everything this one depends on."""
    body: Callable[[Work, Stage], None]


def steps(work: Work) -> list[Step]:
    """The stages of a recipe, in order."""
    recipe = work.recipe
    seed = recipe.seed
    device, dtype = work.placement

    def prepare_inputs(_: Mapping[str, str]) -> dict[str, Any]:
        # What is in a file counts, not where it lies: a run may be moved with its data.
        data = recipe.data.model_dump(mode="json", exclude={"sources": {"__all__": {"path"}}})
        return {"data": data, "files": _file_hashes(recipe), "template": work.template.digest, "seed": seed}

    def train_step(number: int) -> Step:
        config = recipe.train[number - 1]
        before = "prepare" if number == 1 else stages.stage_name(recipe, number - 1)

        def inputs(done: Mapping[str, str]) -> dict[str, Any]:
            return {
                "train": config.model_dump(mode="json"),
                "base": work.base.identity,
                "dtype": dtype,
                "device": device,
                "seed": seed,
                "prepare": done["prepare"],
                "before": done[before],
            }

        return Step(stages.stage_name(recipe, number), inputs, lambda w, s: stages.train(w, s, number))

    trained = stages.stage_name(recipe, len(recipe.train))
    return [
        Step("prepare", prepare_inputs, stages.prepare),
        *(train_step(number) for number in range(1, len(recipe.train) + 1)),
        Step("merge", lambda done: {"trained": done[trained]}, stages.merge),
        Step(
            "evaluate",
            lambda done: {"merge": done["merge"], "evaluate": recipe.evaluate.model_dump(mode="json"), "seed": seed},
            stages.evaluate,
        ),
        Step("report", lambda done: {**done, "name": recipe.name}, stages.report),
    ]


def execute(recipe: Recipe, out: Path, progress: Progress, *, until: str | None = None) -> dict[str, str]:
    """Fill a run directory.

    Args:
        until: stop after this stage; by default after the last.

    Returns: for each stage `done` (now) or `skipped` (was done).

    Raises:
        CorralError: as the stages say; what was done before is kept.
        KeyboardInterrupt: stopped on request; calling again goes on from there.
    """
    outcome: dict[str, str] = {}
    interrupts = Interrupts(lambda: progress.say("stopping after this step; once more to stop at once"))
    with Run.open(out, recipe) as run, interrupts:
        work = Work(run, recipe, progress, interrupts)
        device, dtype = work.placement
        write_json(out / "environment.json", environment() | {"device": device, "dtype": dtype})
        pipeline = steps(work)
        done: dict[str, str] = {}
        for step in pipeline:
            stage = run.stage(step.name, step.inputs(done))
            done[step.name] = stage.fingerprint
            if stage.done:
                outcome[step.name] = "skipped"
            else:
                _execute(step, work, stage)
                outcome[step.name] = "done"
            names = [s.name for s in pipeline]
            model = {"spec": recipe.model.base, "identity": work.base.identity, "template": work.template.digest}
            run.write_lineage(names, {"recipe": recipe.name, "seed": recipe.seed, "model": model})
            if step.name == until:
                break
        progress.stop()
    return outcome


def _execute(step: Step, work: Work, stage: Stage) -> None:
    began = time.perf_counter()
    try:
        step.body(work, stage)
    except BaseException:
        work.progress.stop()
        work.run.interrupted(stage, time.perf_counter() - began)
        raise
    work.progress.stop()
    work.run.finish(stage, time.perf_counter() - began)


def _file_hashes(recipe: Recipe) -> dict[str, str]:
    """sha256 of the recipe's local data files; assets carry theirs in the catalogue."""
    from corral.assets import find_asset
    from corral.data.sources import require_file
    from corral.storage import sha256_file

    hashes: dict[str, str] = {}
    for source in recipe.data.sources:
        if source.path.startswith("asset:"):
            hashes[source.label] = find_asset(source.path.removeprefix("asset:")).wheel_sha256
        else:
            hashes[source.label] = sha256_file(require_file(source))
    return hashes
