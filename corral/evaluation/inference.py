"""Answers and log-probabilities of one variant on rows that it never saw, kept as they come.

Each row is written to a JSONL file as soon as it is done, so an interrupted evaluation goes on where it was. This module
does not know which variants there are or how rows are scored.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corral.answering.answerer import Answerer
from corral.errors import CorralError
from corral.evaluation.question_sets import Question
from corral.messages import Conversation
from corral.storage import storage_errors

AT_ONCE = 64  # rows handed to the engine together; it batches as it sees fit


@dataclass(frozen=True, slots=True)
class Item:
    """A row to answer.

    Attributes:
        id: names its content.
        conversation: ends with the reference answer.
        judge: the answer's text → further fields of its finished row.
    """

    id: str
    conversation: Conversation
    judge: Callable[[str], Mapping[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class Maker:
    """Who made a row: the variant's name, and the hash of everything that the row depends on besides its own content."""

    variant: str
    made: str


class RowFile:
    """A JSONL file of finished rows, keyed by who made them and id; a half-written last line does not count."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[Maker, dict[str, dict[str, Any]]] = {}
        self._whole_bytes: int | None = None
        if path.exists():
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            self._whole_bytes = len(whole) if whole != data else None
            for line in whole.splitlines():
                self._keep(json.loads(line))

    def add(self, maker: Maker, id_: str, **fields: Any) -> None:
        """Keep a finished row. Raises: StorageError."""
        row = {"variant": maker.variant, "id": id_, **fields, "made": maker.made}
        self._append((json.dumps(row, ensure_ascii=False) + "\n").encode())
        self._keep(row)

    def of(self, maker: Maker) -> Mapping[str, dict[str, Any]]:
        """Finished rows of one maker, by id."""
        return self.rows.get(maker, {})

    def of_variant(self, variant: str) -> Mapping[str, dict[str, Any]]:
        """Finished rows of a variant, by id, whatever its settings were; the last ones count."""
        return {id_: row for maker, of in self.rows.items() if maker.variant == variant for id_, row in of.items()}

    def take_over(self, old: Path, wanted: Mapping[Maker, Collection[str]]) -> None:
        """Copy the lines of these makers and ids that are in another file and not yet in this one. Raises: StorageError."""
        if not old.is_file():
            return
        data = old.read_bytes()
        lines: list[bytes] = []
        for line in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
            row = json.loads(line)
            maker = Maker(row["variant"], row.get("made", ""))
            if row["id"] in wanted.get(maker, ()) and row["id"] not in self.of(maker):
                lines.append(line)
                self._keep(row)
        if lines:
            self._append(b"".join(lines))

    def _keep(self, row: dict[str, Any]) -> None:
        self.rows.setdefault(Maker(row["variant"], row.get("made", "")), {})[row["id"]] = row

    def _append(self, data: bytes) -> None:
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._whole_bytes is not None:
                os.truncate(self.path, self._whole_bytes)
                self._whole_bytes = None
            with self.path.open("ab") as file:
                file.write(data)


async def score_items(
    answerer: Answerer, maker: Maker, items: Sequence[Item], into: RowFile, on_done: Callable[[int], None]
) -> None:
    """Add `nll` and `tokens` for each item not yet in the file."""

    async def one(item: Item) -> None:
        score = await answerer.score(item.conversation)
        into.add(maker, item.id, nll=score.nll, tokens=score.tokens)
        on_done(len(into.of(maker)))

    await _each(items, maker, into, one)


async def answer_items(
    answerer: Answerer, maker: Maker, items: Sequence[Item], into: RowFile, on_done: Callable[[int], None]
) -> None:
    """Add an answer for each item not yet in: `prompt`, `reference`, `answer`, `finish`, `tokens` (of all candidates),
    `prompt_tokens` (with examples), `seconds`, those of `Answer.vote_fields`, and what the item's judge says."""

    async def one(item: Item) -> None:
        began = time.perf_counter()
        prompt, reference = item.conversation.split_answer()
        answer = await answerer.answer(prompt)
        into.add(
            maker,
            item.id,
            prompt=prompt.to_json()["messages"],
            reference=reference,
            answer=answer.text,
            finish=answer.finish,
            tokens=answer.completion_tokens,
            prompt_tokens=answer.prompt_tokens,
            seconds=round(time.perf_counter() - began, 3),
            **answer.vote_fields(),
            **(item.judge(answer.text) if item.judge else {}),
        )
        on_done(len(into.of(maker)))

    await _each(items, maker, into, one)


async def score_options(
    answerer: Answerer, maker: Maker, questions: Sequence[Question], into: RowFile, on_done: Callable[[int], None]
) -> None:
    """Add for each question not yet in: `logprobs`, natural, of each option's text as the answer to the question's stem (the
    end token not counted); their `bytes`; and `gold`, the place of the right one."""

    async def one(question: Question) -> None:
        stem = Conversation.from_turns(("user", question.stem))
        prompt = await answerer.encode_prompt(stem)
        logprobs = [await option_logprob(answerer, prompt, stem, option) for option in question.options]
        sizes = [len(option.encode()) for option in question.options]
        into.add(maker, question.id, logprobs=logprobs, bytes=sizes, gold=question.right_option)
        on_done(len(into.of(maker)))

    await _each(questions, maker, into, one)


async def option_logprob(answerer: Answerer, prompt: Sequence[int], stem: Conversation, option: str) -> float:
    """Natural log-probability of a text as the answer to `stem`, whose ids with all that is shown before it are `prompt`.

    Raises: EngineError (it cannot score, or the prompt is too long), TemplateError.
    """
    template = answerer.template
    encoded = template.encode(stem.add("assistant", option))
    # The ids of an answer do not depend on what stands before it.
    start = len(template.prompt(stem))
    answer = [
        id_
        for id_, trained in zip(encoded.ids[start:], encoded.trained[start:], strict=True)
        if trained and id_ not in template.stop_ids
    ]
    return sum(await answerer.engine.score([*prompt, *answer], len(prompt)))


async def _each(items: Sequence[Any], maker: Maker, into: RowFile, work: Callable[[Any], Any]) -> None:
    done = into.of(maker)
    limit = asyncio.Semaphore(AT_ONCE)

    async def limited(item: Any) -> None:
        async with limit:
            await work(item)

    missing = [item for item in items if item.id not in done]
    try:
        async with asyncio.TaskGroup() as group:
            for item in missing:
                group.create_task(limited(item))
    except* CorralError as errors:
        # Many rows fail alike; one error is what a person can read.
        raise _first(errors) from None


def _first(errors: BaseExceptionGroup[CorralError]) -> CorralError:
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
