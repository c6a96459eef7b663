"""Records by content, and the one form of a request about some material."""

from __future__ import annotations

from corral.messages import (
    INPUT_HEADING,
    Conversation,
    Feedback,
    Preference,
    Record,
    Text,
    record_key,
    record_to_json,
    with_input,
)


def test_equal_content_has_an_equal_key_and_other_content_another() -> None:
    prompt = Conversation.from_turns(("user", "a"))
    records: list[Record] = [
        prompt,
        prompt.add("assistant", "b"),
        Preference(prompt, "b", "c"),
        Preference(prompt, "c", "b"),
        Feedback(prompt, "b", 1.0),
        Feedback(prompt, "b", 0.5),
        Text("a"),
        Text("b"),
    ]
    assert len({record_key(record) for record in records}) == len(records)
    assert record_key(Text("a")) == record_key(Text("".join(["a"])))
    assert record_to_json(Text("a")) == {"text": "a"}


def test_turns_at_once_are_those_one_by_one_and_their_characters_are_counted() -> None:
    one_by_one = Conversation(()).add("system", "Be brief.").add("user", "hi").add("assistant", "hélló")
    assert one_by_one == Conversation.from_turns(("system", "Be brief."), ("user", "hi"), ("assistant", "hélló"))
    assert one_by_one.characters == 16
    assert Conversation(()).characters == 0


def test_material_follows_the_request_under_its_heading_and_none_leaves_the_request() -> None:
    assert with_input("Add.", "1, 2") == "Add." + INPUT_HEADING + "1, 2" == "Add.\n\n### Input:\n1, 2"
    assert with_input("Add.", "") == "Add."
