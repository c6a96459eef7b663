"""What variants are measured on: test rows for the loss, conversations to answer, and public questions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from corral.data.encoding import count_scored_bytes
from corral.data.example_store import Example, ExampleStore
from corral.errors import RecipeError
from corral.evaluation.inference import Item, TextItem
from corral.evaluation.tasks import Task
from corral.messages import Conversation, Record, Text
from corral.recipe.evaluate import ANSWER_METRICS, Evaluate
from corral.template import Template


@dataclass(frozen=True)
class EvaluationData:
    """What variants are measured on.

    Attributes:
        loss_items: rows for the held-out loss.
        answer_items: rows to answer.
        tasks: public questions.
        load_examples: reads answered conversations for few-shot prompting on `answer_items`; called when a variant needs them.
    """

    loss_items: Sequence[Item | TextItem] = ()
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
    """The first test rows, as many as the recipe wants: conversations and documents for the loss, conversations to answer.

    Of copies the first one is measured.

    Args:
        test: prepared rows; a document that was cut is one row for each window.
        template: encoded them.
        tasks, load_examples: as in `EvaluationData`.

    Raises: RecipeError (`evaluate.primary` is a metric of answers, and there is nothing to answer).
    """
    losses = _first_items(test, (Conversation, Text), evaluate.loss_rows, template)
    chats = _first_items(test, (Conversation,), evaluate.answer_rows, template)
    answers = [item for item in chats if not isinstance(item, TextItem)]
    if not answers and evaluate.primary in ANSWER_METRICS:
        raise RecipeError(
            f'`evaluate.primary` = "{evaluate.primary}" is a metric of answers, and no test row is a conversation to answer',
            where="[evaluate]",
            hint='choose `primary = "loss"`, or a metric of a task',
        )
    return EvaluationData(losses, answers, tasks, load_examples)


def _first_items(
    test: ExampleStore, types: Collection[type[Record]], count: int, template: Template
) -> list[Item | TextItem]:
    """The first rows of these types, without copies."""
    items: dict[str, Item | TextItem] = {}
    for example in test.select(types=types):
        if len(items) == count:
            break
        if (item := _item(example, template)) is not None:
            items.setdefault(item.id, item)
    return list(items.values())


def _item(example: Example, template: Template) -> Item | TextItem | None:
    """The row to evaluate, if it is a conversation or a document."""
    match example.record:
        case Conversation():
            return Item(example.key, example.record)
        case Text(content):
            sequence = example.sequences[0]
            # The last window of a document may hold nothing but the end token.
            if not (scored_bytes := count_scored_bytes(content, sequence, template)):
                return None
            # Windows of one document come from the same place.
            place = hashlib.sha256(f"{example.source}\n{example.index}".encode()).hexdigest()
            return TextItem(example.key, content, sequence, scored_bytes, place[:16])
        case _:
            return None
