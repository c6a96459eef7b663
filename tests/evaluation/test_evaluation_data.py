"""Which prepared rows are evaluated, and how."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from corral.data.encoding import encode_record
from corral.data.example_store import Example, ExampleStore
from corral.data.prepare import prepare
from corral.errors import DataError, RecipeError
from corral.evaluation.evaluation_data import describe_left_out, select_evaluation_data
from corral.evaluation.inference import Item, TextItem
from corral.messages import Conversation, Feedback, Preference, Record, Text
from corral.recipe import Data, Source, Split
from corral.recipe.evaluate import Evaluate
from corral.template import Encoded, Template
from tests.data.conftest import chats, prose, source, write_examples, write_rows

SEQUENCE = Encoded((1, 2, 3), (False, True, True))


def conversation(number: int) -> Conversation:
    return Conversation.from_turns(("user", f"say {number}"), ("assistant", f"{number}"))


def store(folder: Path, *records: Record, places: Sequence[int] = ()) -> ExampleStore:
    """Rows of one source, at these places there."""
    rows = zip(places or range(len(records)), records, strict=True)
    return write_examples(folder / "test", [Example(f"{r!r}", "docs", place, (SEQUENCE,), r) for place, r in rows])


def ids(items: Sequence[Item | TextItem]) -> list[str]:
    return [item.id for item in items]


def test_conversations_and_documents_are_measured_in_the_proportion_of_the_rows(
    template: Template, tmp_path: Path
) -> None:
    test = store(tmp_path, *(Text(f"text {i}") for i in range(20)), *(conversation(i) for i in range(4)))
    data = select_evaluation_data(test, Evaluate(loss_rows=9, answer_rows=3), template)
    conversations = [e.key for e in test if isinstance(e.record, Conversation)]
    assert ids(data.answer_items) == conversations[:3]
    kinds = {Text: TextItem, Conversation: Item}
    assert [type(item) for item in data.loss_items] == [kinds[type(e.record)] for e in test[:9]]  # type: ignore[index]
    chats = ids([item for item in data.loss_items if isinstance(item, Item)])
    assert chats == conversations[: len(chats)]


def test_a_document_keeps_the_ids_that_training_uses_and_shares_its_name_with_its_other_windows(
    template: Template, tmp_path: Path
) -> None:
    records = [Text("the first part"), Text("the second"), Text(""), Text("another")]
    test = store(tmp_path, *records, places=[7, 7, 7, 8])
    items = {
        i.content: i for i in select_evaluation_data(test, Evaluate(), template).loss_items if isinstance(i, TextItem)
    }
    assert items.keys() == {"the first part", "the second", "", "another"}
    assert all(item.encoded == SEQUENCE for item in items.values())
    document = items["the first part"].document
    assert items["the second"].document == items[""].document == document != items["another"].document
    assert items[""].scored_bytes == 0
    some = [
        i for i in select_evaluation_data(test, Evaluate(loss_rows=3), template).loss_items if isinstance(i, TextItem)
    ]
    assert document not in {item.document for item in some}, "a part of a document is not called by its name"


def test_the_same_documents_are_measured_whatever_their_windows(template: Template, tmp_path: Path) -> None:
    measured: list[dict[str, tuple[int, int]]] = []
    for name, limit in (("a", 96), ("b", 60)):
        (tmp_path / name).mkdir()
        rows = write_rows(tmp_path / f"{name}.jsonl", [{"text": prose(n, 4 if n % 2 else 40)} for n in range(30)])
        data = Data(
            sources=(source(rows, side="test"), source(write_rows(tmp_path / "c.jsonl", chats(3)))), max_length=limit
        )
        data = data.model_copy(update={"split": Split(validation=0)})
        test = prepare(data, template, tmp_path / name, 0, cache=tmp_path / "cache", workers=1).test
        assert len(test) > 30
        items = select_evaluation_data(test, Evaluate(loss_rows=10_000), template).loss_items
        assert len(items) == len(test)
        sums: dict[str, tuple[int, int]] = {}
        for item in items:
            assert isinstance(item, TextItem)
            tokens, size = sums.get(item.document, (0, 0))
            sums[item.document] = tokens + sum(item.encoded.trained[1:]), size + item.scored_bytes
        measured.append(sums)
        few = select_evaluation_data(test, Evaluate(loss_rows=40), template).loss_items
        assert len({item.document for item in few if isinstance(item, TextItem)}) > 15, "many, rather than whole ones"
    assert len(measured[0]) == 30
    assert measured[0] == measured[1], "the tokens and bytes of each document are the same"


WHY = Conversation.from_turns(("user", "why?"))


def test_copies_are_measured_once_and_preferences_beside_conversations_are_ranked_only(
    template: Template, tmp_path: Path
) -> None:
    test = store(tmp_path, conversation(1), conversation(1), Preference(WHY, "so", "no"), conversation(2))
    data = select_evaluation_data(test, Evaluate(loss_rows=2, answer_rows=2), template)
    assert set(ids(data.loss_items)) == {f"{conversation(i)!r}" for i in (1, 2)}
    assert ids(data.answer_items) == ids(data.loss_items)
    assert [(ranked.prompt, len(ranked.pairs)) for ranked in data.ranked_answers] == [(WHY, 1)]


def test_of_preferences_alone_the_chosen_answers_have_a_loss_and_each_prompt_is_answered_once(
    template: Template, tmp_path: Path
) -> None:
    test = store(tmp_path, Preference(WHY, "so", "no"), Preference(WHY, "thus", "no"), Preference(WHY, "so", "never"))
    data = select_evaluation_data(test, Evaluate(test=Source(path="docs"), primary="preference_accuracy"), template)
    chosen = [item.conversation for item in data.loss_items if isinstance(item, Item)]
    assert {conversation.messages for conversation in chosen} == {
        WHY.add("assistant", answer).messages for answer in ("so", "thus")
    }
    assert ids(data.answer_items) == ids(data.loss_items)[:1]
    assert {item.group for item in data.loss_items if isinstance(item, Item)} == {data.answer_items[0].group}
    assert describe_left_out(test, data) is None
    few = select_evaluation_data(test, Evaluate(loss_rows=1, answer_rows=1), template)
    assert describe_left_out(test, few) == "1 of 2 different test rows have a loss (`evaluate.loss_rows`)"


def test_rows_that_are_not_measured_are_counted(template: Template, tmp_path: Path) -> None:
    test = store(tmp_path, Text("a document"), *(conversation(i) for i in (1, 1, 2, 3)))
    some = select_evaluation_data(test, Evaluate(loss_rows=2, answer_rows=1), template)
    assert describe_left_out(test, some) == (
        "2 of 4 different test rows have a loss (`evaluate.loss_rows`), 1 of 3 are answered (`evaluate.answer_rows`)"
    )
    assert describe_left_out(test, select_evaluation_data(test, Evaluate(), template)) is None


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
    sizes = {item.content: item.scored_bytes for item in data.loss_items if isinstance(item, TextItem)}
    assert sizes == {
        start: len(start.encode()) - first,
        windows[1][0]: len(windows[1][0].encode()),
        text[:first]: 0,
    }


def test_a_test_file_of_bad_answers_alone_is_refused(template: Template, tmp_path: Path) -> None:
    bad, worse = Feedback(WHY, "no", 0.2), Feedback(WHY, "never", 0.1)
    mine = Evaluate(test=Source(path="docs"))
    (tmp_path / "bad").mkdir()
    alone = store(tmp_path / "bad", bad, bad)
    select_evaluation_data(alone, Evaluate(), template)
    with pytest.raises(DataError, match="no row of the source 'docs' can be evaluated on: no answer has a score"):
        select_evaluation_data(alone, mine, template)
    assert len(select_evaluation_data(store(tmp_path, bad, worse), mine, template).ranked_answers) == 1


def test_preferences_are_primary_only_where_there_are_some(template: Template, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"\"preference_margin\" is a metric of preferences, and no test rows rank"):
        select_evaluation_data(store(tmp_path, conversation(1)), Evaluate(primary="preference_margin"), template)
