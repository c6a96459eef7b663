"""Mappings: what a text with placeholders may say, what a row makes of it, and that nothing is ever evaluated."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.data.formats import FormatError
from corral.data.formats.column_mapping import ColumnMapping, TextPattern, compile_mapping
from corral.data.formats.fields import ContradictionError
from corral.errors import DataError
from corral.messages import Conversation, Feedback, Message, Preference
from corral.recipe import Mapping
from tests.data.formats.rows import reason

ROW: dict[str, Any] = {
    "title": "Hats",
    "Best Answer": "Red.",
    "chosen-rating": 4.5,
    "answer": {"value": "Red", "aliases": ["red", "crimson"]},
    "a.b": "dotted",
    "n": 3,
    "yes": True,
    "none": None,
    "empty": "",
}


def compiled(settings_: Mapping, rows: Sequence[dict[str, Any]]) -> ColumnMapping:
    return compile_mapping(settings_, rows)[0]


def fill(source: str, row: dict[str, Any] = ROW) -> str:
    return TextPattern.parse("prompt", source).fill(row)


@pytest.mark.parametrize(
    ("source", "filled"),
    [
        ("{title}", "Hats"),
        ("About {title}:\n{Best Answer}", "About Hats:\nRed."),
        ("{answer.value}, {answer.aliases[1]}, {answer.aliases[-1]}", "Red, crimson, crimson"),
        ("{chosen-rating} {n} {yes}", "4.5 3 true"),
        ("{a.b}", "dotted"),
        ('{{"title": "{title}"}}', '{"title": "Hats"}'),
        ("{{title}}", "{title}"),
        ("{{{title}}}", "{Hats}"),
        ("{ title }", "Hats"),
        ("x{empty}{n}", "x3"),
        ("x{none}{n}", "x3"),
        ("x", "x"),
    ],
)
def test_placeholders_are_filled_from_the_row(source: str, filled: str) -> None:
    assert fill(source) == filled


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{none}", "prompt is empty"),
        ("{missing}", "no `missing`: the row has 'title', 'Best Answer', 'chosen-rating', "),
        ("{answer}", "answer is an object: name what is in it, {answer.key}"),
        ("{answer.aliases}", "answer.aliases is a list: name what is in it, {answer.aliases[0]}"),
        ("{answer.text}", "no `answer.text`: answer has 'value', 'aliases'"),
        ("{answer.aliases[2]}", "answer.aliases is a list of 2: it has no [2]"),
        ("{title[0]}", "title is text: expected a list"),
        ("{title.upper}", "title is text: expected an object"),
        ("{title.__class__}", "title is text: expected an object"),
        ("{none.x}", "none is null: expected an object"),
        ("{empty} {empty}", "prompt is empty"),
    ],
)
def test_a_row_that_cannot_fill_a_text_is_refused(source: str, expected: str) -> None:
    assert reason(TextPattern.parse("prompt", source).fill, ROW).startswith(expected)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("\ud800", "title holds half of a surrogate pair, which is no character"),
        ("a\0", "title holds a NUL character"),
        (float("nan"), "title is NaN"),
        (float("inf"), "title is infinite"),
        (10**5000, "title is a number"),
        ([["x"]], "title is a list: name what is in it, {title[0]}"),
    ],
    ids=str.split("surrogate NUL NaN infinity digits lists"),
)
def test_a_value_that_is_not_text_is_refused(value: Any, expected: str) -> None:
    assert reason(TextPattern.parse("prompt", "Say {title}").fill, {"title": value}) == expected


@pytest.mark.parametrize("source", ["{", "}", "{title", "title}", "{{title}", "{title}}", "{a{b}}", "a } b"])
def test_an_unpaired_brace_is_refused(source: str) -> None:
    with pytest.raises(DataError, match="without its other half") as caught:
        TextPattern.parse("prompt", source)
    assert caught.value.where == "data.sources.mapping.prompt"
    assert "{{ or }}" in str(caught.value.hint)


@pytest.mark.parametrize(
    "source", ["{}", "{ }", "{.x}", "{x.}", "{x..y}", "{[0]}", "{x[]}", "{x[y]}", "{x[0}", "{x[0]y}"]
)
def test_a_placeholder_that_names_nothing_is_refused(source: str) -> None:
    with pytest.raises(DataError, match="names no column"):
        TextPattern.parse("prompt", source)


def test_the_keys_of_a_mapping_decide_the_record() -> None:
    prompt = Conversation.from_turns(("user", "Hats"))
    conversation = compiled(Mapping(prompt="{title}", completion="{n}"), [ROW])
    assert conversation(ROW) == prompt.add("assistant", "3")
    pair = compiled(Mapping(prompt="{title}", chosen="{n}", rejected="{Best Answer}"), [ROW])
    assert pair(ROW) == Preference(prompt, "3", "Red.")
    judged = compiled(Mapping(prompt="{title}", completion="{n}", score="chosen-rating", score_range=(1, 5)), [ROW])
    assert judged(ROW) == Feedback(prompt, "3", 0.875)
    worst_first = compiled(Mapping(prompt="{title}", completion="{n}", score="{n}", score_range=(5, 1)), [ROW])
    assert worst_first(ROW) == Feedback(prompt, "3", 0.5)
    with_system = compiled(Mapping(system="Be brief.", prompt="{title}", completion="{n}"), [ROW])
    assert with_system(ROW) == Conversation.from_turns(("system", "Be brief."), ("user", "Hats"), ("assistant", "3"))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (6, "rating is outside 1 to 5, the `score_range` of its mapping"),
        ("five", "rating is text: expected a number, true or false"),
        (None, "rating is null: expected a number, true or false"),
    ],
)
def test_a_score_out_of_its_range_is_refused(value: Any, expected: str) -> None:
    mapped = compiled(Mapping(prompt="{q}", completion="{a}", score="{rating}", score_range=(1, 5)), [])
    assert reason(mapped, {"q": "x", "a": "y", "rating": value}) == expected


def test_a_pair_of_equal_answers_is_refused() -> None:
    mapped = compiled(Mapping(prompt="{q}", chosen="{a}", rejected="{b}"), [])
    assert reason(mapped, {"q": "x", "a": "y", "b": "y"}) == "chosen and rejected are the same"


@pytest.mark.parametrize(
    ("settings_", "what", "where"),
    [
        ({}, "a mapping of nothing makes no record", ""),
        ({"prompt": "{title}"}, "a mapping of prompt makes no record", ""),
        ({"prompt": "{title}", "chosen": "{n}"}, "a mapping of chosen, prompt makes no record", ""),
        ({"prompt": "{title}", "completion": "Yes"}, "'Yes' names no column", ".completion"),
        ({"prompt": "{titel}", "completion": "{n}"}, "there is no column 'titel'", ".prompt"),
        ({"prompt": "{title}", "completion": "{x.y}"}, "there is no column 'x'", ".completion"),
        ({"prompt": "{title}", "completion": "{n}", "score": "{n} {n}"}, "'{n} {n}' is not one column", ".score"),
        ({"prompt": "{title}", "completion": "{n}", "score": "rated"}, "there is no column 'rated'", ".score"),
        (
            {"prompt": "{title}", "completion": "{n}", "score": "n", "score_range": (1, 1)},
            "the range 1 to 1 has no width",
            ".score_range",
        ),
    ],
)
def test_a_mapping_that_makes_no_record_is_refused(settings_: dict[str, Any], what: str, where: str) -> None:
    with pytest.raises(DataError) as caught:
        compiled(Mapping(**settings_), [ROW])
    assert caught.value.what.startswith(what)
    assert caught.value.where == f"data.sources.mapping{where}"
    assert caught.value.hint


def test_an_unknown_column_error_suggests_the_nearest_and_lists_all() -> None:
    with pytest.raises(DataError) as caught:
        compiled(Mapping(prompt="{titel}", completion="{n}"), [{"n": 1}, {"title": "x"}])
    assert caught.value.hint == "did you mean {title}? the columns are 'n', 'title'"


PIECES = st.lists(
    st.sampled_from(["{", "}", "{{", "}}", "[0]", "[x]", ".", "title", "answer", "value", "aliases", " ", "!r", ":>9"])
)


@settings(deadline=None)
@given(
    PIECES.map("".join) | st.text(string.printable, max_size=20),
    st.none() | st.integers() | st.text() | st.lists(st.text()),
)
def test_any_text_is_refused_or_filled_with_what_the_row_holds(source: str, value: Any) -> None:
    pattern = parsed(source)
    if pattern is None:
        return
    row = {"title": value, "answer": {"value": value, "aliases": [value]}}
    text = filled(pattern, row)
    if text is not None:
        # Nothing but the literals and the row's values can be in the text.
        literals = "".join(part for part in pattern.parts if isinstance(part, str))
        assert sorted(text) == sorted(literals + ("" if value is None else str(value)) * len(pattern.paths))


def parsed(source: str) -> TextPattern | None:
    try:
        return TextPattern.parse("prompt", source)
    except DataError:
        return None


def filled(pattern: TextPattern, row: dict[str, Any]) -> str | None:
    try:
        return pattern.fill(row)
    except FormatError:
        return None


@given(st.text(max_size=20))
def test_doubled_braces_write_any_text_as_it_is(text: str) -> None:
    parts = TextPattern.parse("prompt", text.replace("{", "{{").replace("}", "}}")).parts
    assert "".join(map(str, parts)) == text


def test_equal_mappings_compile_to_equal_values() -> None:
    settings_ = Mapping(prompt="{title}", completion="{n}")
    assert isinstance(compiled(settings_, []), ColumnMapping)
    assert compiled(settings_, []) == compiled(settings_, [ROW])


DIALOGUE = [
    {"who": "Caller", "said": "Which?"},
    {"who": "desk", "said": "Red."},
    {"who": "user", "said": "Why?"},
    {"who": "assistant", "said": "It is."},
]


@pytest.mark.parametrize("column", ["talk.turns", "{talk.turns}"])
def test_messages_are_read_with_the_keys_and_roles_that_the_mapping_names(column: str) -> None:
    expected = Conversation.from_turns(
        ("user", "Which?"), ("assistant", "Red."), ("user", "Why?"), ("assistant", "It is.")
    )
    given = Mapping(messages=column, role="who", content="said", roles={"caller": "user", "Desk": "assistant"})
    for turns in (DIALOGUE, json.dumps(DIALOGUE)):
        row = {"about": "hats", "talk": {"turns": turns}}
        assert compiled(given, [row])(row) == expected
        with_system = given.model_copy(update={"system": "Of {about}."})
        assert compiled(with_system, [row])(row) == Conversation((Message("system", "Of hats."), *expected.messages))
    assert compiled(given, [row]).record_type == "a conversation"
    assert reason(compiled(given, []), {"talk": {"turns": [{"who": "x", "said": "y"}]}}).startswith(
        "talk.turns.0.who is 'x': expected system, user or assistant, another word for them, or one of the mapping's"
    )


@pytest.mark.parametrize(
    ("settings_", "what"),
    [
        ({"messages": "{n}", "prompt": "{title}"}, "a mapping of messages, prompt makes no record"),
        ({"prompt": "{title}", "completion": "{n}", "role": "who"}, "`role` says nothing without `messages`"),
        ({"messages": "{n}", "score_range": (0, 1)}, "`score_range` says nothing without `score`"),
        ({"messages": "{n} {title}"}, "'{n} {title}' is not one column"),
        ({"messages": "talk"}, "there is no column 'talk'"),
    ],
)
def test_a_mapping_of_messages_that_makes_no_record_is_refused(settings_: dict[str, Any], what: str) -> None:
    with pytest.raises(DataError) as caught:
        compile_mapping(Mapping(**settings_), [ROW])
    assert caught.value.what.startswith(what)


def test_a_null_counts_as_an_empty_text() -> None:
    mapped = compiled(Mapping(prompt="{title}\n{body}", completion="{a}"), [])
    rows: list[dict[str, Any]] = [{"title": "T", "body": body, "a": "A"} for body in (None, "")]
    assert mapped(rows[0]) == mapped(rows[1]) == Conversation.from_turns(("user", "T\n"), ("assistant", "A"))
    for blank in (None, ""):
        assert reason(mapped, {"title": "T", "body": "B", "a": blank}) == "completion is empty"


def test_the_scale_of_scores_is_stated_or_inferred_or_refused() -> None:
    judged = Mapping(prompt="{q}", completion="{a}", score="{s}")

    def rows(*scores: Any) -> list[dict[str, Any]]:
        return [{"q": "x", "a": "y", "s": score} for score in scores]

    mapped, note = compile_mapping(judged, rows(1, -1, "-1"))
    assert note == "; `s` is -1 for the worst and 1 for the best"
    assert [mapped(row) for row in rows(-1, 1)] == [
        Feedback(Conversation.from_turns(("user", "x")), "y", score) for score in (0.0, 1.0)
    ]
    with pytest.raises(DataError, match="`s` runs from 1 to 5") as caught:
        compile_mapping(judged, rows(1, 5, 2))
    assert "score_range = [1, 5]" in str(caught.value.hint)
    with pytest.raises(ContradictionError):
        compiled(judged, rows(1, 1))(rows(2)[0])


@pytest.mark.parametrize("column", ["empty", "none"])
def test_words_of_the_mapping_alone_are_no_text_but_for_a_system_message(column: str) -> None:
    with pytest.raises(FormatError, match="completion is empty"):
        TextPattern.parse("completion", f"A: {{{column}}}").fill(ROW)
    assert TextPattern.parse("system", f"Be kind. {{{column}}}").fill(ROW) == "Be kind. "
