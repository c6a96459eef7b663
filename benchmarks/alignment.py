"""Aligns the starter model by every objective, from one fine-tuned model and on the same pairs, and writes docs/alignment.md.

The rows, the fine-tuning and the settings are those of recipes/quickstart-align.toml; of its last stage only the objective and
the learning rate differ. Each objective tries some rates, and the one with the best preference accuracy on validation prompts
is judged on test prompts. Then the mistakes that broke a reference system's model are made on purpose. Every sentence of the
page is made from the figures (`alignment_page`). Costs are processor seconds, which other work on the machine hardly changes.
Models and measured rows are kept under `--work`: a stopped run resumes.

    python benchmarks/alignment.py [--steps N] [--work FOLDER] [--out PAGE]
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from alignment_page import Candidate, Page, choose, write_page
from claims import machine

from corral.answering.identity import identify_model
from corral.cli.terminal import TerminalProgress
from corral.data.example_store import ExampleStore
from corral.data.prepare import Prepared
from corral.engines.base import run_engine
from corral.engines.registry import load_engine
from corral.errors import CheckpointError, GateError
from corral.evaluation.alignment_gate import COMPARISON_FOLDER
from corral.evaluation.evaluation_data import select_evaluation_data
from corral.evaluation.measurements import Measurements, VariantSpec
from corral.evaluation.scorecard import Scorecard, build_scorecard
from corral.messages import Preference
from corral.model.folder import model_identity
from corral.model.loading import load_template, resolve_model
from corral.pipeline.execution import execute
from corral.progress import Progress
from corral.recipe import Recipe, load
from corral.run.promotion import MERGED_FOLDER
from corral.storage import write_atomic, write_json
from corral.system import proc_bytes

RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart-align.toml"
STEPS = 16
RATES: Mapping[str, Sequence[float]] = {
    "dpo": (1e-4, 2e-4),
    "ipo": (1e-4, 3e-4),
    "kto": (1e-4, 3e-4),
    "orpo": (1e-4, 3e-4),
    "simpo": (3e-5, 1e-4),
    "ulma": (1e-4, 3e-4),
}
"""The rates that each objective tries."""
SINGLE_ANSWERS = ("kto", "ulma")
"""Objectives of single answers: a step takes twice as many of them as of pairs."""
TOO_HIGH = [2e-4 * 2**n for n in range(7)]
"""Rates to break the model with, in order, until a guard stops one."""
PACKAGES = ("torch", "transformers", "peft")


def recipe_of(
    recipe: Recipe, objective: str, rate: float, steps: int, *, start: str | None = None, **settings: Any
) -> Recipe:
    """The recipe with another objective, with these settings, and another rate in its last stage."""
    raw = recipe.model_dump(mode="json", exclude_unset=True)
    sft, aligned = raw["train"]
    aligned.pop(recipe.train[1].objective, None)
    aligned |= {"objective": objective, "steps": steps, objective: settings}
    aligned["optimizer"] |= {"lr": rate}
    if start is not None:
        aligned["from"] = start
    if objective in SINGLE_ANSWERS:
        aligned["batch_size"] = 2 * recipe.train[1].batch_size
    return Recipe.model_validate(raw | {"train": [sft, aligned]})


def train_candidate(work: Path, name: str, recipe: Recipe) -> Candidate:
    """Train in processes of its own, one up to the first step and one from there, unless that was done."""
    outcome = work / f"{name}.json"
    if not is_done(outcome, recipe):
        before = train_copy(work, name, recipe, "--until-training")
        of_start = work / first_name("dpo") / "train-2-dpo" / COMPARISON_FOLDER
        comparison = work / name / recipe.stage_names[-1] / COMPARISON_FOLDER
        if of_start.exists() and not comparison.exists():  # the model to start from is measured once
            shutil.copytree(of_start, comparison)
        trained = train_copy(work, name, recipe) if before["stopped"] is None else before
        figures = {"reference_seconds": before["reference_seconds"], "recipe": recipe.to_toml()}
        write_json(outcome, trained | figures)
    return Candidate.read(name, recipe.train[-1], work / name / recipe.stage_names[-1], outcome)


def is_done(outcome: Path, recipe: Recipe) -> bool:
    """Whether a candidate was trained by this recipe."""
    return outcome.exists() and json.loads(outcome.read_text("utf-8"))["recipe"] == recipe.to_toml()


def first_name(objective: str) -> str:
    """The run of the first rate of an objective."""
    return f"{objective}-{RATES[objective][0]:g}"


def train_copy(work: Path, name: str, recipe: Recipe, *options: str) -> dict[str, Any]:
    """Run the training stages of a recipe in a copy of the first run, so that the model is fine-tuned once; of an objective's
    further rates in a copy of its first one, so that the reference is computed once. A copy that is there goes on, but not
    from a step that a process before took, whose cost is lost.

    Returns: `peak_memory_bytes` of the process, the processor seconds that it computed the reference (`reference_seconds`) and
        trained (`training_seconds`), and `stopped`: what a check said, if one stopped it.
    """
    out, file = work / name, work / f"{name}.toml"
    if (out / recipe.stage_names[-1] / "metrics.jsonl").exists():
        shutil.rmtree(out)
    if not out.exists():
        same_objective = work / first_name(recipe.train[-1].objective)
        source = same_objective if same_objective.exists() else work / first_name("dpo")
        if source.exists():
            copy_run(source, out)
    write_atomic(file, recipe.to_toml())
    command = [sys.executable, __file__, "--train", str(file), "--work", str(out), *options]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(answer.splitlines()[-1])


def copy_run(run: Path, out: Path) -> None:
    """A run of the same files, which are never changed in place."""
    for path in sorted(run.rglob("*")):
        target = out / path.relative_to(run)
        if path.is_dir():
            target.mkdir(parents=True)
        elif path.name != ".lock":
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target)


class StageCosts(TerminalProgress):
    """Measures processor seconds of the stage that aligns; with `until_training` it interrupts it before its first step."""

    def __init__(self, *, until_training: bool) -> None:
        super().__init__()
        self.seconds = {"reference_seconds": 0.0, "training_seconds": 0.0}
        self._until_training = until_training
        self._measured, self._since = "", 0.0

    def start(self, title: str, total: int | None) -> None:
        is_training = title.startswith("Training (") and not title.startswith("Training (sft")
        if is_training and self._until_training:
            raise KeyboardInterrupt
        super().start(title, total)  # ends the task before
        if title.startswith("Computing log-probabilities of the reference"):
            self._measured = "reference_seconds"
        elif is_training:
            self._measured = "training_seconds"

    def stop(self) -> None:
        self._end_task()
        super().stop()

    def _end_task(self) -> None:
        now = time.process_time()
        if self._measured:
            self.seconds[self._measured] += now - self._since
        self._measured, self._since = "", now


def train_here(file: Path, out: Path, *, until_training: bool) -> dict[str, Any]:
    """Prepare the rows and run the training stages of a recipe; see `train_copy`."""
    recipe, progress, stopped = load(file), StageCosts(until_training=until_training), None
    try:
        execute(recipe, out, progress, allowed=["prepare", *recipe.stage_names])
    except (GateError, CheckpointError) as error:
        stopped = error.what
    except KeyboardInterrupt:
        if not until_training:
            raise
    progress.stop()
    peak = (
        proc_bytes("self/status", "VmHWM") or 0
    )  # not `getrusage`: a process inherits that of the one that started it
    return {"peak_memory_bytes": peak, **progress.seconds, "stopped": stopped}


def judge(
    models: Mapping[str, Path], test: ExampleStore, folder: Path, recipe: Recipe, progress: Progress
) -> Scorecard:
    """Measure models on test rows, and compare each with the fine-tuned one. The rows are kept in `folder`."""
    template = load_template(models["sft"])
    data = select_evaluation_data(test, recipe.evaluate, template)
    folder.mkdir(exist_ok=True)
    measurements = Measurements(folder)
    variants: dict[str, VariantSpec] = {}
    for name, folder in models.items():
        identity = identify_model(model_identity(folder), template, "transformers", dtype="float32", device="cpu")
        variant = variants[name] = VariantSpec(name, identity.asked(recipe.answer, recipe.answers_seed, ""))
        if not measurements.is_complete(variant, data):
            progress.start(f"Evaluating {name}: loading", None)
            measure = partial(measurements.measure, variant, template=template, data=data, progress=progress)
            run_engine(load_engine("transformers", folder, dtype="float32", device="cpu"), measure)
            gc.collect()
    measurements.finish(list(variants.values()), data)
    rows = {
        name: replace(measurements.variant_rows(name), conditions=variant.conditions(()))
        for name, variant in variants.items()
    }
    return build_scorecard(rows, baseline="sft", seed=recipe.seed, primary="preference_accuracy")


def break_it(work: Path, recipe: Recipe, steps: int) -> list[Candidate]:
    """DPO with rates that are doubled until a guard stops it."""
    tried: list[Candidate] = []
    for rate in TOO_HIGH:
        tried.append(train_candidate(work, f"dpo-{rate:g}", recipe_of(recipe, "dpo", rate, steps)))
        if tried[-1].stopped:
            break
    return tried


def use_wrong_reference(work: Path, recipe: Recipe, rate: float, steps: int) -> Candidate:
    """DPO against the raw base model: its log-probabilities are put in place of those of the fine-tuned one, by hand, as no
    setting does it."""
    name, of_base = "wrong-reference", recipe_of(recipe, "dpo", rate, steps, start="base")
    recipe = recipe_of(recipe, "dpo", rate, steps + 1)  # not a stage that the first run has
    if not is_done(work / f"{name}.json", recipe):
        for copy, its_recipe in ((name, recipe), ("reference-of-base", of_base)):
            train_copy(work, copy, its_recipe, "--until-training")
        for path in (work / "reference-of-base" / of_base.stage_names[-1] / "reference").glob("*.jsonl"):
            mine = work / name / recipe.stage_names[-1] / "reference" / path.name
            identity = mine.read_text("utf-8").splitlines(keepends=True)[0]
            mine.write_text(identity + "".join(path.read_text("utf-8").splitlines(keepends=True)[1:]), "utf-8")
    return train_candidate(work, name, recipe)


def main() -> None:
    options = _parser().parse_args()
    work: Path = options.work
    if options.train:
        print(json.dumps(train_here(options.train, work, until_training=options.until_training)))
        return
    progress, steps = TerminalProgress(), options.steps
    recipe, first = load(options.recipe), work / first_name("dpo")
    work.mkdir(parents=True, exist_ok=True)
    candidates: dict[str, list[Candidate]] = {objective: [] for objective in RATES}
    tried = [(turn, objective, rate) for objective, rates in RATES.items() for turn, rate in enumerate(rates)]
    for _, objective, rate in sorted(tried, key=lambda each: each[0]):  # each objective once before the second rates
        aligned = recipe_of(recipe, objective, rate, steps)
        candidates[objective].append(train_candidate(work, f"{objective}-{rate:g}", aligned))
    best = {objective: chosen for objective, tried in candidates.items() if (chosen := choose(tried)) is not None}
    rate = best["dpo"].rate if "dpo" in best else RATES["dpo"][0]
    bare = train_candidate(work, f"dpo-without-sft-{rate:g}", recipe_of(recipe, "dpo", rate, steps, sft_weight=0.0))
    models = {"base": resolve_model(recipe.model.base).folder, "sft": first / "train-1-sft" / MERGED_FOLDER}
    for objective, candidate in best.items():
        models[objective] = work / candidate.name / f"train-2-{objective}" / MERGED_FOLDER
    prepared = Prepared.open(first / "prepare")
    page = Page(
        model=recipe.model.base.partition(":")[2],
        machine=machine(),
        versions={name: version(name) for name in PACKAGES},
        prompts={side: _pairs_by_prompt(getattr(prepared, side)) for side in ("train", "validation", "test")},
        steps=steps,
        candidates=candidates,
        best=best,
        test=judge(models, prepared.test, work / "test", recipe, progress),
        too_high=break_it(work, recipe, steps),
        wrong_reference=use_wrong_reference(work, recipe, rate, steps),
        without_sft_term=(next(c for c in candidates["dpo"] if c.rate == rate), bare),
    )
    progress.stop()
    write_atomic(options.out, write_page(page))
    print(f"wrote {options.out}")


def _pairs_by_prompt(rows: ExampleStore) -> Counter[str]:
    """How many pairs there are about each prompt."""
    pairs = (row.record for row in rows.select(types=(Preference,)))
    return Counter(json.dumps(pair.prompt.to_json()) for pair in pairs if isinstance(pair, Preference))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="another recipe of an `sft` and a `dpo` stage")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each objective (default: {STEPS})")
    parser.add_argument("--work", type=Path, default=Path("build/alignment"), help="where runs and rows are kept")
    parser.add_argument("--out", type=Path, default=Path("docs/alignment.md"))
    parser.add_argument("--train", type=Path, metavar="RECIPE", help="only train this recipe, in the run --work")
    parser.add_argument("--until-training", action="store_true", help="with --train: stop before the first step")
    return parser


if __name__ == "__main__":
    main()
