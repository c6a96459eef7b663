"""Measures one variant on all its rows, and keeps the rows in files so that a stopped evaluation can continue.

Each row carries the hash of everything that it depends on besides its own content (`made` in the file): when the settings of
a variant change, only its rows are measured again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from corral.answering.answerer import Answerer
from corral.answering.build import build_answerer
from corral.answering.identity import AnswerIdentity
from corral.engines.base import Engine
from corral.engines.embedding import Embedder
from corral.errors import TemplateError
from corral.evaluation import tasks
from corral.evaluation.documents import join_windows
from corral.evaluation.evaluation_data import EvaluationData
from corral.evaluation.inference import (
    Item,
    RankedAnswers,
    Refusals,
    TextItem,
    add_refusals,
    compute_answer_logprobs,
    compute_losses,
    compute_option_logprobs,
    generate_answers,
)
from corral.evaluation.question_sets import Question
from corral.evaluation.row_file import RowFile, RowProducer
from corral.evaluation.scoring import PairSums, Row, VariantRows
from corral.evaluation.tasks import Task
from corral.messages import INPUT_HEADING, Conversation
from corral.progress import Progress
from corral.recipe import Answer
from corral.storage import write_json
from corral.template import Template

LOSSES, PREFERENCES, ANSWERS = "losses.jsonl", "preferences.jsonl", "completions.jsonl"
SECONDS, FACTS = "seconds.jsonl", "rows.json"


@dataclass(frozen=True, slots=True)
class VariantSpec:
    """A variant: a model behind an engine, and the settings for its answers.

    Attributes:
        name: its name in the scorecard.
        identity: what its answers to the run's own rows depend on; its settings and seed are those that are used.
        with_loss: whether to measure its held-out loss, and the log-probabilities of ranked answers; variants of one model
            differ in settings only and share these.
    """

    name: str
    identity: AnswerIdentity
    with_loss: bool = True

    @property
    def settings(self) -> Answer:
        """How answers are prompted, sampled and chosen."""
        assert self.identity.answer is not None, "a variant answers"
        return self.identity.answer

    def conditions(self, tasks: Sequence[Task]) -> dict[str, Any]:
        """What its rows depend on besides their content, as `AnswerIdentity.conditions`, with the limits of tasks."""
        limits = {task.name: {"max_tokens": task.max_tokens} for task in tasks if task.max_tokens is not None}
        return self.identity.conditions() | ({"tasks": limits} if limits else {})


@dataclass(frozen=True, slots=True)
class _RowSet:
    """The rows of one variant in one file; `name` says which they are."""

    name: str
    file: str
    producer: RowProducer
    ids: frozenset[str]


@dataclass
class Measurements:
    """The rows of all variants, in the files of one folder.

    Files: `losses.jsonl`, `preferences.jsonl` (log-probabilities of ranked answers), `completions.jsonl`, `tasks/NAME.jsonl`
    (answers), `tasks/NAME.options.jsonl` (log-probabilities of the options), `seconds.jsonl` (time spent on answers), and
    `rows.json` (what is known of rows without a model).

    Attributes:
        embed: embeds texts for similar examples and for votes by meaning; shared by all variants.
    """

    folder: Path
    embed: Embedder = field(default_factory=Embedder)
    _files: dict[str, RowFile] = field(default_factory=dict[str, RowFile])

    def row_file(self, name: str) -> RowFile:
        """One of the files; it is read once."""
        if name not in self._files:
            self._files[name] = RowFile(self.folder / name)
        return self._files[name]

    def reuse_rows(self, old: Path, variants: Sequence[VariantSpec], data: EvaluationData) -> None:
        """Copy from another folder the rows that these variants have there with the same settings."""
        for name, ids_by_producer in _ids_by_file(variants, data).items():
            self.row_file(name).reuse_rows(old / name, ids_by_producer)

    def finish(self, variants: Sequence[VariantSpec], data: EvaluationData) -> None:
        """Remove rows that were measured otherwise, as with another engine, before the evaluation was stopped; and write the
        size of each reference answer, and which rows share a passage. Raises: StorageError."""
        for name, ids_by_producer in _ids_by_file(variants, data).items():
            self.row_file(name).keep_rows(ids_by_producer)
        facts = {item.id: _facts(item) for item in (*data.loss_items, *data.answer_items)}
        facts |= {
            question.id: _conversation_facts(question.example) for task in data.tasks for question in task.questions
        }
        write_json(self.folder / FACTS, facts)

    def is_complete(self, variant: VariantSpec, data: EvaluationData) -> bool:
        """Whether a variant has all its rows."""
        return all(rows.ids <= self._finished(rows).keys() for rows in _row_sets(variant, data))

    async def measure(
        self, variant: VariantSpec, engine: Engine, template: Template, data: EvaluationData, progress: Progress
    ) -> None:
        """Measure the rows that a variant lacks.

        Rows that are refused, such as one that is too long, are finished with a reason.

        Raises:
            EngineError, TemplateError: the model cannot answer or score, or every row is refused.
            DataError, AssetError: the examples cannot be read.
            StorageError: a file cannot be written.
        """

        def answerer(settings: Answer, examples: Callable[[], Sequence[Conversation]]) -> Answerer:
            return build_answerer(
                engine, template, settings, examples=examples, seed=variant.identity.seed, embed=self.embed
            )

        async def measure_losses(rows: _RowSet, file: RowFile) -> Refusals:
            return await compute_losses(
                Answerer(engine, template), rows.producer, data.loss_items, file, progress.update
            )

        async def rank_answers(rows: _RowSet, file: RowFile) -> Refusals:
            return await compute_answer_logprobs(
                Answerer(engine, template), rows.producer, data.ranked_answers, file, progress.update
            )

        async def answer_rows(rows: _RowSet, file: RowFile) -> Refusals:
            asked = answerer(variant.settings, data.load_examples)
            return await self._answer_timed(asked, rows, data.answer_items, progress)

        async def answer_task(task: Task, rows: _RowSet, file: RowFile) -> Refusals:
            settings = _task_settings(variant.settings, task)
            if rows.file == _answers_file(task.name):
                asked = answerer(settings, partial(task.examples, reasoning=settings.reasoning))
                return await self._answer_timed(asked, rows, task_items(task), progress)
            asked = answerer(settings, task.option_examples)
            return await compute_option_logprobs(asked, rows.producer, task.questions, file, progress.update)

        own = zip(_own_row_sets(variant, data), (measure_losses, rank_answers, answer_rows), strict=True)
        parts: list[tuple[_RowSet, Callable[[_RowSet, RowFile], Awaitable[Refusals]]]] = list(own)
        parts += [(rows, partial(answer_task, task)) for task in data.tasks for rows in _task_rows(variant, task)]
        refused: list[tuple[_RowSet, Refusals]] = []
        for rows, measure in parts:
            if rows.ids:
                progress.start(f"Evaluating {variant.name}: {rows.name}", len(rows.ids))
                refused.append((rows, await measure(rows, self.row_file(rows.file))))
        self._settle_refusals(variant, [(rows, refusals) for rows, refusals in refused if refusals], len(refused))

    def _settle_refusals(self, variant: VariantSpec, refused: Sequence[tuple[_RowSet, Refusals]], sets: int) -> None:
        """Add the rows of sets of which every row was refused; raises the first refusal if these are all sets."""
        if refused and len(refused) == sets:
            rows, refusals = refused[0]
            error = next(iter(refusals.values()))
            place = f"variant {variant.name}, {rows.name}, all {len(refusals)} rows"
            raise type(error)(error.what, where=f"{place}: {error.where}" if error.where else place, hint=error.hint)
        for rows, refusals in refused:
            add_refusals(rows.producer, refusals, self.row_file(rows.file))

    def _finished(self, rows: _RowSet) -> Mapping[str, dict[str, Any]]:
        return self.row_file(rows.file).rows_of(rows.producer)

    async def _answer_timed(
        self, answerer: Answerer, rows: _RowSet, items: Sequence[Item], progress: Progress
    ) -> Refusals:
        """`generate_answers`; adds the time that the missing answers took to `seconds.jsonl`."""
        finished = self._finished(rows)
        finished_before = len(finished)
        missing = next((item for item in items if item.id not in finished), None)
        if missing is None:
            return {}
        # What is loaded and computed once is not part of the time of an answer.
        with contextlib.suppress(TemplateError):
            await answerer.encode_prompt(missing.conversation.split_answer()[0])
        if answerer.consensus is not None and answerer.consensus.method == "cosine":
            await asyncio.to_thread(self.embed, [""])
        started = time.perf_counter()
        try:
            return await generate_answers(answerer, rows.producer, items, self.row_file(rows.file), progress.update)
        finally:
            if added := len(self._finished(rows)) - finished_before:
                seconds = self.row_file(SECONDS)
                known = seconds.rows_of(rows.producer).get(rows.file, {"seconds": 0.0, "answers": 0})
                spent = known["seconds"] + time.perf_counter() - started
                seconds.add(rows.producer, rows.file, seconds=spent, answers=known["answers"] + added)

    def variant_rows(self, variant: str) -> VariantRows:
        """All rows of a variant, with the costs of its answers; the windows of a document are one row. Empty for a variant
        that was never measured here."""
        facts_file = self.folder / FACTS
        facts: dict[str, dict[str, Any]] = json.loads(facts_file.read_text("utf-8")) if facts_file.exists() else {}
        task_names = sorted({path.name.partition(".")[0] for path in (self.folder / "tasks").glob("*.jsonl")})
        info = self._answer_costs(ANSWERS, variant)
        task_rows: dict[str, list[Row]] = {}
        for task in task_names:
            files = (self.row_file(name) for name in (_answers_file(task), _options_file(task)))
            joined = tasks.join_rows(*(file.rows_of_variant(variant) for file in files))
            task_rows[task] = [replace(row, **facts.get(row.id, {})) for row in joined]
            costs = self._answer_costs(_answers_file(task), variant)
            info |= {f"{task}/{name}": value for name, value in costs.items()}
        losses, preferences, answers = (
            self.row_file(name).rows_of_variant(variant) for name in (LOSSES, PREFERENCES, ANSWERS)
        )
        rows: list[Row] = []
        for id_ in sorted(losses.keys() | preferences.keys() | answers.keys()):
            loss, ranks, answer = losses.get(id_, {}), preferences.get(id_, {}), answers.get(id_, {})
            sources = (("loss", loss), ("preferences", ranks), ("answers", answer))
            skipped = {source: row["skipped"] for source, row in sources if "skipped" in row}
            ranked = PairSums.of(ranks["logprobs"], ranks["tokens"], ranks["pairs"]) if "pairs" in ranks else None
            text = answer.get("reference"), answer.get("answer")
            known = {name: value for name, value in facts.get(id_, {}).items() if name != "document"}
            rows.append(Row(id_, loss.get("nll"), loss.get("tokens"), *text, ranked=ranked, skipped=skipped, **known))
        documents = {id_: fact["document"] for id_, fact in facts.items() if "document" in fact}
        return VariantRows(join_windows(rows, documents), info, task_rows)

    def _answer_costs(self, name: str, variant: str) -> dict[str, float]:
        """Tokens and seconds of the answers in a file. Tokens include those of examples and of all candidates; votes add the
        number of candidates and how many of them were cancelled.

        Where the time of some answers is missing, or covers more answers than these, it is scaled to their number.
        """
        rows = [row for row in self.row_file(name).rows_of_variant(variant).values() if "skipped" not in row]
        if not rows:
            return {}
        timed = self.row_file(SECONDS).rows_of_variant(variant).get(name)
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


def task_items(task: Task) -> list[Item]:
    """A task's questions as rows to answer."""

    def item(question: Question) -> Item:
        def grade(text: str) -> Mapping[str, Any]:
            return tasks.grade_answer(task.kind, question, text) or {"references": list(question.references)}

        return Item(question.id, question.example, grade)

    return [item(question) for question in task.questions]


def _row_sets(variant: VariantSpec, data: EvaluationData) -> list[_RowSet]:
    """All rows of a variant; those of the held-out loss or of the answers may be none."""
    task_rows = [rows for task in data.tasks for rows in _task_rows(variant, task)]
    return [*_own_row_sets(variant, data), *task_rows]


def _ids_by_file(
    variants: Sequence[VariantSpec], data: EvaluationData
) -> Mapping[str, Mapping[RowProducer, Collection[str]]]:
    """The ids of all rows of these variants in each file; in `seconds.jsonl` they are names of files."""
    ids: dict[str, dict[RowProducer, Collection[str]]] = {SECONDS: {}}
    for variant in variants:
        for rows in _row_sets(variant, data):
            ids.setdefault(rows.file, {})[rows.producer] = rows.ids
            ids[SECONDS][rows.producer] = (*ids[SECONDS].get(rows.producer, ()), rows.file)
    return ids


def _own_row_sets(variant: VariantSpec, data: EvaluationData) -> tuple[_RowSet, _RowSet, _RowSet]:
    """The run's own rows: for the held-out loss, with ranked answers, and to answer."""
    scored, answered = (
        RowProducer(variant.name, identity.digest) for identity in (variant.identity.scoring(), variant.identity)
    )
    losses, ranked = (data.loss_items, data.ranked_answers) if variant.with_loss else ((), ())
    return (
        _RowSet("held-out loss", LOSSES, scored, _ids(losses)),
        _RowSet("preferences", PREFERENCES, scored, _ids(ranked)),
        _RowSet("answers", ANSWERS, answered, _ids(data.answer_items)),
    )


def _task_rows(variant: VariantSpec, task: Task) -> list[_RowSet]:
    """Answers, and log-probabilities of the options where the settings allow them."""
    settings = _task_settings(variant.settings, task)
    # The examples are drawn from the questions that are not asked, so they depend on how many are asked.
    pool = "".join(question.id for question in task.example_pool) if settings.shots.count else ""
    identity = replace(variant.identity, answer=settings, examples=hashlib.sha256(pool.encode()).hexdigest())
    sets = [(task.name, _answers_file(task.name), identity)]
    if task.kind == "choice" and not settings.reasoning and settings.consensus.method == "none":
        # The options are given, so that of all settings only the examples before them have an effect.
        options = replace(identity, answer=Answer(shots=settings.shots))
        sets.append((f"{task.name}, options", _options_file(task.name), options))
    ids = _ids(task.questions)
    return [_RowSet(name, file, RowProducer(variant.name, each.digest), ids) for name, file, each in sets]


def _facts(item: Item | TextItem) -> dict[str, Any]:
    """`bytes` of the text that the loss is of; of a conversation its `passage`, which rows about the same passage or
    with the same prompt share; of a window of a document its `document` and `kind`."""
    if isinstance(item, TextItem):
        return {"bytes": item.scored_bytes, "document": item.document, "kind": "text"}
    facts = _conversation_facts(item.conversation)
    return facts | {"passage": item.group} if item.group else facts


def _conversation_facts(conversation: Conversation) -> dict[str, Any]:
    """`bytes` of the trained answers, and `passage`: the hash of the material that the first request is about."""
    answers = [m.content for m in conversation.messages if m.role == "assistant" and m.trained]
    requests = [m.content for m in conversation.messages if m.role == "user"]
    material = requests[0].partition(INPUT_HEADING)[2] if requests else ""
    passage = {"passage": hashlib.sha256(material.encode()).hexdigest()[:16]} if material else {}
    return {"bytes": sum(len(answer.encode()) for answer in answers), **passage}


def _ids(rows: Sequence[Item | TextItem] | Sequence[RankedAnswers] | Sequence[Question]) -> frozenset[str]:
    return frozenset(row.id for row in rows)


def _answers_file(task: str) -> str:
    return f"tasks/{task}.jsonl"


def _options_file(task: str) -> str:
    return f"tasks/{task}.options.jsonl"


def _task_settings(settings: Answer, task: Task) -> Answer:
    """A variant's settings for a task, which has its own limit of tokens and its own examples."""
    changes: dict[str, Any] = {} if task.max_tokens is None else {"max_tokens": task.max_tokens}
    if settings.shots.source is not None:
        changes["shots"] = settings.shots.model_copy(update={"source": None})
    return settings.model_copy(update=changes)
