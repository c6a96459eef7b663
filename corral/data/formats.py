"""A raw row → a record: one function for each format a recipe can name, in `FORMATS`.

A function gives a record or raises FormatError with a reason that a person understands; the reason goes into the ledger,
so it names the fault and not the row. This module does not know where rows come from or how they become tokens.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from typing import Any, TypeAlias, cast

from corral.messages import ROLES, Conversation, Message, Record

Format: TypeAlias = Callable[[dict[str, Any]], Record]

_MIN_INGREDIENTS = 3
_MIN_STEPS = 2

_REFERENCE = re.compile(r"<ref\b[^<>]*/\s*>|<ref\b[^<>]*>.*?</ref\s*>", re.DOTALL)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_WEB_LINK = re.compile(r"\[https?://\S+\s+([^\]]*)\]")
# Units that the extraction lost: "1 package () mushrooms", "1 large (1 cup/) onion".
_EMPTY_BRACKETS = re.compile(r"\(\s*\)")
_OPEN_SLASH = re.compile(r"\s*/\s*\)")
_LEFT_OVER = re.compile(r"\{\||\|\}|\{\{|\}\}|\[\[|\]\]|</?ref|\bthumb(?:\||[A-Z])")


class FormatError(Exception):
    """A row does not have the form it should have. `reason` says why, and not where."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def messages(value: dict[str, Any]) -> Conversation:
    """The OpenAI form: `{"messages": [{"role", "content"}, …]}`; other keys are ignored.

    At most one system message, first; then user and assistant in turns, the assistant last.

    Raises:
        FormatError: otherwise, or a turn holds no text.
    """
    if "messages" not in value:
        keys = ", ".join(_short(key) for key in list(value)[:5]) or "none"
        raise FormatError(f"no key `messages`: the row's keys are {keys}")
    items = value["messages"]
    if not isinstance(items, list):
        raise FormatError(f"messages is {_kind(items)}: expected a list")
    turns = [_message(item, i) for i, item in enumerate(cast("list[Any]", items))]
    if not turns:
        raise FormatError("messages is an empty list")
    _check_order(turns)
    return Conversation(tuple(turns))


def _message(item: Any, i: int) -> Message:
    if not isinstance(item, dict):
        raise FormatError(f"messages.{i} is {_kind(item)}: expected an object with role and content")
    fields = cast("dict[str, Any]", item)
    for key in ("role", "content"):
        if key not in fields:
            raise FormatError(f"messages.{i} has no {key}")
    role, content = fields["role"], fields["content"]
    if role not in ROLES:
        raise FormatError(f"messages.{i}.role is {_short(role)}: expected system, user or assistant")
    if not isinstance(content, str):
        raise FormatError(f"messages.{i}.content is {_kind(content)}: expected text")
    if not content.strip():
        raise FormatError(f"empty content in turn {i + 1}")
    return Message(role, content)


_PLACES = {2: "second", 3: "third"}


def _check_order(turns: list[Message]) -> None:
    for number, turn in enumerate(turns[1:], start=2):
        if turn.role == "system":
            raise FormatError(f"system message in {_PLACES.get(number, f'{number}th')} place: it must be the first")
        if turn.role == turns[number - 2].role:
            raise FormatError(f"turns {number - 1} and {number} are both from the {turn.role}")
    if turns[-1].role != "assistant":
        raise FormatError(f"no answer: the last message is from the {turns[-1].role}")
    if all(turn.role != "user" for turn in turns[:2]):
        raise FormatError("no question: the first message is from the assistant")


def wikibooks_recipes(value: dict[str, Any]) -> Conversation:
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
    return Conversation.of(
        ("user", f"Write a recipe with these ingredients:\n{listed}"),
        ("assistant", f"# {title}\n\n{numbered}"),
    )


def _lines(value: Any, name: str) -> list[str]:
    if not isinstance(value, list):
        raise FormatError(f"{name} is {_kind(value)}: expected a list")
    return [line for item in cast("list[Any]", value) if (line := _plain(item, name))]


def _plain(value: Any, name: str) -> str:
    """One line of text without wiki markup, HTML or list signs."""
    if not isinstance(value, str):
        raise FormatError(f"{name} holds {_kind(value)}: expected text")
    text = _TAG.sub("", _REFERENCE.sub("", html.unescape(value)))
    text = _WEB_LINK.sub(r"\1", text)
    if _LEFT_OVER.search(text):
        raise FormatError(f"wiki markup left in the {name}")
    text = re.sub("'{2,}", "", text)
    text = _EMPTY_BRACKETS.sub("", _OPEN_SLASH.sub(")", text))
    text = re.sub(r"\s+([,.;)])", r"\1", " ".join(text.split())).replace("( ", "(")
    return text.lstrip("*#:;- ").strip()


def _kind(value: Any) -> str:
    kinds = {type(None): "null", bool: "true or false", str: "text", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:39]}…"


FORMATS: dict[str, Format] = {"messages": messages, "wikibooks-recipes": wikibooks_recipes}
