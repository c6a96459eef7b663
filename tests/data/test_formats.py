"""Every format: a good row, the table of format × fault, junk, special strings, and how a source's format is chosen."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.data.formats import FORMATS, FormatError, choose_format, recognise
from corral.data.plain_text import PlainTextEncoder
from corral.errors import DataError
from corral.messages import Conversation, Feedback, Preference, Record, Text, record_key
from corral.recipe import Mapping, Source
from corral.template import Encoded, Template
from tests.data.formats.rows import GOOD, HH, HH_WORSE, SHAPES, reason

CELLS = sorted(GOOD)


def test_every_format_has_a_row_in_this_table() -> None:
    assert set(FORMATS) == set(GOOD)
    assert len(FORMATS) == 26


@pytest.mark.parametrize("name", CELLS)
def test_a_good_row_becomes_its_record_also_by_a_pickled_format(name: str) -> None:
    row, _, expected = GOOD[name]
    before = copy.deepcopy(row)
    assert FORMATS[name](row) == pickle.loads(pickle.dumps(FORMATS[name]))(row) == expected
    assert row == before


def spoilt(row: dict[str, Any], path: tuple[str | int, ...], change: Callable[[Any], Any]) -> dict[str, Any]:
    row = copy.deepcopy(row)
    inner: Any = row
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = change(inner[path[-1]])
    return row


SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hello?"}
ASSISTANT = {"role": "assistant", "content": "Hello."}
HUGE = "x" * 10_000_001

# A fault, made in the row's text, and a word that its reason must have.
FAULTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a number": (lambda _: 17, "(is|holds) a number"),
    "a number of 5,000 digits": (lambda _: 10**5000, "(is|holds) a number"),
    "true": (lambda _: True, "(is|holds) true or false"),
    "an object": (lambda _: {"x": {"y": [{"z": []}]}}, "(is|holds) an object|has no"),
    "nested lists": (lambda _: [[[[[]]]]], "(is|holds) a list"),
    "empty": (lambda _: "", "empty|no title|no question|does not begin"),
    "blank": (lambda _: " \n\t\u00a0", "empty|no title|no question|does not begin"),
    "null": (lambda _: None, "null"),
    "NaN": (lambda _: math.nan, "NaN"),
    "half a surrogate pair": (lambda good: f"{good} \ud83d", "half of a surrogate pair"),
    "NUL": (lambda good: f"{good}\0", "NUL"),
    "huge": (lambda good: f"{good}{HUGE}", "longer than"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", CELLS)
def test_a_bad_text_is_refused_with_a_reason_that_names_the_fault(name: str, fault: str) -> None:
    row, path, _ = GOOD[name]
    change, word = FAULTS[fault]
    given = reason(FORMATS[name], spoilt(row, path, change))
    assert re.search(word, given), given
    assert len(given) < 150, given
    assert "\n" not in given


@pytest.mark.parametrize("name", CELLS)
def test_a_row_without_the_column_is_refused_with_the_columns_it_has(name: str) -> None:
    row, path, _ = GOOD[name]
    rest = {"other": 1} | {column: value for column, value in row.items() if column != path[0]}
    given = reason(FORMATS[name], rest)
    assert re.search(r"^no `|^title holds null", given), given
    if name != "wikibooks-recipes":
        assert "'other'" in given


@pytest.mark.parametrize("name", CELLS)
def test_an_empty_row_is_refused(name: str) -> None:
    with pytest.raises(FormatError, match=r"no columns|title holds null"):
        FORMATS[name]({})


# What breaks the order of messages. A format of texts finds a list where a text should be.
ORDERS: dict[str, tuple[list[Any], str]] = {
    "answer first": ([ASSISTANT, USER], "no answer: the last message is from the user"),
    "two questions": ([USER, USER, ASSISTANT], "turns 1 and 2 are both from the user"),
    "only a system message": ([SYSTEM], "no answer: the last message is from the system"),
    "system in the middle": ([USER, SYSTEM, ASSISTANT], "system message in second place"),
    "no question": ([ASSISTANT], "no question"),
    "an answer before the first question": ([ASSISTANT, USER, ASSISTANT], "no question"),
    "an unknown role": ([USER, {"role": "narrator", "content": "Then"}], "is 'narrator'"),
    "a role that is a list": ([{"role": ["user"], "content": "x"}], r"is \['user'\]"),
    "a turn without a role": ([USER, {"content": "x"}], "has no (role|from)"),
    "a turn without text": ([USER, {"role": "assistant"}], "has no (content|value)"),
    "a turn of nothing": ([USER, None], ".1 is null"),
}
CONVERSATIONS = {"messages": "messages", "sharegpt": "conversations"}
CONVERSATIONS |= dict.fromkeys(("finetome-100k", "the-tome"), "conversations")
PAIRS = ("preference", "chosen-answer", "ultrafeedback-binarized", "ultrafeedback-preferences", "hh-golden")
PROMPTS = ("prompt-completion", "feedback")
# In a pair one message alone is an answer; a prompt must not end with one.
IN_PAIRS = {"only a system message": "is from the system", "no question": "rejected has several messages"}
IN_PROMPTS = dict.fromkeys(
    ("two questions", "system in the middle", "no question", "an answer before the first question"),
    "prompt ends with an answer",
) | dict.fromkeys(("answer first", "only a system message"), "no question")


@pytest.mark.parametrize("fault", ORDERS)
@pytest.mark.parametrize("name", CELLS)
def test_messages_out_of_order_or_instead_of_a_text_are_refused(name: str, fault: str) -> None:
    turns, word = ORDERS[fault]
    row, path, _ = GOOD[name]
    if name in CONVERSATIONS:
        refused(name, row | {CONVERSATIONS[name]: turns}, word)
    elif name in PAIRS:
        rejected = [USER, ASSISTANT | {"content": "No."}]
        refused(name, {"chosen": turns, "rejected": rejected}, IN_PAIRS.get(fault, word))
    elif name in PROMPTS:
        refused(name, row | {"prompt": turns}, IN_PROMPTS.get(fault, word))
    else:
        refused(name, spoilt(row, path, lambda _: turns), "(is|holds) a list: expected text")


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("messages", {"messages": [{"role": 10**5000, "content": "x"}]}, "messages.0.role is a number: expected"),
        ("feedback", {"label": 10**5000}, "label is outside 0 to 1"),
        ("multiple-choice", {"answer": 10**5000}, "answer is outside the 2 options"),
    ],
    ids=["role", "label", "answer"],
)
def test_a_number_of_5000_digits_is_refused_in_any_field(name: str, changes: dict[str, Any], expected: str) -> None:
    refused(name, GOOD[name][0] | changes, expected)


def refused(name: str, row: dict[str, Any], word: str) -> None:
    given = reason(FORMATS[name], row)
    assert re.search(word, given), given


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([HH, HH_WORSE, "A", 10**400]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "tool"]) | JSON,
        "from": st.sampled_from(["human", "gpt", "system"]) | JSON,
        "content": st.text(max_size=5) | JSON,
        "value": st.text(max_size=5) | JSON,
    },
)
VALUE = JSON | st.lists(MESSAGE | JSON, max_size=4) | MESSAGE


@settings(deadline=None, max_examples=40)
@given(data=st.data())
@pytest.mark.parametrize("name", CELLS)
def test_any_row_gives_a_record_or_a_reason_and_nothing_else(name: str, data: st.DataObject) -> None:
    row, path, _ = GOOD[name]
    columns = data.draw(st.lists(st.sampled_from([*row, "system", "choices", "label"]), max_size=3, unique=True))
    junk = {column: data.draw(VALUE) for column in [path[0], *columns]}
    missing = data.draw(st.sets(st.sampled_from(sorted(row)), max_size=1))
    value = {key: v for key, v in (row | junk).items() if key not in missing}
    record, given = None, ""
    try:
        record = FORMATS[name](value)
    except FormatError as error:
        given = error.reason
    if record is None:
        assert 0 < len(given) < 600
        return
    assert isinstance(record, Conversation | Preference | Feedback | Text)
    assert len(record_key(record)) == 64
    texts = [m.content for m in conversation_of(record).messages] if not isinstance(record, Text) else [record.content]
    assert all(text.strip() for text in texts)
    json.dumps(texts).encode()
    "".join(texts).encode("utf-8")


def conversation_of(record: Record) -> Conversation:
    match record:
        case Conversation():
            return record
        case Preference():
            return record.prompt.add("assistant", record.chosen)
        case Feedback():
            return record.prompt.add("assistant", record.completion)
        case Text():
            raise AssertionError("a document has no turns")


@pytest.mark.parametrize("name", CELLS)
def test_special_strings_in_a_row_stay_text(name: str, template: Template) -> None:
    row, path, _ = GOOD[name]
    record = FORMATS[name](spoilt(row, path, lambda good: f"{good}<|im_end|>\n<|im_start|>system"))
    special = set(template.special_ids)
    if isinstance(record, Text):
        encoded: Encoded = PlainTextEncoder(template).encode(record.content)
        assert sum(i in special for i in encoded.ids) == 1
    else:
        conversation = conversation_of(record)
        encoded = template.encode(conversation)
        assert sum(i in special for i in encoded.ids) == 2 * len(conversation.messages)
    assert re.search(r"<\|im_end\|>\s<\|im_start\|>system", template.decode(encoded.ids))


def test_a_format_named_in_the_recipe_is_used_and_reported() -> None:
    chosen = choose_format(Source(path="a.jsonl", format="alpaca"), [])
    assert (chosen.name, chosen.why) == ("alpaca", "format: alpaca, as the recipe says")
    assert chosen.to_record is FORMATS["alpaca"]


def test_an_unknown_format_error_suggests_the_nearest_and_lists_all() -> None:
    with pytest.raises(DataError) as caught:
        choose_format(Source(path="a.jsonl", format="share-gpt"), [])
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("did you mean 'sharegpt'? the formats are auto, messages, sharegpt")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("hub:openai/gsm8k", "gsm8k"),
        ("hub:anthropic/HH-RLHF@main", "hh-rlhf"),
        ("hub:Unified-Language-Model-Alignment/Anthropic_HH_Golden", "hh-golden"),
    ],
)
def test_a_public_data_set_is_recognised_by_its_hub_id(path: str, name: str) -> None:
    chosen = choose_format(Source(path=path), [GOOD[name][0]])
    assert chosen.name == name
    assert chosen.why == f"format: {name}, as this is the data set {path}"
    assert chosen.to_record(GOOD[name][0]) == GOOD[name][2]


@pytest.mark.parametrize("name", SHAPES)
def test_the_format_of_other_sources_is_recognised_by_their_rows(name: str) -> None:
    row, _, expected = GOOD[name]
    chosen = choose_format(Source(path="rows.jsonl"), [row, row])
    assert chosen.name == name
    assert chosen.why.partition("; answers are counted")[0] == recognise([row, row]).why
    assert chosen.to_record(row) == expected


def test_a_mapping_is_chosen_and_can_be_pickled() -> None:
    source = Source(path="a.csv", mapping=Mapping(prompt="{title}\n{body}", completion="{answer}"))
    row = {"title": "Hats", "body": "Which?", "answer": "Red."}
    chosen = choose_format(source, [row])
    assert (chosen.name, chosen.why) == ("mapping", "format: a mapping of `title`, `body`, `answer` to a conversation")
    expected = Conversation.from_turns(("user", "Hats\nWhich?"), ("assistant", "Red."))
    assert pickle.loads(pickle.dumps(chosen)).to_record(row) == expected


def test_a_wrong_mapping_is_refused_with_its_source_and_key() -> None:
    source = Source(path="a.csv", name="questions", mapping=Mapping(prompt="{q}", completion="{a}"))
    with pytest.raises(DataError, match="there is no column 'q'") as caught:
        choose_format(source, [{"question": "x", "a": "y"}])
    assert caught.value.where == "questions: data.sources.mapping.prompt"
