from __future__ import annotations

import re
from typing import Any, get_args

import pytest

from corral.data.formats import FORMATS, FormatError, messages, wikibooks_recipes
from corral.data.sources import read
from corral.messages import Conversation
from corral.recipe import Source

USER = {"role": "user", "content": "Hello?"}
ASSISTANT = {"role": "assistant", "content": "Hello."}
SYSTEM = {"role": "system", "content": "Be brief."}


def reason(function: Any, value: dict[str, Any]) -> str:
    with pytest.raises(FormatError) as caught:
        function(value)
    return caught.value.reason


def test_every_format_a_recipe_can_name_has_a_function_and_no_other_has() -> None:
    assert set(FORMATS) == set(get_args(Source.model_fields["format"].annotation))


def test_messages_become_a_conversation_and_other_keys_are_ignored() -> None:
    value = {"id": 7, "messages": [SYSTEM, USER, ASSISTANT | {"name": "x"}, USER, ASSISTANT]}
    assert messages(value) == Conversation.of(
        ("system", "Be brief."),
        ("user", "Hello?"),
        ("assistant", "Hello."),
        ("user", "Hello?"),
        ("assistant", "Hello."),
    )


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"text": "x", "label": 1}, "no key `messages`: the row's keys are 'text', 'label'"),
        ({}, "no key `messages`: the row's keys are none"),
        ({"messages": "hi"}, "messages is text: expected a list"),
        ({"messages": []}, "messages is an empty list"),
        ({"messages": [USER, "hi"]}, "messages.1 is text: expected an object with role and content"),
        ({"messages": [{"content": "x"}]}, "messages.0 has no role"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages.1 has no content"),
        (
            {"messages": [USER, {"role": "bot", "content": "x"}]},
            "messages.1.role is 'bot': expected system, user or assistant",
        ),
        (
            {"messages": [{"role": ["user"], "content": "x"}]},
            "messages.0.role is ['user']: expected system, user or assistant",
        ),
        ({"messages": [USER, ASSISTANT | {"content": None}]}, "messages.1.content is null: expected text"),
        ({"messages": [USER | {"content": ["x"]}, ASSISTANT]}, "messages.0.content is a list: expected text"),
        ({"messages": [USER | {"content": 3}, ASSISTANT]}, "messages.0.content is a number: expected text"),
        ({"messages": [USER, ASSISTANT | {"content": " \n"}]}, "empty content in turn 2"),
        ({"messages": [USER, SYSTEM, ASSISTANT]}, "system message in second place: it must be the first"),
        ({"messages": [USER, ASSISTANT, USER, SYSTEM]}, "system message in 4th place: it must be the first"),
        ({"messages": [SYSTEM, USER, USER, ASSISTANT]}, "turns 2 and 3 are both from the user"),
        ({"messages": [USER, ASSISTANT, USER]}, "no answer: the last message is from the user"),
        ({"messages": [SYSTEM]}, "no answer: the last message is from the system"),
        ({"messages": [ASSISTANT]}, "no question: the first message is from the assistant"),
        ({"messages": [SYSTEM, ASSISTANT, USER, ASSISTANT]}, "no question: the first message is from the assistant"),
    ],
)
def test_a_row_without_the_messages_form_is_refused_with_a_reason_that_names_the_fault(
    value: dict[str, Any], expected: str
) -> None:
    assert reason(messages, value) == expected


def test_a_long_value_is_shortened_in_a_reason() -> None:
    assert len(reason(messages, {"messages": [{"role": "x" * 10_000, "content": "y"}]})) < 120


RECIPE = {"title": "Toast", "ingredients": ["bread", "butter", "salt"], "steps": ["Toast the bread.", "Butter it."]}


def test_a_recipe_is_asked_for_by_its_ingredients_and_answered_in_a_fixed_form() -> None:
    assert wikibooks_recipes(RECIPE) == Conversation.of(
        ("user", "Write a recipe with these ingredients:\n- bread\n- butter\n- salt"),
        (
            "assistant",
            "# Toast\n\n1. Toast the bread.\n2. Butter it.",
        ),
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"ingredients": ["bread", "butter", " "]}, "fewer than 3 ingredients"),
        ({"steps": ["Eat."]}, "fewer than 2 steps"),
        ({"title": ""}, "no title"),
        ({"title": None}, "title holds null: expected text"),
        ({"ingredients": "bread"}, "ingredients is text: expected a list"),
        ({"steps": None}, "steps is null: expected a list"),
        ({"steps": ["a", 2]}, "steps holds a number: expected text"),
        ({"steps": ["a", "b {{Recipe summary"]}, "wiki markup left in the steps"),
    ],
)
def test_a_recipe_that_cannot_be_learned_from_is_refused(changes: dict[str, Any], expected: str) -> None:
    assert reason(wikibooks_recipes, RECIPE | changes) == expected


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("1 package () sliced mushrooms", "1 package sliced mushrooms"),
        ("1 large (1 cup/) onion", "1 large (1 cup) onion"),
        ('Fold in.<ref name="a" /> Mix.<ref>see {{Cite}}</ref>', "Fold in. Mix."),
        ("1&frac12; cups ''smen''", "1½ cups smen"),
        ("* '''Salt'''", "Salt"),
        ("butter (see [https://x.org/y how])", "butter (see how)"),
        ("salt ,\u00a0pepper", "salt, pepper"),
        ("2 pepper<nowiki/>s", "2 peppers"),
        ("water (< 40°F)", "water (< 40°F)"),
    ],
)
def test_wiki_markup_is_taken_out_of_an_ingredient(raw: str, clean: str) -> None:
    record = wikibooks_recipes(RECIPE | {"ingredients": [raw, "butter", "salt"]})
    assert isinstance(record, Conversation)
    assert record.messages[0].content.splitlines()[1] == f"- {clean}"


def test_the_wikibooks_asset_gives_about_2960_recipes_of_one_form() -> None:
    form = re.compile(r"# [^\n]+\n\n(\d+\. [^\n]+(\n|$)){2,}")
    made = 0
    for row in read(Source(path="asset:wikibooks-recipes")):
        assert row.value is not None
        try:
            record = wikibooks_recipes(row.value)
        except FormatError:
            continue
        made += 1
        question, answer = record.messages
        assert form.fullmatch(answer.content), answer.content
        assert not re.search(r"<ref|\[\[|\{\{|''|&\w+;", question.content + answer.content)
    assert made == 2957
