"""Which prepared rows are evaluated, and how."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from corral.data.encoding import encode_record
from corral.data.example_store import Example, ExampleStore
from corral.errors import RecipeError
from corral.evaluation.evaluation_data import select_evaluation_data
from corral.evaluation.inference import Item, TextItem
from corral.messages import Conversation, Preference, Record, Text
from corral.recipe.evaluate import Evaluate
from corral.template import Encoded, Template
from tests.data.conftest import write_examples

SEQUENCE = Encoded((1, 2, 3), (False, True, True))


def conversation(number: int) -> Conversation:
    return Conversation.from_turns(("user", f"say {number}"), ("assistant", f"{number}"))


def store(folder: Path, *records: Record, places: Sequence[int] = ()) -> ExampleStore:
    """Rows of one source, at these places there."""
    rows = zip(places or range(len(records)), records, strict=True)
    return write_examples(folder / "test", [Example(f"{r!r}", "docs", place, (SEQUENCE,), r) for place, r in rows])


def ids(items: Sequence[Item | TextItem]) -> list[str]:
    return [item.id for item in items]


def test_the_first_rows_are_measured_and_the_first_conversations_are_answered(
    template: Template, tmp_path: Path
) -> None:
    test = store(tmp_path, *(Text(f"text {i}") for i in range(20)), *(conversation(i) for i in range(4)))
    data = select_evaluation_data(test, Evaluate(loss_rows=9, answer_rows=3), template)
    assert ids(data.loss_items) == [example.key for example in test[:9]]
    assert ids(data.answer_items) == [e.key for e in test if isinstance(e.record, Conversation)][:3]
    kinds = {Text: TextItem, Conversation: Item}
    assert [type(item) for item in data.loss_items] == [kinds[type(e.record)] for e in test[:9]]  # type: ignore[index]


def test_a_document_keeps_the_ids_that_training_uses_and_shares_its_name_with_its_other_windows(
    template: Template, tmp_path: Path
) -> None:
    records = [Text("the first part"), Text("the second"), Text(""), Text("another")]
    data = select_evaluation_data(store(tmp_path, *records, places=[7, 7, 7, 8]), Evaluate(), template)
    items = {item.content: item for item in data.loss_items if isinstance(item, TextItem)}
    assert items.keys() == {"the first part", "the second", "another"}, "an empty window has no bytes"
    assert all(item.encoded == SEQUENCE for item in items.values())
    assert items["the first part"].document == items["the second"].document != items["another"].document
    assert data.answer_items == []


def test_copies_are_measured_once_and_preferences_are_left_out(template: Template, tmp_path: Path) -> None:
    preference = Preference(Conversation.from_turns(("user", "why?")), "so", "no")
    test = store(tmp_path, conversation(1), conversation(1), preference, conversation(2))
    data = select_evaluation_data(test, Evaluate(loss_rows=2, answer_rows=2), template)
    assert set(ids(data.loss_items)) == {f"{conversation(i)!r}" for i in (1, 2)}
    assert ids(data.answer_items) == ids(data.loss_items)


def test_a_primary_metric_of_answers_is_refused_where_there_is_nothing_to_answer(
    template: Template, tmp_path: Path
) -> None:
    rouge = Evaluate(primary="rougeL")
    documents = store(tmp_path, Text("a document"))
    with pytest.raises(RecipeError, match="no test row is a conversation") as refused:
        select_evaluation_data(documents, rouge, template)
    assert "rougeL" in refused.value.what
    select_evaluation_data(
        documents, Evaluate.model_validate({"primary": "xsum/rougeL", "tasks": [{"name": "xsum"}]}), template
    )
    (tmp_path / "mixed").mkdir()
    select_evaluation_data(store(tmp_path / "mixed", Text("a document"), conversation(1)), rouge, template)


def test_the_bytes_of_a_documents_loss_are_those_of_the_tokens_that_are_predicted(
    template: Template, tmp_path: Path
) -> None:
    text = "The ship sailed on the wide sea, and we had bread and wine. Größe!"
    whole = encode_record(Text(text), template)[0]
    assert whole.trained[0], "the tiny tokenizer has no token to begin a document with"
    first = len(template.decode(whole.ids[:1]).encode())
    cut = 9
    start = template.decode(whole.ids[:cut])
    windows = [(start, slice(0, cut)), (text[len(start) :], slice(cut - 1, None))]
    examples = [
        Example(part, "docs", 1, (Encoded(whole.ids[at], (at.start == 0, *whole.trained[at][1:])),), Text(part))
        for part, at in windows
    ]
    one_token = Example("one", "docs", 2, (Encoded((whole.ids[0], whole.ids[-1]), (True, True)),), Text(text[:first]))
    data = select_evaluation_data(write_examples(tmp_path / "test", [*examples, one_token]), Evaluate(), template)
    sizes = {item.id: item.scored_bytes for item in data.loss_items if isinstance(item, TextItem)}
    assert sizes == {start: len(start.encode()) - first, windows[1][0]: len(windows[1][0].encode())}
