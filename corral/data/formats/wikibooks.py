"""Reads entries of the Wikibooks Cookbook: "write a recipe with these ingredients", answered by the recipe."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from typing import Any, cast

from corral.data.formats.fields import FormatError, describe_type, valid_text
from corral.messages import Conversation

_MIN_INGREDIENTS = 3
_MIN_STEPS = 2
_LONGEST_LINE = 20_000  # characters; a longer one is not a recipe's, and would be slow to search for markup

_REFERENCE = re.compile(r"<ref\b[^<>]*/\s*>|<ref\b[^<>]*>.*?</ref\s*>", re.DOTALL)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_WEB_LINK = re.compile(r"\[https?://\S+\s+([^\]]*)\]")
# Units that the extraction lost: "1 package () mushrooms", "1 large (1 cup/) onion".
_EMPTY_BRACKETS = re.compile(r"\(\s*\)")
_SLASH_IN_BRACKET = re.compile(r"\s*/\s*\)")
_REMAINING_MARKUP = re.compile(r"\{\||\|\}|\{\{|\}\}|\[\[|\]\]|</?ref|\bthumb(?:\||[A-Z])")


def wikibooks_recipes(value: Mapping[str, Any]) -> Conversation:
    """A Wikibooks Cookbook entry: `title`, `ingredients` and `steps`.

    Wiki markup is removed; the answer always has the same form: title, numbered steps. It does not repeat the ingredients:
    copying them teaches nothing, and would hide in the loss what is learnt.

    Raises FormatError if there are fewer than 3 ingredients or 2 steps, no title, or markup that cannot be removed.
    """
    title = _strip_markup(value.get("title"), "title")
    if not title:
        raise FormatError("no title")
    ingredients = _lines(value.get("ingredients"), "ingredients")
    steps = _lines(value.get("steps"), "steps")
    if len(ingredients) < _MIN_INGREDIENTS:
        raise FormatError(f"fewer than {_MIN_INGREDIENTS} ingredients")
    if len(steps) < _MIN_STEPS:
        raise FormatError(f"fewer than {_MIN_STEPS} steps")
    ingredient_list = "\n".join(f"- {line}" for line in ingredients)
    numbered_steps = "\n".join(f"{number}. {line}" for number, line in enumerate(steps, start=1))
    return Conversation.from_turns(
        ("user", f"Write a recipe with these ingredients:\n{ingredient_list}"),
        ("assistant", f"# {title}\n\n{numbered_steps}"),
    )


def _lines(value: Any, name: str) -> list[str]:
    if not isinstance(value, list):
        raise FormatError(f"{name} is {describe_type(value)}: expected a list")
    return [line for item in cast("list[Any]", value) if (line := _strip_markup(item, name))]


def _strip_markup(value: Any, name: str) -> str:
    """One line of text without wiki markup, HTML or list signs."""
    if not isinstance(value, str):
        raise FormatError(f"{name} holds {describe_type(value)}: expected text")
    if len(valid_text(value, name)) > _LONGEST_LINE:
        raise FormatError(f"{name} has a line longer than {_LONGEST_LINE:,} characters")
    text = _TAG.sub("", _REFERENCE.sub("", html.unescape(value)))
    text = _WEB_LINK.sub(r"\1", text)
    if _REMAINING_MARKUP.search(text):
        raise FormatError(f"wiki markup left in the {name}")
    text = re.sub("'{2,}", "", text)
    text = _EMPTY_BRACKETS.sub("", _SLASH_IN_BRACKET.sub(")", text))
    text = re.sub(r"\s+([,.;)])", r"\1", " ".join(text.split())).replace("( ", "(")
    return text.lstrip("*#:;- ").strip()
