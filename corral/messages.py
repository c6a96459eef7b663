"""The values a row of data becomes: Conversation, Preference, Feedback, Text.

Knows nothing about text formats, tokens or files. All values are frozen, compare by content and have one JSON form,
which is what `record_key` hashes: a row is the same row wherever it is read from.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

INPUT_HEADING = "\n\n### Input:\n"
"""Stands in a user message between a request and the material it is about."""

Role: TypeAlias = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `content` is plain text: special-token strings in it are text too."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order: at most one system message, first; then user and assistant turns."""

    messages: tuple[Message, ...]

    @classmethod
    def from_turns(cls, *turns: tuple[Role, str]) -> Conversation:
        """`Conversation.from_turns(("user", "hi"), ("assistant", "hello"))`."""
        return cls(tuple(Message(role, content) for role, content in turns))

    @property
    def answered(self) -> bool:
        """Whether the last turn is the assistant's."""
        return bool(self.messages) and self.messages[-1].role == "assistant"

    @property
    def characters(self) -> int:
        """Of all contents together."""
        return sum(len(message.content) for message in self.messages)

    def add(self, role: Role, content: str) -> Conversation:
        """The same conversation with one more turn. It copies: many turns at once are `of`."""
        return replace(self, messages=(*self.messages, Message(role, content)))

    def split_answer(self) -> tuple[Conversation, str]:
        """(everything before the last turn, the last answer). The conversation must be `answered`."""
        assert self.answered, "split_answer needs a conversation that ends with the assistant"
        return Conversation(self.messages[:-1]), self.messages[-1].content

    def to_json(self) -> dict[str, Any]:
        """`{"messages": [{"role", "content"}, …]}`, the OpenAI form."""
        return {"messages": [{"role": m.role, "content": m.content} for m in self.messages]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Conversation:
        """The inverse of `to_json`; for values corral wrote itself (`data.formats` reads what others wrote)."""
        return cls(tuple(Message(m["role"], m["content"]) for m in value["messages"]))


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt with a better and a worse answer."""

    prompt: Conversation
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class Feedback:
    """A prompt with one answer and how good it is, in [0, 1]."""

    prompt: Conversation
    completion: str
    score: float


@dataclass(frozen=True, slots=True)
class Text:
    """A plain document, all of which is trained on: no turns, no template."""

    content: str


Record: TypeAlias = Conversation | Preference | Feedback | Text


def with_input(request: str, material: str) -> str:
    """A user message that asks something of some material (an input, a context, passages found): one form everywhere,
    so that a template can tell the two apart."""
    return f"{request}{INPUT_HEADING}{material}" if material else request


def record_to_json(record: Record) -> dict[str, Any]:
    """The JSON form of any record; conversations in the OpenAI form."""
    match record:
        case Conversation():
            return record.to_json()
        case Preference():
            return {"prompt": record.prompt.to_json()["messages"], "chosen": record.chosen, "rejected": record.rejected}
        case Feedback():
            return {
                "prompt": record.prompt.to_json()["messages"],
                "completion": record.completion,
                "score": record.score,
            }
        case Text():
            return {"text": record.content}


def record_key(record: Record) -> str:
    """sha256 (hex) of the record's content: equal content, equal key, whatever file or position it came from."""
    text = json.dumps(record_to_json(record), sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
