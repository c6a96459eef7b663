"""Asks an Answerer for the losses, answers and option log-probabilities of rows, and adds each finished row to a file.

A row that the engine or the template refuses, such as one that is too long, is finished too: its field `skipped` says why. If
all rows of a file are refused, the fault may not be in the rows: then they are returned, and the caller decides.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from corral.answering.answerer import Answerer
from corral.data.encoding import encode_answer
from corral.errors import CorralError, RequestError, TemplateError, first_error
from corral.evaluation.question_sets import Question
from corral.evaluation.row_file import RowFile, RowProducer
from corral.messages import Conversation
from corral.template import Encoded

MAX_CONCURRENT_ROWS = 64  # rows handed to the engine together; the engine batches them


@dataclass(frozen=True, slots=True)
class Item:
    """A row to evaluate.

    Attributes:
        id: hash of its content.
        conversation: ends with the reference answer.
        grade: the answer's text → more fields of the finished row.
        group: names what it shares with rows that are not independent of it, as the prompt; empty if there are none.
    """

    id: str
    conversation: Conversation
    grade: Callable[[str], Mapping[str, Any]] | None = None
    group: str = ""


@dataclass(frozen=True, slots=True)
class TextItem:
    """A document, or a window of one, whose loss is measured.

    Attributes:
        id: names the window; the same in every variant.
        content: the text.
        encoded: its ids, and which of them are trained.
        scored_bytes: of its content in UTF-8, those that the loss is of.
        document: the key of the document, if all of its windows are measured, else a name for those that are.
    """

    id: str
    content: str
    encoded: Encoded
    scored_bytes: int
    document: str


@dataclass(frozen=True, slots=True)
class RankedAnswers:
    """Answers to one prompt, some of which are better than others.

    Attributes:
        id: hash of its content.
        answers: all different.
        pairs: (better, worse), as indices of answers.
    """

    id: str
    prompt: Conversation
    answers: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]


Refusals: TypeAlias = Mapping[str, RequestError | TemplateError]
"""Why rows could not be measured, by id."""
_RowType = TypeVar("_RowType", Item, Item | TextItem, RankedAnswers, Question)
Progressed = Callable[[int], None]
"""Called after each row with how many rows the file has."""


async def compute_losses(
    answerer: Answerer, producer: RowProducer, items: Sequence[Item | TextItem], file: RowFile, on_done: Progressed
) -> Refusals:
    """Add `nll` and `tokens` for each item that is not yet in the file. Returns the refusals, if all rows were refused."""

    async def add_loss(item: Item | TextItem) -> None:
        if isinstance(item, TextItem):
            score = await answerer.score_encoded(item.encoded)
        else:
            score = await answerer.score(item.conversation)
        file.add(producer, item.id, nll=score.nll, tokens=score.tokens)

    return await _for_missing(items, producer, file, add_loss, on_done)


async def compute_answer_logprobs(
    answerer: Answerer, producer: RowProducer, items: Sequence[RankedAnswers], file: RowFile, on_done: Progressed
) -> Refusals:
    """Add the log-probabilities of the answers of each item that is not yet in the file. Returns the refusals, if all rows
    were refused.

    Fields: `logprobs`, natural, summed over the trained tokens of each of `RankedAnswers.answers`; `tokens`, how many these
    are; `pairs`.
    """

    async def add_logprobs(item: RankedAnswers) -> None:
        encoded = [encode_answer(item.prompt, answer, answerer.template) for answer in item.answers]
        scores = [await answerer.score_encoded(each) for each in encoded]
        file.add(
            producer,
            item.id,
            logprobs=[-score.nll for score in scores],
            tokens=[score.tokens for score in scores],
            pairs=item.pairs,
        )

    return await _for_missing(items, producer, file, add_logprobs, on_done)


async def generate_answers(
    answerer: Answerer, producer: RowProducer, items: Sequence[Item], file: RowFile, on_done: Progressed
) -> Refusals:
    """Add an answer for each item that is not yet in the file. Returns the refusals, if all rows were refused.

    Fields: `prompt`, `reference`, `answer`, `finish`, `tokens` (of all candidates), `prompt_tokens` (with examples),
    `seconds`, those of `Answer.vote_fields`, and what `Item.grade` returns.
    """

    async def add_answer(item: Item) -> None:
        started = time.perf_counter()
        prompt, reference = item.conversation.split_answer()
        answer = await answerer.answer(prompt, answerer.sampling.for_row(item.id))
        file.add(
            producer,
            item.id,
            prompt=prompt.to_json()["messages"],
            reference=reference,
            answer=answer.text,
            finish=answer.finish,
            tokens=answer.completion_tokens,
            prompt_tokens=answer.prompt_tokens,
            seconds=round(time.perf_counter() - started, 3),
            **answer.vote_fields(),
            **(item.grade(answer.text) if item.grade else {}),
        )

    return await _for_missing(items, producer, file, add_answer, on_done)


async def compute_option_logprobs(
    answerer: Answerer, producer: RowProducer, questions: Sequence[Question], file: RowFile, on_done: Progressed
) -> Refusals:
    """Add the log-probabilities of the options of each question that is not yet in the file. Returns the refusals, if all rows
    were refused.

    Fields: `logprobs`, natural, of each option's text as the answer to the question's stem, without the end token;
    `bytes`, the length of each option's text; `gold`, the index of the correct option.
    """

    async def add_logprobs(question: Question) -> None:
        stem = Conversation.from_turns(("user", question.stem))
        prompt = (await answerer.encode_prompt(stem)).ids
        logprobs = [await option_logprob(answerer, prompt, stem, option) for option in question.options]
        lengths = [len(option.encode()) for option in question.options]
        file.add(producer, question.id, logprobs=logprobs, bytes=lengths, gold=question.correct_option)

    return await _for_missing(questions, producer, file, add_logprobs, on_done)


async def option_logprob(answerer: Answerer, prompt: Sequence[int], stem: Conversation, option: str) -> float:
    """Natural log-probability of a text as the answer to `stem`.

    Args:
        prompt: the token ids of `stem` with everything that is shown before it.

    Raises: EngineError (the engine cannot score, or the prompt is too long), TemplateError.
    """
    template = answerer.template
    encoded = template.encode(stem.add("assistant", option))
    # The ids of an answer do not depend on what precedes them.
    start = len(template.prompt(stem))
    answer = [
        id_
        for id_, trained in zip(encoded.ids[start:], encoded.trained[start:], strict=True)
        if trained and id_ not in template.stop_ids
    ]
    return sum(await answerer.engine.score([*prompt, *answer], len(prompt)))


async def _for_missing(
    rows: Sequence[_RowType],
    producer: RowProducer,
    file: RowFile,
    process: Callable[[_RowType], Awaitable[None]],
    on_done: Progressed,
) -> Refusals:
    """Process the rows that are not yet in the file, several at a time; raises the first error of several.

    Rows that are refused are added last if some row was processed, else returned.
    """
    limit = asyncio.Semaphore(MAX_CONCURRENT_ROWS)
    refusals: dict[str, RequestError | TemplateError] = {}

    async def process_limited(row: _RowType) -> None:
        async with limit:
            try:
                await process(row)
            except (RequestError, TemplateError) as error:
                refusals[row.id] = error
            on_done(len(file.rows_of(producer)) + len(refusals))

    finished = file.rows_of(producer)
    missing = [row for row in rows if row.id not in finished]
    try:
        async with asyncio.TaskGroup() as group:
            for row in missing:
                group.create_task(process_limited(row))
    except* CorralError as errors:
        raise first_error(errors) from None
    if not file.rows_of(producer):
        return refusals
    add_refusals(producer, refusals, file)
    return {}


def add_refusals(producer: RowProducer, refusals: Refusals, file: RowFile) -> None:
    """Add rows that could not be measured. Raises: StorageError."""
    for id_, refusal in refusals.items():
        file.add(producer, id_, skipped=refusal.what)
