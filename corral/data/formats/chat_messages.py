"""Reads conversations: OpenAI's message lists, ShareGPT's in their many spellings, HH's "Human: … Assistant: …" strings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from corral.data.formats.context_columns import REASONING_COLUMNS, check_context_columns, refuse_columns
from corral.data.formats.fields import (
    FormatError,
    describe_type,
    find_column,
    nonblank_text,
    optional_column_text,
    short_repr,
    valid_text,
)
from corral.data.formats.rendered_text import refuse_rendered
from corral.data.formats.turns import ordered_conversation
from corral.messages import Conversation, Message, Role

ANSWER_TEXT_COLUMNS = ("completion", "response", "output", "answer", "assistant")
"""Columns that hold an answer beside its prompt."""
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


@check_context_columns
def openai_messages(row: Mapping[str, Any]) -> Conversation:
    """OpenAI's form: `{"messages": [{"role", "content"}, …]}`, also called `conversations`, `dialogue`, `turns`, `chat` ….

    At most one system message, first (or in a column `system`); then user and assistant by turns, the assistant last.
    The list may be JSON text; content may be a list of text parts. A message of the assistant with `weight` 0 (or `train` or
    `loss` false) is not trained. A line of a batch file has the list in `body`.

    Raises:
        TurnOrderError: the turns are out of order.
        FormatError: the row has another form, a message holds no text, or what it holds would be left out: calls of tools,
            images, reasoning.
    """
    body = row.get("body")
    if isinstance(body, dict) and "messages" in body and "messages" not in row:
        return openai_messages(cast("dict[str, Any]", body))
    return _conversation(row, OPENAI)


@check_context_columns
def sharegpt(row: Mapping[str, Any]) -> Conversation:
    """ShareGPT's form: `{"conversations": [{"from", "value"}, …]}`, with human or user or prompter, gpt or assistant or
    chatgpt or bing or bard …, and a system message or column.

    Raises what `openai_messages` does.
    """
    return _conversation(row, SHAREGPT)


def _conversation(row: Mapping[str, Any], dialect: ChatDialect) -> Conversation:
    value, name = _message_list(row, dialect)
    turns = add_system_column(read_messages(value, name, dialect), row)
    refuse_columns(row, (column for column in ("context", "history") if column != name), name)
    if turns[-1].role == "user":
        # The answer to the last question, which mending would leave out.
        refuse_columns(row, ANSWER_TEXT_COLUMNS, name)
    return ordered_conversation(turns)


def _message_list(row: Mapping[str, Any], dialect: ChatDialect) -> tuple[Any, str]:
    """(the list of messages, the name of its column). Raises FormatError."""
    # A column with one of the names may hold something else, such as the number of turns.
    name = next((name for name in dialect.columns if isinstance(parse_json_list(row.get(name)), list)), None)
    name, value = find_column(row, dialect.columns if name is None else (name,))
    return value, name


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
    start = int(len(items) > 1 and _is_blank_system(items[0], dialect))
    return [_message(item, name, i, dialect) for i, item in enumerate(items[start:], start)]


def _is_blank_system(item: Any, dialect: ChatDialect) -> bool:
    """Whether a message is the empty system message that many public chats begin with."""
    if not isinstance(item, dict):
        return False
    fields = cast("dict[str, Any]", item)
    author, content = (
        next((fields[key] for key in keys if key in fields), None)
        for keys in (dialect.author_keys, dialect.content_keys)
    )
    return dialect.role(author) == "system" and (content is None or (isinstance(content, str) and not content.strip()))


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
    content = valid_text(_join_text_parts(content, f"{name}.{i}"), f"{name}.{i}.{content_key}")
    if not content or content.isspace():
        raise FormatError(f"empty content in turn {i + 1}")
    reasoning = next((key for key in REASONING_COLUMNS if fields.get(key)), None)
    if reasoning is not None:
        raise FormatError(f"a message has `{reasoning}`, which would be left out: put it into its content")
    return Message(role, refuse_rendered(content, f"{name}.{i}.{content_key}"), _is_trained(fields, role))


_TRAINING_KEYS = ("weight", "train", "loss", "trained")


def _is_trained(fields: Mapping[str, Any], role: Role) -> bool:
    """What a message says of its own training: OpenAI's `weight` (0 or 1), Axolotl's `train`, ms-swift's `loss`,
    corral's own `trained`.

    Raises FormatError if it says something else, or a message that is no answer is to be trained.
    """
    is_trained = True
    for key in _TRAINING_KEYS:
        value = fields.get(key)
        if value is None:
            continue
        if value not in (0, 1):  # True and False equal 1 and 0
            raise FormatError(f"a message has `{key}` {short_repr(value)}: only 0, 1, true and false are known")
        if value and role != "assistant" and key != "weight":
            raise FormatError(f"a message of the {role} has `{key}` true: only answers are trained")
        is_trained = is_trained and bool(value)
    if fields.get("train_detail"):
        raise FormatError("a message has `train_detail`: parts of an answer cannot be trained alone")
    return is_trained or role != "assistant"


def unused_message_keys(rows: Iterable[Mapping[str, Any]], column: str) -> list[str]:
    """The keys of the messages in a column that are not read, in order of appearance."""
    known = {*SHAREGPT.author_keys, *SHAREGPT.content_keys, *REASONING_COLUMNS, *_TRAINING_KEYS}
    known |= {"tool_calls", "function_call", "train_detail"}
    items = (parse_json_list(row.get(column)) for row in rows)
    messages = (cast("dict[str, Any]", m) for item in items if isinstance(item, list) for m in cast("list[Any]", item))
    keys = (key for message in messages for key, value in message.items() if value not in (None, "", [], {}))
    return list(dict.fromkeys(key for key in keys if key not in known))


def _first_key(fields: Mapping[str, Any], names: Sequence[str], message: str) -> str:
    for name in names:
        if name in fields:
            return name
    raise FormatError(f"{message} has no {names[0]}")


def _join_text_parts(content: Any, message: str) -> Any:
    """The text of `[{"type": "text", "text": …}, …]`; anything else as it is. Raises FormatError for images and sounds."""
    if not isinstance(content, list) or not content:
        return content
    texts: list[str] = []
    for part in cast("list[Any]", content):
        if not isinstance(part, dict):
            return cast("Any", content)
        fields = cast("dict[str, Any]", part)
        if any(kind in str(fields.get("type")) for kind in ("image", "audio", "video", "file")):
            raise FormatError(f"{message} holds {short_repr(fields['type'])}: corral trains on text only")
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
    return ordered_conversation(turns)
