"""Reads conversations: OpenAI's message lists, ShareGPT's in their many spellings, HH's "Human: … Assistant: …" strings."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from corral.data.formats.fields import (
    FormatError,
    check_turn_order,
    describe_type,
    find_column,
    nonblank_text,
    optional_column_text,
    short_repr,
    valid_text,
)
from corral.messages import Conversation, Message, Role

SYSTEM_COLUMNS = ("system", "system_prompt")
"""Columns that hold a row's system message."""


@dataclass(frozen=True, slots=True)
class ChatDialect:
    """How a family of data sets writes conversations.

    Args:
        columns: names of the column with the list of messages.
        author_keys: names of the key of a message's author.
        content_keys: names of the key of its text.
        roles: the role of each author, by name in lower case.
        expected_roles: the authors, for a reason.
        model_names: whether a model's own name (`gpt-4o`) is an author too: the assistant.
    """

    columns: tuple[str, ...]
    author_keys: tuple[str, ...]
    content_keys: tuple[str, ...]
    roles: Mapping[str, Role]
    expected_roles: str
    model_names: bool = False

    def role(self, author: Any) -> Role | None:
        """The role of an author, if it is known."""
        if not isinstance(author, str):
            return None
        name = author.strip().lower()
        return self.roles.get(name) or ("assistant" if self.model_names and _MODEL.fullmatch(name) else None)


_MODEL = re.compile(
    r"(chatgpt|gpt|claude|gemini|gemma|bard|palm|llama|mistral|mixtral|vicuna|qwen|deepseek|command-r|phi)([\d\W].*)?"
)
_OPENAI_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
_SHAREGPT_ROLES: dict[str, Role] = {
    **_OPENAI_ROLES,
    **dict.fromkeys(("human", "prompter", "person", "instruction", "question", "input", "customer"), "user"),
    **dict.fromkeys(
        ("bing", "ai", "bot", "chatbot", "model", "llm", "agent", "response", "output"),
        "assistant",
    ),
}
_TOOLS = frozenset(("tool", "tools", "function", "ipython", "observation")) | {
    f"{what}{mark}{part}" for what in ("tool", "function") for mark in "_- " for part in ("call", "calls", "response")
}
COLUMNS_IF_ALONE = ("items", "history")
"""Columns that hold the messages only if no other column could: beside others they hold something else."""
_OTHERS = ("dialogue", "dialog", "turns", "chat", *COLUMNS_IF_ALONE)
OPENAI = ChatDialect(
    ("messages", "conversations", "conversation", *_OTHERS),
    ("role",),
    ("content",),
    _OPENAI_ROLES,
    "system, user or assistant",
)
SHAREGPT = ChatDialect(
    ("conversations", "conversation", "messages", *_OTHERS),
    ("from", "role", "speaker", "author"),
    ("value", "content", "text"),
    _SHAREGPT_ROLES,
    "system, human or gpt, or another word for them",
    model_names=True,
)


def openai_messages(row: Mapping[str, Any]) -> Conversation:
    """OpenAI's form: `{"messages": [{"role", "content"}, …]}`, also called `conversations`, `dialogue`, `turns`, `chat` ….

    At most one system message, first (or in a column `system`); then user and assistant by turns, the assistant last.
    The list may be JSON text; content may be a list of text parts. Other keys are ignored.

    Raises FormatError if the row has another form, a message holds no text, or tools are called.
    """
    return _conversation(row, OPENAI)


def sharegpt(row: Mapping[str, Any]) -> Conversation:
    """ShareGPT's form: `{"conversations": [{"from", "value"}, …]}`, with human or user or prompter, gpt or assistant or
    chatgpt or bing or bard …, and a system message or column.

    Raises FormatError if the row has another form; the order is that of `openai_messages`.
    """
    return _conversation(row, SHAREGPT)


def _conversation(row: Mapping[str, Any], dialect: ChatDialect) -> Conversation:
    # A column with one of the names may hold something else, such as the number of turns.
    name = next((name for name in dialect.columns if isinstance(parse_json_list(row.get(name)), list)), None)
    name, value = find_column(row, dialect.columns if name is None else (name,))
    turns = add_system_column(read_messages(value, name, dialect), row)
    check_turn_order(turns)
    return Conversation(tuple(turns))


def add_system_column(turns: list[Message], row: Mapping[str, Any]) -> list[Message]:
    """The messages, with the system message of the row's own column in front if it has one. Raises FormatError if there are
    two."""
    system = optional_column_text(row, *SYSTEM_COLUMNS)
    if not system or (turns and turns[0] == Message("system", system)):
        return turns
    if turns and turns[0].role == "system":
        raise FormatError("two system messages: one in a column, another in the first turn")
    return [Message("system", system), *turns]


def read_messages(value: Any, name: str, dialect: ChatDialect = SHAREGPT) -> list[Message]:
    """The messages of a list, which may be JSON text, in any order of roles. Raises FormatError."""
    value = parse_json_list(value)
    if isinstance(value, str) and value.startswith("["):
        raise FormatError(f"{name} is text that is no JSON list of messages")
    if not isinstance(value, list):
        raise FormatError(f"{name} is {describe_type(value)}: expected a list")
    items = cast("list[Any]", value)
    if not items:
        raise FormatError(f"{name} is an empty list")
    return [_message(item, name, i, dialect) for i, item in enumerate(items)]


def parse_json_list(value: Any) -> Any:
    """The list of objects that a text holds as JSON, as in a table's cell; any other value as it is."""
    if not isinstance(value, str) or not value.startswith("[") or not value.rstrip().endswith("]"):
        return value
    try:
        items: Any = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return items if isinstance(items, list) and all_objects(cast("list[Any]", items)) else value


def all_objects(items: list[Any]) -> bool:
    """Whether the list has items and all of them are objects."""
    return bool(items) and all(isinstance(item, dict) for item in items)


def uses_tools(fields: Mapping[str, Any], author: Any) -> bool:
    """Whether a message calls a tool or comes from one."""
    from_tool = isinstance(author, str) and author.strip().lower() in _TOOLS
    return from_tool or bool(fields.get("tool_calls")) or bool(fields.get("function_call"))


def _message(item: Any, name: str, i: int, dialect: ChatDialect) -> Message:
    if not isinstance(item, dict):
        form = f"{dialect.author_keys[0]} and {dialect.content_keys[0]}"
        raise FormatError(f"{name}.{i} is {describe_type(item)}: expected an object with {form}")
    fields = cast("dict[str, Any]", item)
    author_key = _first_key(fields, dialect.author_keys, f"{name}.{i}")
    author = fields[author_key]
    if uses_tools(fields, author):
        raise FormatError("tools are called in the conversation: it is left out whole")
    content_key = _first_key(fields, dialect.content_keys, f"{name}.{i}")
    content = fields[content_key]
    role = dialect.role(author)
    if role is None:
        raise FormatError(f"{name}.{i}.{author_key} is {short_repr(author)}: expected {dialect.expected_roles}")
    content = valid_text(_join_text_parts(content), f"{name}.{i}.{content_key}")
    if not content or content.isspace():
        raise FormatError(f"empty content in turn {i + 1}")
    return Message(role, content)


def _first_key(fields: Mapping[str, Any], names: Sequence[str], message: str) -> str:
    for name in names:
        if name in fields:
            return name
    raise FormatError(f"{message} has no {names[0]}")


def _join_text_parts(content: Any) -> Any:
    """The text of `[{"type": "text", "text": …}, …]`; anything else as it is."""
    if not isinstance(content, list) or not content:
        return content
    texts: list[str] = []
    for part in cast("list[Any]", content):
        if not isinstance(part, dict):
            return cast("Any", content)
        fields = cast("dict[str, Any]", part)
        if fields.get("type") != "text" or not isinstance(fields.get("text"), str):
            return cast("Any", content)
        texts.append(fields["text"])
    return "".join(texts)


_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_START = re.compile(r"\s*Human:")


def is_hh(value: Any) -> bool:
    """Whether a value is a dialogue in HH's form: `\\n\\nHuman: …\\n\\nAssistant: …`."""
    return isinstance(value, str) and _HH_START.match(value) is not None


def read_hh_dialogue(value: Any, name: str) -> list[Message]:
    """The messages of a dialogue in HH's form (Bai et al. 2022, arXiv 2204.05862), without the white space around each.

    Raises FormatError if it does not begin with `Human:`, or a message is empty.
    """
    dialogue = nonblank_text(value, name)
    if not is_hh(dialogue):
        raise FormatError(f"{name} does not begin with `Human:`")
    parts = _HH_TURN.split("\n\n" + dialogue.lstrip())[1:]
    turns: list[Message] = []
    for number, (author, content) in enumerate(zip(parts[::2], parts[1::2], strict=True), start=1):
        if not content.strip():
            raise FormatError(f"empty content in turn {number}")
        turns.append(Message("user" if author == "Human" else "assistant", content.strip()))
    return turns


def hh_chosen(row: Mapping[str, Any]) -> Conversation:
    """The chosen dialogue of a row of HH as a conversation. Raises FormatError."""
    turns = read_hh_dialogue(*reversed(find_column(row, ("chosen",))))
    check_turn_order(turns)
    return Conversation(tuple(turns))
