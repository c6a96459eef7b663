"""Shows passages of documents in a question: numbered, in the user's message, as many as a budget of tokens allows.

Passages are data: they follow the heading that all material about a request has (`messages.INPUT_HEADING`), never in a system
message, and the template escapes their special strings as those of all user text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from corral.messages import Conversation, Message, with_input
from corral.retrieval.passages import Hit, Passage

_SENTENCE_END = re.compile(r"[.!?](?=\s)|[。！？]|\n")
_FEWEST_CHARACTERS = 80
"""A passage is left out rather than cut to less."""


def search_text(conversation: Conversation, characters: int = 2000) -> str:
    """What passages are looked for: the last question, then the user's earlier ones, the latest first, within a length."""
    questions = [message.content for message in reversed(conversation.messages) if message.role == "user"]
    return "\n".join(questions)[:characters]


def show_passages(conversation: Conversation, passages: Sequence[Passage]) -> Conversation:
    """A conversation that ends with the user, with passages in its last message, numbered from 1."""
    if not passages:
        return conversation
    *before, last = conversation.messages
    shown = "\n\n".join(
        f"[{number}] {passage.heading_path}\n{passage.text}" for number, passage in enumerate(passages, 1)
    )
    return Conversation((*before, Message(last.role, with_input(last.content, shown))))


def fit_hits(hits: Sequence[Hit], fits: Callable[[Sequence[Hit]], bool]) -> tuple[Hit, ...]:
    """The first hits, in their order, that fit; the one that does not is cut at the end of a sentence, if much of it is left.

    Args:
        fits: whether a prompt with these hits is within the budget; called about log2 of the number of hits, and of the
            sentences of one.
    """
    whole = _most(len(hits), lambda count: fits(hits[:count]))
    if whole == len(hits):
        return tuple(hits)
    text = hits[whole].passage.text
    ends = [end for match in _SENTENCE_END.finditer(text) if _FEWEST_CHARACTERS <= (end := match.end()) < len(text)]

    def cut(end: int) -> Hit:
        hit = hits[whole]
        return replace(hit, passage=replace(hit.passage, text=text[:end].rstrip()))

    kept = _most(len(ends), lambda count: fits([*hits[:whole], cut(ends[count - 1])]))
    return (*hits[:whole], cut(ends[kept - 1])) if kept else tuple(hits[:whole])


def _most(highest: int, holds: Callable[[int], bool]) -> int:
    """The greatest number from 0 to `highest` for which a condition holds that holds for all smaller ones."""
    low, high = 0, highest
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
