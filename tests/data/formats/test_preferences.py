from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.data.formats.preferences import feedback, preference
from corral.messages import Conversation, Feedback, Preference
from tests.data.formats.rows import HH, HH_WORSE, reason

PROMPT = Conversation.from_turns(("user", "Hello?"))
PAIR = Preference(PROMPT, "Hello.", "No.")
USER = {"role": "user", "content": "Hello?"}
GOOD = {"role": "assistant", "content": "Hello."}
BAD = {"role": "assistant", "content": "No."}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hello?", "chosen": "Hello.", "rejected": "No."},
        {"question": "Hello?", "chosen": "Hello.", "rejected": "No."},
        {"instruction": "Hello?", "chosen_response": "Hello.", "rejected_response": "No."},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": "Hello.", "rejected": "No."},
        {"prompt": "Hello?", "chosen": GOOD, "rejected": BAD},
        {"prompt": "Hello?", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"conversations": [{"from": "human", "value": "Hello?"}], "chosen": GOOD, "rejected": BAD},
        {"chosen": "\n\nHuman: Hello?\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hello?\n\nAssistant: No."},
        {"prompt": "\n\nHuman: Hello?\n\nAssistant:", "chosen": " Hello.".strip(), "rejected": "No."},
    ],
)
def test_a_pair_is_the_same_in_all_its_forms(row: dict[str, Any]) -> None:
    assert preference(row) == PAIR


def test_a_system_column_begins_the_prompt() -> None:
    row = {"system": "S", "question": "Hello?", "chosen": "Hello.", "rejected": "No."}
    asked = Conversation.from_turns(("system", "S"), ("user", "Hello?"))
    assert preference(row) == Preference(asked, "Hello.", "No.")
    assert preference({"system": "S", "chosen": [USER, GOOD], "rejected": [USER, BAD]}).prompt == asked


def test_turns_that_both_dialogues_share_are_the_prompt() -> None:
    before = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: "
    record = preference({"chosen": before + "good\n\nor", "rejected": before + "bad"})
    assert record == Preference(
        Conversation.from_turns(("user", "a"), ("assistant", "b"), ("user", "c")), "good\n\nor", "bad"
    )


def test_words_that_both_texts_share_are_the_prompt() -> None:
    record = preference({"chosen": "The sky is green today.", "rejected": "The sky is grey today."})
    assert record == Preference(Conversation.from_turns(("user", "The sky is")), " green today.", " grey today.")


@given(st.text("ab \n", max_size=12), st.text("ab \n", max_size=12))
def test_prompt_and_answer_make_up_the_texts_again(chosen: str, rejected: str) -> None:
    row = {"chosen": f"ab {chosen} c", "rejected": f"ab {rejected} d"}
    record = preference(row)
    start = record.prompt.messages[0].content
    assert start.startswith("ab")
    assert (start + record.chosen, start + record.rejected) == (row["chosen"], row["rejected"])
    assert record.chosen[0].isspace()


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "x", "chosen": "y"}, "no `rejected`: the row has 'prompt', 'chosen'"),
        ({"prompt": "x", "chosen": "y", "rejected": "y"}, "chosen and rejected are the same"),
        ({"chosen": HH, "rejected": HH}, "chosen and rejected are the same"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "chosen and rejected are the same"),
        ({"chosen": "yes", "rejected": "no"}, "no `prompt`, and chosen and rejected do not begin alike"),
        ({"chosen": GOOD, "rejected": BAD}, "no `prompt`, and chosen does not begin with one"),
        ({"prompt": "x", "chosen": "y", "rejected": None}, "rejected is null: expected text"),
        ({"prompt": "x", "chosen": "y", "rejected": [BAD]}, "chosen is text, rejected is a list: expected one form"),
        (
            {"chosen": HH, "rejected": HH_WORSE.replace("larger", "older")},
            "chosen and rejected differ before the last turn: they answer different prompts",
        ),
        (
            {"prompt": [USER, GOOD], "chosen": "y", "rejected": "z"},
            "prompt ends with an answer: nothing is left to ask",
        ),
    ],
)
def test_an_invalid_pair_is_refused(row: dict[str, Any], expected: str) -> None:
    assert reason(preference, row) == expected


@pytest.mark.parametrize(
    ("judged", "score"),
    [
        ({"label": True}, 1.0),
        ({"label": False}, 0.0),
        ({"label": 1}, 1.0),
        ({"label": "False"}, 0.0),
        ({"score": 0.25}, 0.25),
        ({"score": " 0.25"}, 0.25),
        ({"label": None, "score": 1}, 1.0),
        ({"label": "yes"}, 1.0),
        ({"label": "No"}, 0.0),
        ({"label": " good "}, 1.0),
        ({"label": "bad"}, 0.0),
        ({"label": "thumbs_up"}, 1.0),
        ({"label": "Thumbs-Down"}, 0.0),
        ({"label": "\U0001f44d"}, 1.0),
    ],
)
def test_a_label_or_a_score_is_a_number_from_0_to_1(judged: dict[str, Any], score: float) -> None:
    row = {"prompt": [USER], "completion": [GOOD]} | judged
    assert feedback(row) == Feedback(PROMPT, "Hello.", score)


@pytest.mark.parametrize(
    ("judged", "expected"),
    [
        ({}, "no `label`: the row has 'prompt', 'completion'"),
        ({"label": None}, "label is null: expected a number, true or false"),
        ({"score": float("nan")}, "score is NaN, which is no score"),
        ({"score": float("inf")}, "score is infinite, which is no score"),
        ({"score": "nan"}, "score is NaN, which is no score"),
        ({"score": 7}, "score is outside 0 to 1: give its range as `score_range` in a mapping"),
        ({"score": "1_0"}, "score is text: expected a number, true or false"),
        ({"label": "meh"}, "label is text: expected a number, true or false"),
        ({"label": [1]}, "label is a list: expected a number, true or false"),
    ],
)
def test_an_invalid_judgement_is_refused(judged: dict[str, Any], expected: str) -> None:
    assert reason(feedback, {"prompt": "Hello?", "completion": "Hello."} | judged) == expected


@pytest.mark.parametrize("system", ["system", "system_prompt"])
def test_texts_that_share_the_prompt_keep_their_system_message(system: str) -> None:
    record = preference({system: "S", "chosen": "The sky is green.", "rejected": "The sky is grey."})
    assert record.prompt == Conversation.from_turns(("system", "S"), ("user", "The sky is"))


def test_lists_of_messages_may_be_json_text_as_in_a_table() -> None:
    assert preference({"chosen": json.dumps([USER, GOOD]), "rejected": json.dumps([USER, BAD])}) == PAIR
    row = {"prompt": json.dumps([USER]), "completion": json.dumps([GOOD]), "label": "yes"}
    assert feedback(row) == Feedback(PROMPT, "Hello.", 1.0)
    assert feedback(row | {"completion": "[1, 2]"}).completion == "[1, 2]"


@pytest.mark.parametrize("pair", [([USER, GOOD], [USER, BAD]), (HH, HH_WORSE)])
@pytest.mark.parametrize("column", ["prompt", "context", "history"])
def test_what_stands_beside_two_conversations_is_a_turn_of_theirs_or_refused(
    pair: tuple[Any, Any], column: str
) -> None:
    row = {"chosen": pair[0], "rejected": pair[1]}
    value = [["q", "a"]] if column == "history" else "Another question?"
    assert f"`{column}` beside `chosen` would be left out" in reason(preference, row | {column: value})
    prompt = preference(row).prompt
    for same in (prompt.messages[-1].content, prompt.to_json()["messages"], None, ""):
        assert preference(row | {"prompt": same}).prompt == prompt


def test_an_answer_of_a_pair_that_is_not_to_be_trained_on_is_refused() -> None:
    row = {"chosen": [USER, GOOD | {"weight": 0}], "rejected": [USER, BAD]}
    assert "not to be trained on" in reason(preference, row)
