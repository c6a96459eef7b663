"""Entries of the Wikibooks Cookbook → "write a recipe from these ingredients", answered by the recipe.

Knows the wiki markup that the packaged data set leaves in, and nothing about how it was made.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from typing import Any, cast

from corral.data.formats.fields import FormatError, describe_type, valid_text
from corral.messages import Conversation

_MIN_INGREDIENTS = 3
_MIN_STEPS = 2
_LONGEST_LINE = 20_000  # characters; a longer one is no line of a recipe, and would be slow to search for markup

_REFERENCE = re.compile(r"<ref\b[^<>]*/\s*>|<ref\b[^<>]*>.*?</ref\s*>", re.DOTALL)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_WEB_LINK = re.compile(r"\[https?://\S+\s+([^\]]*)\]")
# Units that the extraction lost: "1 package () mushrooms", "1 large (1 cup/) onion".
_EMPTY_BRACKETS = re.compile(r"\(\s*\)")
_OPEN_SLASH = re.compile(r"\s*/\s*\)")
_LEFT_OVER = re.compile(r"\{\||\|\}|\{\{|\}\}|\[\[|\]\]|</?ref|\bthumb(?:\||[A-Z])")


def wikibooks_recipes(value: Mapping[str, Any]) -> Conversation:
    """A Wikibooks Cookbook entry (title, ingredients[], steps[]) → "write a recipe from these ingredients", the recipe.

    Wiki markup is taken out; the answer always has the same form: title, numbered steps. The ingredients are not said
    again: copying them would teach nothing, and hide in the loss what is learnt.

    Raises:
        FormatError: fewer than 3 ingredients or 2 steps, no title, or markup that cannot be taken out.
    """
    title = _plain(value.get("title"), "title")
    if not title:
        raise FormatError("no title")
    ingredients = _lines(value.get("ingredients"), "ingredients")
    steps = _lines(value.get("steps"), "steps")
    if len(ingredients) < _MIN_INGREDIENTS:
        raise FormatError(f"fewer than {_MIN_INGREDIENTS} ingredients")
    if len(steps) < _MIN_STEPS:
        raise FormatError(f"fewer than {_MIN_STEPS} steps")
    listed = "\n".join(f"- {line}" for line in ingredients)
    numbered = "\n".join(f"{number}. {line}" for number, line in enumerate(steps, start=1))
    return Conversation.from_turns(
        ("user", f"Write a recipe with these ingredients:\n{listed}"),
        ("assistant", f"# {title}\n\n{numbered}"),
    )


def _lines(value: Any, name: str) -> list[str]:
    if not isinstance(value, list):
        raise FormatError(f"{name} is {describe_type(value)}: expected a list")
    return [line for item in cast("list[Any]", value) if (line := _plain(item, name))]


def _plain(value: Any, name: str) -> str:
    """One line of text without wiki markup, HTML or list signs."""
    if not isinstance(value, str):
        raise FormatError(f"{name} holds {describe_type(value)}: expected text")
    if len(valid_text(value, name)) > _LONGEST_LINE:
        raise FormatError(f"{name} has a line longer than {_LONGEST_LINE:,} characters")
    text = _TAG.sub("", _REFERENCE.sub("", html.unescape(value)))
    text = _WEB_LINK.sub(r"\1", text)
    if _LEFT_OVER.search(text):
        raise FormatError(f"wiki markup left in the {name}")
    text = re.sub("'{2,}", "", text)
    text = _EMPTY_BRACKETS.sub("", _OPEN_SLASH.sub(")", text))
    text = re.sub(r"\s+([,.;)])", r"\1", " ".join(text.split())).replace("( ", "(")
    return text.lstrip("*#:;- ").strip()
