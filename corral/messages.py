"""The records that data rows become: Conversation, Preference, Feedback, Text.

Records are frozen, compare by content and have one JSON form, which `record_key` hashes: equal content has the same key,
wherever it was read from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

INPUT_HEADING = "\n\n### Input:\n"
"""In a user message, the heading between a request and the material that it is about."""

Role: TypeAlias = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Args:
        role: who writes it.
        content: plain text, also where it looks like a special token.
        trained: for an answer, whether it is trained on; otherwise it is context, as every other turn is.
    """

    role: Role
    content: str
    trained: bool = True

    def to_json(self) -> dict[str, Any]:
        """`{"role", "content"}`, with `"trained": false` for an answer that is not trained on."""
        mark: dict[str, Any] = {} if self.trained else {"trained": False}
        return {"role": self.role, "content": self.content, **mark}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order: at most one system message, at the start; then user and assistant turns."""

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
        """Number of characters of all messages together."""
        return sum(len(message.content) for message in self.messages)

    def add(self, role: Role, content: str) -> Conversation:
        """A copy with one more turn; for many turns use `from_turns`."""
        return replace(self, messages=(*self.messages, Message(role, content)))

    def split_answer(self) -> tuple[Conversation, str]:
        """(the conversation before the last turn, the last answer). The conversation must be `answered`."""
        assert self.answered, "split_answer needs a conversation that ends with an answer"
        return Conversation(self.messages[:-1]), self.messages[-1].content

    def to_json(self) -> dict[str, Any]:
        """`{"messages": [{"role", "content"}, …]}`, the OpenAI form; see `Message.to_json`."""
        return {"messages": [message.to_json() for message in self.messages]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Conversation:
        """The inverse of `to_json`; rows of other programs are read by `data.formats`."""
        return cls(tuple(Message(m["role"], m["content"], m.get("trained", True)) for m in value["messages"]))


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt with a better and a worse answer."""

    prompt: Conversation
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class Feedback:
    """A prompt with an answer and the answer's score in [0, 1]."""

    prompt: Conversation
    completion: str
    score: float


@dataclass(frozen=True, slots=True)
class Text:
    """A plain document, without turns or template; all of it is trained on."""

    content: str


Record: TypeAlias = Conversation | Preference | Feedback | Text
RECORD_TYPES: tuple[type[Record], ...] = (Conversation, Preference, Feedback, Text)
"""In the order in which stored rows number them."""


def with_input(request: str, material: str) -> str:
    """A user message of a request and the material it is about (an input, a context, retrieved passages), in the one form
    that templates can split again."""
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


def record_from_json(row: Mapping[str, Any]) -> Record:
    """The inverse of `record_to_json`; other keys are ignored."""
    kind = record_type(row)
    if kind is Text:
        return Text(row["text"])
    if kind is Conversation:
        return Conversation.from_json(dict(row))
    prompt = Conversation.from_json({"messages": row["prompt"]})
    if kind is Preference:
        return Preference(prompt, row["chosen"], row["rejected"])
    return Feedback(prompt, row["completion"], row["score"])


def record_type(row: Mapping[str, Any]) -> type[Record]:
    """The type of the record with this JSON form."""
    if "text" in row:
        return Text
    if "messages" in row:
        return Conversation
    return Preference if "chosen" in row else Feedback


def record_key(record: Record) -> str:
    """sha256 (hex) of the record's content; file and position do not matter."""
    text = json.dumps(record_to_json(record), sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
