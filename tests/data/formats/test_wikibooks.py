from __future__ import annotations

import re
from typing import Any

import pytest

from corral.data.formats import FormatError
from corral.data.formats.wikibooks import wikibooks_recipes
from corral.data.sources import read_rows
from corral.messages import Conversation
from corral.recipe import Source
from tests.data.formats.rows import reason

RECIPE = {"title": "Toast", "ingredients": ["bread", "butter", "salt"], "steps": ["Toast the bread.", "Butter it."]}


def test_a_recipe_becomes_a_request_with_ingredients_and_an_answer_in_fixed_form() -> None:
    assert wikibooks_recipes(RECIPE) == Conversation.from_turns(
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
def test_wiki_markup_is_removed_from_an_ingredient(raw: str, clean: str) -> None:
    record = wikibooks_recipes(RECIPE | {"ingredients": [raw, "butter", "salt"]})
    assert isinstance(record, Conversation)
    assert record.messages[0].content.splitlines()[1] == f"- {clean}"


def test_the_wikibooks_asset_gives_about_2960_recipes_of_one_form() -> None:
    form = re.compile(r"# [^\n]+\n\n(\d+\. [^\n]+(\n|$)){2,}")
    made = 0
    for row in read_rows(Source(path="asset:wikibooks-recipes")):
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


def test_a_line_too_long_to_search_for_markup_is_refused_at_once() -> None:
    assert (
        reason(wikibooks_recipes, RECIPE | {"title": "<ref>" * 100_000})
        == "title has a line longer than 20,000 characters"
    )
