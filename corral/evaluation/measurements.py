"""One variant measured on everything it is to be measured on, into files that let it go on where it was stopped.

A row carries the hash of all that it depends on besides its own content (`made`): a variant whose settings change is measured
anew, the others are not. Knows nothing about runs, recipes as a whole or where models lie.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import corral
from corral.answering.answerer import Answerer
from corral.answering.build import build_answerer
from corral.engines.base import Engine
from corral.engines.embedding import Embedder
from corral.evaluation import tasks
from corral.evaluation.inference import Item, Maker, RowFile, answer_items, score_items, score_options
from corral.evaluation.question_sets import Question
from corral.evaluation.scoring import Row, VariantRows
from corral.evaluation.tasks import Task
from corral.messages import Conversation
from corral.progress import Progress
from corral.recipe import Answer
from corral.template import Template

LOSSES, ANSWERS, SECONDS = "losses.jsonl", "completions.jsonl", "seconds.jsonl"


@dataclass(frozen=True, slots=True)
class Subject:
    """A variant: a model behind an engine, asked in one way.

    Attributes:
        name: what the scorecard calls it.
        model: hash of the weights, the template, the engine and its precision.
        settings: how answers are asked for, drawn and chosen.
        seed: of all sampling, and of the choice of examples.
        loss: whether its held-out loss is to be measured: that of a variant that is only asked in another way is its
            model's.
        examples: hash of the rows of `settings.shots.source`, if examples are taken of them.
    """

    name: str
    model: str
    settings: Answer
    seed: int
    loss: bool = True
    examples: str = ""


@dataclass(frozen=True)
class Material:
    """What variants are measured on.

    Attributes:
        to_score: rows for the held-out loss.
        to_answer: rows to answer.
        tasks: public questions.
        examples: answered conversations for few-shot prompting on `to_answer`; read when a variant wants them.
        examples_from: hash of where those come from.
    """

    to_score: Sequence[Item] = ()
    to_answer: Sequence[Item] = ()
    tasks: Sequence[Task] = ()
    examples: Callable[[], Sequence[Conversation]] = tuple
    examples_from: str = ""


@dataclass(frozen=True, slots=True)
class _Part:
    """One thing that a variant is measured by: its file, and the rows it comes to."""

    file: str
    maker: Maker
    ids: frozenset[str]


@dataclass
class Measurements:
    """The rows of all variants, in the files of one folder.

    Files: `losses.jsonl`, `completions.jsonl`, `tasks/NAME.jsonl` (answers), `tasks/NAME.options.jsonl` (log-probabilities of
    the options), and `seconds.jsonl` (time spent on answers).

    Attributes:
        embed: finds similar examples and votes by meaning, for all variants.
    """

    folder: Path
    embed: Embedder = field(default_factory=Embedder)
    _files: dict[str, RowFile] = field(default_factory=dict[str, RowFile])

    def file(self, name: str) -> RowFile:
        """One of the files, read once."""
        if name not in self._files:
            self._files[name] = RowFile(self.folder / name)
        return self._files[name]

    def take_over(self, old: Path, subjects: Sequence[Subject], material: Material) -> None:
        """Copy from another folder what these variants made there of the same rows with the same settings."""
        wanted: dict[str, dict[Maker, Collection[str]]] = {SECONDS: {}}
        for subject in subjects:
            for part in _parts(subject, material):
                wanted.setdefault(part.file, {})[part.maker] = part.ids
                wanted[SECONDS][part.maker] = (part.file,)
        for name, of_file in wanted.items():
            self.file(name).take_over(old / name, of_file)

    def complete(self, subject: Subject, material: Material) -> bool:
        """Whether nothing of a variant is missing."""
        return all(part.ids <= self.file(part.file).of(part.maker).keys() for part in _parts(subject, material))

    async def measure(
        self, subject: Subject, engine: Engine, template: Template, material: Material, progress: Progress
    ) -> None:
        """Fill in what is missing of a variant.

        Raises:
            EngineError, TemplateError: it cannot be asked, or fails.
            DataError, AssetError: its examples cannot be had.
            StorageError: a file cannot be written.
        """
        losses, answers, *of_tasks = _parts(subject, material)
        if subject.loss and material.to_score:
            progress.start(f"Evaluating {subject.name}: held-out loss", len(material.to_score))
            plain = Answerer(engine, template)
            await score_items(plain, losses.maker, material.to_score, self.file(losses.file), progress.update)
        if material.to_answer:
            progress.start(f"Evaluating {subject.name}: answers", len(material.to_answer))
            answerer = self._answerer(subject, engine, template, subject.settings, material.examples)
            await self._answers(answerer, answers, material.to_answer, progress)
        for task in material.tasks:
            for part in [part for part in of_tasks if part.file.startswith(f"tasks/{task.name}.")]:
                await self._task(subject, engine, template, task, part, progress)

    async def _task(
        self, subject: Subject, engine: Engine, template: Template, task: Task, part: _Part, progress: Progress
    ) -> None:
        settings = _of_task(subject.settings, task)
        progress.start(f"Evaluating {subject.name}: {task.name}", len(part.ids))
        if part.file == _answers_of(task):

            def examples() -> Sequence[Conversation]:
                return task.examples(reasoning=settings.reasoning)

            answerer = self._answerer(subject, engine, template, settings, examples)
            await self._answers(answerer, part, items_of(task), progress)
        else:
            answerer = self._answerer(subject, engine, template, settings, lambda: task.examples_of_options)
            await score_options(answerer, part.maker, task.questions, self.file(part.file), progress.update)

    def _answerer(
        self,
        subject: Subject,
        engine: Engine,
        template: Template,
        settings: Answer,
        examples: Callable[[], Sequence[Conversation]],
    ) -> Answerer:
        return build_answerer(engine, template, settings, examples=examples, seed=subject.seed, embed=self.embed)

    async def _answers(self, answerer: Answerer, part: _Part, items: Sequence[Item], progress: Progress) -> None:
        into, seconds = self.file(part.file), self.file(SECONDS)
        before = len(into.of(part.maker))
        missing = next((item for item in items if item.id not in into.of(part.maker)), None)
        if missing is None:
            return
        # What is loaded and computed once is no part of what an answer takes.
        await answerer.encode_prompt(missing.conversation.split_answer()[0])
        if answerer.consensus is not None and answerer.consensus.method == "cosine":
            await asyncio.to_thread(self.embed, [""])
        began = time.perf_counter()
        try:
            await answer_items(answerer, part.maker, items, into, progress.update)
        finally:
            if done := len(into.of(part.maker)) - before:
                known = seconds.of(part.maker).get(part.file, {"seconds": 0.0, "answers": 0})
                spent = known["seconds"] + time.perf_counter() - began
                seconds.add(part.maker, part.file, seconds=spent, answers=known["answers"] + done)

    def rows_of(self, variant: str) -> VariantRows:
        """All rows of a variant, with what its answers took. Empty for one that was never measured here."""
        answers = self.file(ANSWERS).of_variant(variant)
        found = {task: self._task_rows(task, variant) for task in self.tasks()}
        info = self._info(ANSWERS, variant)
        for task in found:
            info |= {f"{task}/{name}": value for name, value in self._info(f"tasks/{task}.jsonl", variant).items()}
        losses = self.file(LOSSES).of_variant(variant)
        rows: list[Row] = []
        for id_ in sorted(losses.keys() | answers.keys()):
            loss, answer = losses.get(id_, {}), answers.get(id_, {})
            rows.append(Row(id_, loss.get("nll"), loss.get("tokens"), answer.get("reference"), answer.get("answer")))
        return VariantRows(rows, info, found)

    def tasks(self) -> list[str]:
        """The names of the tasks that there are rows of."""
        return sorted({path.name.partition(".")[0] for path in (self.folder / "tasks").glob("*.jsonl")})

    def _task_rows(self, task: str, variant: str) -> list[Row]:
        answers, options = (self.file(f"tasks/{task}{end}").of_variant(variant) for end in (".jsonl", ".options.jsonl"))
        return tasks.rows(answers, options)

    def _info(self, name: str, variant: str) -> dict[str, float]:
        """What the answers in a file took: tokens (of examples and of all candidates too) and seconds; of votes also the
        candidates, and how many of them were not needed.

        Where some were made by a process that was killed, or others were made with them, their part of the time is that of
        the rest.
        """
        rows = self.file(name).of_variant(variant).values()
        if not rows:
            return {}
        timed = self.file(SECONDS).of_variant(variant).get(name)
        seconds: float = timed["seconds"] / timed["answers"] * len(rows) if timed else 0.0
        tokens = sum(row["tokens"] for row in rows)
        finishes = [finish for row in rows for finish in row.get("finishes", ())]
        return {
            "answers": len(rows),
            "prompt_tokens": sum(row["prompt_tokens"] for row in rows),
            "answer_tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds if seconds else 0.0,
            "answers_per_second": len(rows) / seconds if seconds else 0.0,
        } | ({"candidates": len(finishes), "cancelled": finishes.count("cancelled")} if finishes else {})


def items_of(task: Task) -> list[Item]:
    """A task's questions as rows to answer."""

    def item(question: Question) -> Item:
        def judged(text: str) -> Mapping[str, Any]:
            return tasks.judge(task.kind, question, text) or {"references": list(question.references)}

        return Item(question.id, question.example, judged)

    return [item(question) for question in task.questions]


def _parts(subject: Subject, material: Material) -> list[_Part]:
    """Held-out loss and answers, which may come to no rows; then what there is of each task."""
    settings, examples = subject.settings, material.examples_from
    parts = [
        _Part(LOSSES, _maker(subject, "loss"), _ids(material.to_score if subject.loss else ())),
        _Part(ANSWERS, _maker(subject, "answers", settings, examples), _ids(material.to_answer)),
    ]
    for task in material.tasks:
        of_task = _of_task(settings, task)
        # The questions asked are not among the examples: how many are asked changes those.
        others = [question.id for question in task.others] if settings.shots.count else []
        rest = hashlib.sha256("".join(others).encode()).hexdigest()
        parts.append(_Part(_answers_of(task), _maker(subject, task.name, of_task, rest), _ids(task.questions)))
        if task.kind == "choice" and not settings.reasoning and settings.consensus.method == "none":
            maker = _maker(subject, f"{task.name} options", of_task, rest)
            parts.append(_Part(f"tasks/{task.name}.options.jsonl", maker, _ids(task.questions)))
    return parts


def _ids(rows: Sequence[Item] | Sequence[Question]) -> frozenset[str]:
    return frozenset(row.id for row in rows)


def _answers_of(task: Task) -> str:
    return f"tasks/{task.name}.jsonl"


def _of_task(settings: Answer, task: Task) -> Answer:
    """How a task is asked: with examples of its own, whatever the others are shown."""
    changes: dict[str, Any] = {} if task.max_tokens is None else {"max_tokens": task.max_tokens}
    if settings.shots.source is not None:
        changes["shots"] = settings.shots.model_copy(update={"source": None})
    return settings.model_copy(update=changes)


def _maker(subject: Subject, what: str, settings: Answer | None = None, examples: str = "") -> Maker:
    depends: list[Any] = [corral.__version__, subject.model, what]
    if settings is not None:
        depends += [settings.model_dump(mode="json"), subject.seed]
        if settings.shots.count:
            depends.append(examples if settings.shots.source is None else subject.examples)
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
    return Maker(subject.name, digest[:16])
