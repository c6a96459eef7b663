"""Prompting: a Conversation → the Conversation that a model is asked: solved examples first, steps before the result.

Examples become turns before the question, so that a template says them as it says everything else. It does not know
templates, tokens or where examples come from; sentence embeddings come from outside.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from corral.messages import Conversation, Message
from corral.metrics.answer_extraction import MARKER

Choose: TypeAlias = Literal["static", "similar"]
Embed: TypeAlias = Callable[[Sequence[str]], NDArray[np.float64]]

STEPS = f"Think step by step. Then give the result in a last line that begins with `{MARKER}`"
"""What is added to a question for a chain of thought (Wei et al. 2022, arXiv 2201.11903; Kojima et al. 2022, 2205.11916)."""

POOL = 2000
"""Examples of which similar ones are looked for: the first so many in an order drawn by the seed. Reading one takes
some milliseconds."""


class Prompting:
    """Few-shot prompting (Brown et al. 2020, arXiv 2005.14165) and chain of thought.

    Args:
        examples: answered conversations of one turn (others are left out).
        count: how many are shown.
        choose: `static`, the same for all; `similar`, those nearest in meaning to the question (Liu et al. 2022, arXiv
            2101.06804), the nearest last.
        reasoning: ask for steps before the result.
        embed: texts → [n, d] vectors of length 1; needed by `similar`.
        seed: of the choice of static examples, and of the pool that similar ones are taken from.
    """

    def __init__(
        self,
        examples: Sequence[Conversation] = (),
        count: int = 0,
        choose: Choose = "static",
        *,
        reasoning: bool = False,
        embed: Embed | None = None,
        seed: int = 0,
    ) -> None:
        usable = [example for example in examples if example.answered and _turns(example) == ["user", "assistant"]]
        drawn = random.Random(seed).sample(usable, len(usable))
        self.count = count
        self.choose = choose
        self.reasoning = reasoning
        # One more than asked for: a question is never shown its own answer.
        self._pool = drawn[:POOL] if choose == "similar" else drawn[: count + 1]
        self._questions = [_question(example) for example in self._pool]
        self._embed = embed
        self._vectors: NDArray[np.float64] | None = None
        self._lock = threading.Lock()
        if choose == "similar" and count and embed is None:
            raise ValueError("similar examples need `embed`")

    @property
    def examples(self) -> int:
        """How many examples there are to choose from."""
        return len(self._pool)

    def shots(self, conversation: Conversation) -> list[Conversation]:
        """The examples for a question, those to be shown first at the front; never the question itself.

        Safe to call from several threads.
        """
        if not self.count or not self._pool:
            return []
        question = _question(conversation)
        others = [i for i, other in enumerate(self._questions) if other.strip() != question.strip()]
        if self.choose == "similar":
            assert self._embed is not None
            with self._lock:
                if self._vectors is None:
                    self._vectors = self._embed(self._questions)
            likeness = self._vectors @ self._embed([question])[0]
            # Nearest last, beside the question; equal ones in the pool's order.
            others = sorted(others, key=lambda i: (-likeness[i], i))[: self.count][::-1]
        return [self._pool[i] for i in others[: self.count]]

    def asked(self, conversation: Conversation, shots: Sequence[Conversation]) -> Conversation:
        """The conversation, which ends with the user, after its examples and with the wish for steps."""
        messages = after(shots, conversation).messages
        if not self.reasoning:
            return Conversation(messages)
        return Conversation((*messages[:-1], Message("user", f"{messages[-1].content}\n\n{STEPS}")))


def after(shots: Sequence[Conversation], conversation: Conversation) -> Conversation:
    """A conversation with examples before its first question; its system message, if it has one, stays first."""
    start = 1 if conversation.messages and conversation.messages[0].role == "system" else 0
    shown = tuple(m for shot in shots for m in shot.messages if m.role != "system")
    return Conversation((*conversation.messages[:start], *shown, *conversation.messages[start:]))


def _turns(conversation: Conversation) -> list[str]:
    return [message.role for message in conversation.messages if message.role != "system"]


def _question(conversation: Conversation) -> str:
    """The last thing that the user said."""
    return next((m.content for m in reversed(conversation.messages) if m.role == "user"), "")
