"""What variants are measured on: test rows for the loss, ranked answers, conversations to answer, and public questions."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product

from corral.data.encoding import count_scored_bytes
from corral.data.example_store import ExampleStore
from corral.errors import DataError, RecipeError
from corral.evaluation.inference import Item, RankedAnswers, TextItem
from corral.evaluation.ranked_answers import (
    GOOD_SCORE,
    count_ranked_prompts,
    first_of_groups,
    good_answers,
    select_ranked_answers,
)
from corral.evaluation.tasks import Task
from corral.messages import Conversation, Feedback, Text
from corral.recipe.evaluate import ANSWER_METRICS, PREFERENCE_METRICS, Evaluate
from corral.template import Template

_DOCUMENTS = 20
"""Of a document at most one part in so many of the rows is measured, as long as there are windows of others."""


@dataclass(frozen=True)
class EvaluationData:
    """What variants are measured on.

    Attributes:
        loss_items: rows for the held-out loss.
        ranked_answers: answers to one prompt each, some of which are better than others.
        answer_items: rows to answer.
        tasks: public questions.
        load_examples: reads answered conversations for few-shot prompting on `answer_items`; called when a variant needs them.
    """

    loss_items: Sequence[Item | TextItem] = ()
    ranked_answers: Sequence[RankedAnswers] = ()
    answer_items: Sequence[Item] = ()
    tasks: Sequence[Task] = ()
    load_examples: Callable[[], Sequence[Conversation]] = tuple


def select_evaluation_data(
    test: ExampleStore,
    evaluate: Evaluate,
    template: Template,
    tasks: Sequence[Task] = (),
    load_examples: Callable[[], Sequence[Conversation]] = tuple,
) -> EvaluationData:
    """As many test rows as the recipe wants: conversations and documents for the loss, conversations to answer, and prompts
    with ranked answers.

    They are the first conversations and prompts, and windows of documents as `_windows` orders them. Copies are measured once.
    Where there is nothing else, the good ones of the ranked answers stand for conversations: in the loss, and, one to each
    prompt, as reference answers.

    Args:
        test: prepared rows; a document that was cut is one row for each window.
        template: encoded them.
        tasks, load_examples: as in `EvaluationData`.

    Raises:
        RecipeError: `evaluate.primary` is a metric of answers, and there is nothing to answer; or of preferences, and no
            answers are ranked.
        DataError: `evaluate.test` has no row that can be measured.
    """
    if evaluate.test is not None:
        check_test_sources(test, [evaluate.test.label])
    losses = list(islice(_loss_items(test, evaluate.loss_rows, template), evaluate.loss_rows))
    ranked = select_ranked_answers(test, evaluate.loss_rows)
    answers = list(islice(_answer_items(test), evaluate.answer_rows))
    for metrics, rows, missing in (
        (ANSWER_METRICS, answers, "is a metric of answers, and no test row is a conversation to answer"),
        (PREFERENCE_METRICS, ranked, "is a metric of preferences, and no test rows rank the answers to a prompt"),
    ):
        if not rows and evaluate.primary in metrics:
            raise RecipeError(
                f'`evaluate.primary` = "{evaluate.primary}" {missing}',
                where="[evaluate]",
                hint='choose `primary = "loss"`, or a metric of a task',
            )
    return EvaluationData(_name_parts(losses, test), ranked, answers, tasks, load_examples)


def describe_left_out(test: ExampleStore, data: EvaluationData) -> str | None:
    """Which share of the rows that could be measured is, in a sentence; None if all are."""
    losses = answers = len({key for _, key in test.select(types=(Conversation,)).key_pairs()})
    losses += len(set(test.select(types=(Text,)).key_pairs()))
    if not answers:
        answers = sum(1 for _ in _answer_items(test))
    if not losses:
        losses = sum(1 for _ in good_answers(test))
    parts = [
        f"{len(items):,} of {count:,} {rows} (`evaluate.{setting}`)"
        for items, count, rows, setting in (
            (data.loss_items, losses, "different test rows have a loss", "loss_rows"),
            (data.ranked_answers, count_ranked_prompts(test), "prompts have their answers ranked", "loss_rows"),
            (data.answer_items, answers, "are answered", "answer_rows"),
        )
        if len(items) < count
    ]
    return ", ".join(parts) or None


def check_test_sources(test: ExampleStore, labels: Iterable[str]) -> None:
    """Raises DataError if a source that is for the test side has test rows, and none of them can be measured."""
    for label in labels:
        rows = test.select([label])
        if not len(rows) or not rows.is_of(Feedback).all():
            continue
        if next(good_answers(rows), None) is None and not count_ranked_prompts(rows):
            raise DataError(
                f"no row of the source {label!r} can be evaluated on: no answer has a score of at least {GOOD_SCORE}, and no "
                "two answers to one prompt have different scores",
                where=label,
                hint="evaluate on rows that say which answers are good; the others can be trained on",
            )


def _answer_items(test: ExampleStore) -> Iterator[Item]:
    """Conversations; where there are none, each prompt whose answers are ranked or scored, with a good answer."""
    return _conversations(test) if test.is_of(Conversation).any() else first_of_groups(good_answers(test))


def _conversations(test: ExampleStore) -> Iterator[Item]:
    """The conversations in their order, without copies."""
    seen: set[str] = set()
    for example in test.select(types=(Conversation,)):
        if example.key not in seen and isinstance(example.record, Conversation):
            seen.add(example.key)
            yield Item(example.key, example.record)


def _loss_items(test: ExampleStore, count: int, template: Template) -> Iterator[Item | TextItem]:
    """Conversations in their order, and as many windows of documents among them as the rows have; else good answers."""
    if not (test.is_of(Conversation) | test.is_of(Text)).any():
        yield from good_answers(test)
    conversations, windows = _conversations(test), _windows(test, count, template)
    for is_text in test.is_of(Text).tolist():
        item = next(windows if is_text else conversations, None)
        if item is not None:
            yield item


def _windows(test: ExampleStore, count: int, template: Template) -> Iterator[TextItem]:
    """Windows of documents, without copies, in an order that prefers many documents, and whole ones.

    Documents are in the order of their keys, so that runs with other tokenizers or windows measure the same ones. Of a long
    document a part comes first, and the others when all documents have had their turn.
    """
    texts = test.select(types=(Text,))
    by_document: dict[str, dict[str, int]] = {}
    for number, (document, key) in enumerate(texts.key_pairs()):
        by_document.setdefault(document, {}).setdefault(key, number)
    longest = max(map(len, by_document.values()), default=0)
    part = -(-count // _DOCUMENTS)
    for start, document in product(range(0, longest, part), sorted(by_document)):
        windows = by_document[document]
        for key, number in islice(windows.items(), start, start + part):
            example = texts[number]
            assert isinstance(example.record, Text)
            content, sequence = example.record.content, example.sequences[0]
            # Windows of different documents may have the same text.
            id_ = key if len(windows) == 1 else _hash(document, key)
            yield TextItem(id_, content, sequence, count_scored_bytes(content, sequence, template), document)


def _name_parts(items: Sequence[Item | TextItem], test: ExampleStore) -> list[Item | TextItem]:
    """The items; a document of which not all windows are among them is named after those that are."""
    windows = Counter(document for document, _ in set(test.select(types=(Text,)).key_pairs()))
    measured: dict[str, list[str]] = {}
    for item in items:
        if isinstance(item, TextItem):
            measured.setdefault(item.document, []).append(item.id)
    names = {key: _hash(key, *sorted(ids)) for key, ids in measured.items() if len(ids) < windows[key]}
    return [
        replace(item, document=names[item.document]) if isinstance(item, TextItem) and item.document in names else item
        for item in items
    ]


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
