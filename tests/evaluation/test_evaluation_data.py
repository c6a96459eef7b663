"""Which prepared rows are evaluated, and how."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from corral.data.example_store import Example
from corral.errors import RecipeError
from corral.evaluation.evaluation_data import select_evaluation_data
from corral.evaluation.inference import Item, TextItem
from corral.messages import Conversation, Preference, Record, Text
from corral.recipe.evaluate import Evaluate
from corral.template import Encoded

SEQUENCE = Encoded((1, 2, 3), (False, True, True))


def conversation(number: int) -> Conversation:
    return Conversation.from_turns(("user", f"say {number}"), ("assistant", f"{number}"))


def examples(*records: Record, index: int | None = None) -> list[Example]:
    return [
        Example(f"{record!r}", "docs", i if index is None else index, (SEQUENCE,), record)
        for i, record in enumerate(records)
    ]


def ids(items: Sequence[Item | TextItem]) -> list[str]:
    return [item.id for item in items]


def test_the_first_rows_are_measured_and_conversations_alone_are_answered() -> None:
    texts, questions = [Text(f"text {i}") for i in range(4)], [conversation(i) for i in range(4)]
    mixed = [record for pair in zip(texts, questions, strict=True) for record in pair]
    data = select_evaluation_data(examples(*mixed), Evaluate(loss_rows=3, answer_rows=3))
    assert ids(data.loss_items) == [f"{record!r}" for record in mixed[:3]]
    assert ids(data.answer_items) == [f"{record!r}" for record in questions[:3]]
    assert [type(item) for item in data.loss_items] == [TextItem, Item, TextItem]


def test_a_document_keeps_the_ids_that_training_uses_and_shares_its_name_with_its_other_windows() -> None:
    windows = examples(Text("the first part"), Text("the second"), Text(""), index=7)
    data = select_evaluation_data([*windows, *examples(Text("another"))], Evaluate())
    first, second, other = data.loss_items
    assert isinstance(first, TextItem)
    assert isinstance(second, TextItem)
    assert isinstance(other, TextItem)
    assert (first.content, first.encoded) == ("the first part", SEQUENCE)
    assert first.document == second.document != other.document
    assert data.answer_items == []


def test_copies_are_measured_once_and_preferences_are_left_out() -> None:
    prompt = Conversation.from_turns(("user", "why?"))
    rows = examples(conversation(1), conversation(1), Preference(prompt, "so", "no"), conversation(2))
    data = select_evaluation_data(rows, Evaluate(loss_rows=2, answer_rows=2))
    expected = [f"{conversation(i)!r}" for i in (1, 2)]
    assert (ids(data.loss_items), ids(data.answer_items)) == (expected, expected)


def test_a_primary_metric_of_answers_is_refused_where_there_is_nothing_to_answer() -> None:
    rows, rouge = examples(Text("a document")), Evaluate(primary="rougeL")
    with pytest.raises(RecipeError, match="no test row is a conversation") as refused:
        select_evaluation_data(rows, rouge)
    assert "rougeL" in refused.value.what
    select_evaluation_data([*rows, *examples(conversation(1))], rouge)
    select_evaluation_data(rows, Evaluate.model_validate({"primary": "xsum/rougeL", "tasks": [{"name": "xsum"}]}))
