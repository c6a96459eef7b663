"""Measures what prompting, votes, precision and batching gain on a small model, and writes docs/findings.md.

Every sentence of that page is generated from the figures (`findings_page`). Rows are saved under `--work` as they are
computed, so that a stopped run resumes, and parts that did not change are not measured again. Times are meaningful only on an
otherwise idle machine.

    python benchmarks/findings.py [--rows N] [--run RUN] [--work FOLDER] [--out PAGE]

The model is the unchanged starter model, in float32 on the openvino engine. `--run` adds the held-out rows of a
finished run, answered by its base and its tuned model.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import time
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from claims import machine
from findings_page import Findings, write_page

from corral.answering.answerer import Answerer
from corral.answering.build import build_answerer
from corral.answering.consensus import Candidate, Consensus, Method
from corral.answering.examples import training_examples, training_examples_digest
from corral.answering.identity import identify_model
from corral.cli.terminal import TerminalProgress
from corral.engines.base import Engine, Sampling
from corral.engines.embedding import Embedder
from corral.engines.registry import load_engine
from corral.evaluation import scorecard, tasks
from corral.evaluation.evaluation_data import EvaluationData
from corral.evaluation.inference import Item
from corral.evaluation.measurements import Measurements, VariantSpec, task_items
from corral.evaluation.row_file import RowFile, RowProducer
from corral.evaluation.scorecard import Scorecard
from corral.evaluation.scoring import Row, VariantRows
from corral.evaluation.tasks import Task
from corral.export.export import export_form
from corral.export_forms import ExportForm
from corral.messages import Conversation
from corral.model.folder import model_identity
from corral.model.loading import load_template, resolve_model
from corral.progress import Progress
from corral.recipe import Answer
from corral.run.directory import Run
from corral.storage import new_directory, remove_tree, write_atomic, write_json
from corral.template import Template

MODEL = "asset:smollm2-135m-instruct"
SEED = 1
ROWS = 300
CANDIDATES = 5
CONCURRENCY = 32
ROUNDS = 3
PACKAGES = ("openvino-genai", "openvino", "torch", "transformers", "rapidfuzz", "sacrebleu")

SHOTS = {"shots": {"count": 4}}
SIMILAR = {"shots": {"count": 4, "choose": "similar"}}
PROMPTINGS: Mapping[str, dict[str, Any]] = {
    "zero-shot": {},
    "static shots": SHOTS,
    "similar shots": SIMILAR,
    "steps": {"reasoning": True},
    "steps + static shots": {"reasoning": True, **SHOTS},
    "steps + similar shots": {"reasoning": True, **SIMILAR},
}
"""Ways to prompt for word problems. With steps, the examples are worked ones."""
FEWER_EXAMPLES: Mapping[str, dict[str, Any]] = {f"{n} examples": {"shots": {"count": n}} for n in (8, 4, 2)}
PRECISIONS = {"float32": ExportForm("openvino", "f32"), "int8": ExportForm("openvino", "int8")}


@dataclass(frozen=True)
class Bench:
    """What all parts share: sizes, the folder for rows, the model, and the progress display."""

    rows: int
    folder: Path
    model: Path
    template: Template
    progress: Progress

    def task(self, name: str, max_tokens: int, share: float = 1.0) -> Task:
        """A task with this run's number of rows, or a share of it."""
        return tasks.load_task(name, max(2, round(self.rows * share)), seed=SEED, max_tokens=max_tokens)

    def subject(
        self, name: str, settings: Mapping[str, Any], weights: str, *, loss: bool = False, examples: str = ""
    ) -> VariantSpec:
        """A variant of the model with these weights; `examples` is the hash of the rows that examples are taken from."""
        model = identify_model(weights, self.template, "openvino", dtype="float32", device="cpu")
        return VariantSpec(name, model.asked(Answer.model_validate(settings), SEED, examples), loss)


def main() -> None:
    options = _parser().parse_args()
    progress = TerminalProgress()
    model = resolve_model(MODEL, progress=progress.say).folder
    bench = Bench(options.rows, options.work, model, load_template(model), progress)
    options.work.mkdir(parents=True, exist_ok=True)
    arithmetic = bench.task("arithmetic", 160)
    began = time.perf_counter()
    with open_session(model) as session:
        asked = evaluate_promptings(bench, "asked", session, PROMPTINGS, EvaluationData(tasks=[arithmetic]))
        lean = evaluate_promptings(
            bench, "lean", session, FEWER_EXAMPLES, EvaluationData(tasks=[arithmetic]), baseline="8 examples"
        )
        votes = {
            "arithmetic": compare_votes(bench, session, arithmetic, PROMPTINGS["steps + static shots"], share=0.5),
            "truthfulqa": compare_votes(bench, session, bench.task("truthfulqa", 64, 0.5), {}, share=1),
        }
        batching = cached(bench.folder / "batching.json", bench.rows, lambda: time_batching(bench, session, arithmetic))
    precision, memory = compare_precisions(bench, arithmetic)
    own = compare_run(bench, options.run) if options.run else None
    spent = time.perf_counter() - began
    progress.stop()
    findings = Findings(
        model=MODEL.partition(":")[2],
        machine=machine(),
        versions={name: version(name) for name in PACKAGES},
        seed=SEED,
        candidates=CANDIDATES,
        asked=asked,
        lean=lean,
        votes=votes,
        precision=precision,
        memory=memory,
        batching=batching,
        run=own,
    )
    write_atomic(options.out, write_page(findings))
    print(f"wrote {options.out} after {spent / 60:.1f} minutes")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", type=int, default=ROWS, help=f"word problems; other sets in proportion (default: {ROWS})"
    )
    parser.add_argument("--run", type=Path, help="a finished run, whose held-out rows are answered too")
    parser.add_argument("--work", type=Path, default=Path("build/findings"), help="where rows are kept")
    parser.add_argument("--out", type=Path, default=Path("docs/findings.md"))
    return parser


@dataclass(frozen=True)
class Session:
    """An engine, and a function that runs coroutines in its event loop."""

    engine: Engine
    run: Callable[[Coroutine[Any, Any, Any]], Any]


@contextmanager
def open_session(folder: Path) -> Generator[Session]:
    """Load a model folder into the openvino engine, with an event loop of its own; closed with the context."""

    async def load() -> Engine:
        return load_engine("openvino", folder, dtype="float32", device="cpu")

    with asyncio.Runner() as runner:
        session = Session(runner.run(load()), runner.run)
        try:
            yield session
        finally:
            runner.run(session.engine.close())
            gc.collect()


def evaluate_promptings(
    bench: Bench,
    part: str,
    session: Session,
    promptings: Mapping[str, Mapping[str, Any]],
    material: EvaluationData,
    *,
    baseline: str | None = None,
) -> Scorecard:
    """Evaluate a model with several promptings, and compare each with the baseline (default: the first)."""
    subjects = [bench.subject(name, settings, model_identity(bench.model)) for name, settings in promptings.items()]
    into = open_measurements(bench.folder / part, subjects, material)
    for subject in subjects:
        session.run(into.measure(subject, session.engine, bench.template, material, bench.progress))
    return scorecard.build_scorecard(
        {subject.name: into.variant_rows(subject.name) for subject in subjects},
        baseline=baseline or subjects[0].name,
        seed=SEED,
        primary=f"{material.tasks[0].name}/accuracy",
    )


def open_measurements(folder: Path, subjects: Sequence[VariantSpec], material: EvaluationData) -> Measurements:
    """Open the measurements in a folder, and drop rows that were computed with other settings."""
    before = folder.with_name(f"{folder.name}.before")
    if folder.exists() and not before.exists():
        folder.rename(before)
    remove_tree(folder)
    with new_directory(folder) as new:
        Measurements(new).reuse_rows(before, subjects, material)
    remove_tree(before)
    return Measurements(folder)


def cached(path: Path, rows: int, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Figures from a file if they are for this number of rows; else measured and written there."""
    if path.exists() and (known := json.loads(path.read_text("utf-8")))["rows"] == rows:
        return known
    figures = measure() | {"rows": rows}
    write_json(path, figures)
    return figures


def compare_votes(
    bench: Bench, session: Session, task: Task, settings: Mapping[str, Any], *, share: float
) -> Scorecard:
    """Generate candidates once, and compare every way to vote on them."""
    answer = Answer.model_validate({**settings, "max_tokens": task.max_tokens})
    questions = task.questions[: max(2, round(len(task.questions) * share))]
    items = task_items(replace(task, questions=questions))
    digest = f"{model_identity(bench.model)[:16]} {answer.model_dump_json()} {bench.rows}"
    producer, file = RowProducer(task.name, digest), RowFile(bench.folder / f"votes-{task.name}.jsonl")
    sampling = Sampling(task.max_tokens or 64, n=CANDIDATES, temperature=0.7, top_p=0.9, seed=SEED, logprobs=True)
    answerer = build_answerer(
        session.engine, bench.template, answer, examples=lambda: task.examples(reasoning=answer.reasoning), seed=SEED
    )
    bench.progress.start(f"Candidates: {task.name}", len(items))
    session.run(_generate(answerer, producer, items, sampling, file, bench.progress))
    drawn = file.rows_of(producer)
    embedder, rows = Embedder(), {"first candidate": list[Row]()} | {method: list[Row]() for method in get_args(Method)}
    if task.kind == "text":  # a majority vote counts results, which free texts do not have
        rows = {name: rows[name] for name in ("first candidate", "rouge-l", "cosine")}
    for item in items:
        candidates = [Candidate(text, mean) for text, mean in drawn[item.id]["candidates"]]
        for method, method_rows in rows.items():
            winner = 0
            if method != "first candidate":
                winner = Consensus(method, stop="never", embed=embedder).vote(candidates).winner  # pyright: ignore[reportArgumentType]
            text = candidates[winner].text
            assert item.grade is not None
            method_rows.append(tasks.row_from_answer({"id": item.id, "answer": text, **item.grade(text)}))
    cards = {method: VariantRows([], {}, {task.name: method_rows}) for method, method_rows in rows.items()}
    # Votes by ROUGE-L are judged by another metric than the one they choose by, as far as the task has one.
    primary = f"{task.name}/{'rouge1' if task.kind == 'text' else 'accuracy'}"
    return scorecard.build_scorecard(cards, baseline="first candidate", seed=SEED, primary=primary)


async def _generate(
    answerer: Answerer,
    producer: RowProducer,
    items: Sequence[Item],
    sampling: Sampling,
    into: RowFile,
    progress: Progress,
) -> None:
    limit = asyncio.Semaphore(CONCURRENCY)

    async def one(item: Item) -> None:
        async with limit:
            prompt, _ = item.conversation.split_answer()
            answer = await answerer.answer(prompt, sampling.for_row(item.id))
            # An answer without tokens has no mean log-probability.
            pairs = [
                (text, sum(done.logprobs) / len(done.logprobs) if done.logprobs else None)
                for text, done in zip(answer.texts, answer.completions, strict=True)
            ]
            into.add(producer, item.id, candidates=pairs)
            progress.update(len(into.rows_of(producer)))

    known = into.rows_of(producer)
    async with asyncio.TaskGroup() as group:
        for item in items:
            if item.id not in known:
                group.create_task(one(item))


def time_batching(bench: Bench, session: Session, task: Task) -> dict[str, Any]:
    """Time the same questions answered one by one and all at once, in alternating rounds."""
    settings = Answer(max_tokens=48)
    answerer = build_answerer(session.engine, bench.template, settings, examples=tuple, seed=SEED)
    prompts = [question.example.split_answer()[0] for question in task.questions[:CONCURRENCY]]

    async def one_by_one() -> int:
        return sum([len((await answerer.answer(prompt)).completions[0].ids) for prompt in prompts])

    async def together() -> int:
        answers = await asyncio.gather(*(answerer.answer(prompt) for prompt in prompts))
        return sum(len(answer.completions[0].ids) for answer in answers)

    bench.progress.start("Batched against sequential", 2 * ROUNDS)
    session.run(together())
    seconds: dict[str, list[float]] = {"sequential": [], "batched": []}
    tokens: dict[str, int] = {}
    for turn in range(ROUNDS):
        for index, (name, work) in enumerate((("sequential", one_by_one), ("batched", together))):
            began = time.perf_counter()
            tokens[name] = session.run(work())
            seconds[name].append(time.perf_counter() - began)
            bench.progress.update(2 * turn + index + 1)
    return {"prompts": len(prompts), "seconds": seconds, "tokens": tokens}


def compare_precisions(bench: Bench, arithmetic: Task) -> tuple[Scorecard, dict[str, Any]]:
    """Compare float32 and int8: answers, multiple choice, loss on reference summaries; size and memory."""
    short = [q for q in bench.task("xsum", 64, 3).questions if len(q.prompt.split()) < 250][: max(2, bench.rows // 3)]
    summaries = [Item(question.id, question.example) for question in short]
    material = EvaluationData(loss_items=summaries, tasks=[arithmetic, bench.task("commonsense_qa", 24, 0.5)])
    folders = {
        name: export_form(bench.model, bench.folder / "forms", form, bench.progress)
        for name, form in PRECISIONS.items()
    }
    subjects = {name: bench.subject(name, SHOTS, model_identity(folder), loss=True) for name, folder in folders.items()}
    into = open_measurements(bench.folder / "precision", list(subjects.values()), material)
    memory: dict[str, Any] = {}
    for name, subject in subjects.items():
        known = bench.folder / f"memory-{name}.json"
        if known.exists() and into.is_complete(subject, material):
            memory[name] = json.loads(known.read_text("utf-8"))
            continue
        with open_session(folders[name]) as session:
            memory[name] = cached(known, bench.rows, partial(measure_memory, bench, session, arithmetic, folders[name]))
            session.run(into.measure(subject, session.engine, bench.template, material, bench.progress))
    rows = {name: into.variant_rows(name) for name in subjects}
    return scorecard.build_scorecard(rows, baseline="float32", seed=SEED), memory


def measure_memory(bench: Bench, session: Session, task: Task, folder: Path) -> dict[str, Any]:
    """Size of the weights, and peak memory of the engine's process while it answers a few questions at once."""
    answerer = build_answerer(session.engine, bench.template, Answer(max_tokens=32), examples=tuple, seed=SEED)
    prompts = [question.example.split_answer()[0] for question in task.questions[:8]]

    async def together() -> None:
        await asyncio.gather(*(answerer.answer(prompt) for prompt in prompts))

    session.run(together())
    weights = (folder / "openvino_model.bin").stat().st_size
    return {"weights_bytes": weights, "peak_bytes": _peak_of_children(), "at_once": len(prompts)}


def _peak_of_children() -> int:
    """Sum of the peak resident sizes of this process's children, in bytes (Linux)."""
    peak = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text("utf-8").splitlines() if ":" in line)
        except OSError:
            continue
        if int(fields.get("PPid", 0)) == os.getpid() and "VmHWM" in fields:
            peak += int(fields["VmHWM"].split()[0]) * 1024
    return peak


def compare_run(bench: Bench, path: Path) -> Scorecard:
    """Compare a run's base and tuned models on its held-out rows, without and with examples from its training rows."""
    from corral.data.prepare import Prepared

    run = Run(path)
    test = Prepared.open(run.path / "prepare").test
    records = [test[i] for i in range(min(len(test), max(2, bench.rows // 5)))]
    items = [Item(e.key, e.record) for e in records if isinstance(e.record, Conversation)]
    examples = training_examples_digest(run)
    material = EvaluationData(items, items, (), lambda: training_examples(run, SEED))
    folders = {"base": resolve_model(run.recipe.model.base).folder, "tuned": run.model}
    promptings: dict[str, dict[str, Any]] = {"": {}, " + static shots": {"shots": {"count": 2}}}
    promptings[" + similar shots"] = {"shots": {"count": 2, "choose": "similar"}}
    subjects = {
        model: [
            bench.subject(
                f"{model}{name}", {"max_tokens": 128, **way}, model_identity(folder), loss=not name, examples=examples
            )
            for name, way in promptings.items()
        ]
        for model, folder in folders.items()
    }
    every = [subject for model_subjects in subjects.values() for subject in model_subjects]
    into = open_measurements(bench.folder / "run", every, material)
    for model, folder in folders.items():
        if all(into.is_complete(subject, material) for subject in subjects[model]):
            continue
        settings = run.recipe.model
        template = (
            load_template(folder, settings.template, settings.template_variables)
            if model == "base"
            else load_template(folder)
        )
        with open_session(folder) as session:
            for subject in subjects[model]:
                session.run(into.measure(subject, session.engine, template, material, bench.progress))
    return scorecard.build_scorecard(
        {subject.name: into.variant_rows(subject.name) for subject in every},
        baseline="base",
        compared_with={subject.name: "tuned" for subject in subjects["tuned"][1:]},
        seed=SEED,
    )


if __name__ == "__main__":
    main()
