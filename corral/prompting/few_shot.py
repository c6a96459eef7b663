"""Adds solved examples before a question, and the instruction to think step by step: Conversation → Conversation.

Examples become messages, so that the chat template renders them like all others. Embeddings are passed in.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from corral.messages import Conversation, Message
from corral.metrics.answer_extraction import RESULT_MARKER

Choose: TypeAlias = Literal["static", "similar"]
Embed: TypeAlias = Callable[[Sequence[str]], NDArray[np.float64]]

STEP_BY_STEP = f"Think step by step. Then give the result in a last line that begins with `{RESULT_MARKER}`"
"""Added to a question for a chain of thought (Wei et al. 2022, arXiv 2201.11903; Kojima et al. 2022, 2205.11916)."""

POOL_SIZE = 2000
"""Similar examples are looked for among so many, drawn by the seed: embedding one takes milliseconds."""


class Prompting:
    """Few-shot prompting (Brown et al. 2020, arXiv 2005.14165) and chain of thought.

    Args:
        examples: answered conversations; those of more than one turn are left out.
        count: how many are shown.
        choose: `static`, the same for all questions; `similar`, those whose questions are most similar (Liu et al. 2022,
            arXiv 2101.06804), the most similar one last.
        reasoning: ask for steps before the result.
        embed: texts → [n, d] vectors of length 1; needed by `similar`.
        seed: draws the static examples, and the pool of similar ones.
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
        if choose == "similar" and count and embed is None:
            raise ValueError("similar examples need `embed`")
        usable = [example for example in examples if example.answered and _turn_roles(example) == ["user", "assistant"]]
        drawn = random.Random(seed).sample(usable, len(usable))
        self.count = count
        self.choose = choose
        self.reasoning = reasoning
        # One more than shown, as a question is never shown its own answer.
        self._pool = drawn[:POOL_SIZE] if choose == "similar" else drawn[: count + 1]
        self._questions = [_last_question(example).strip() for example in self._pool]
        self._embed = embed
        self._vectors: NDArray[np.float64] | None = None
        self._lock = threading.Lock()

    @property
    def example_count(self) -> int:
        """How many examples there are to choose from."""
        return len(self._pool)

    def choose_examples(self, conversation: Conversation) -> list[Conversation]:
        """The examples for a question, in the order in which they are shown; never the question itself. Thread-safe."""
        if not self.count or not self._pool:
            return []
        question = _last_question(conversation).strip()
        others = [i for i, other in enumerate(self._questions) if other != question]
        if self.choose == "similar":
            assert self._embed is not None
            with self._lock:
                if self._vectors is None:
                    self._vectors = self._embed(self._questions)
            similarity = self._vectors @ self._embed([question])[0]
            # The most similar one last, next to the question; equally similar ones in the order of the pool.
            others = sorted(others, key=lambda i: (-similarity[i], i))[: self.count][::-1]
        return [self._pool[i] for i in others[: self.count]]

    def example_sets(self, conversation: Conversation) -> list[list[Conversation]]:
        """The examples for a question, then ever fewer of them, for prompts that do not fit the context.

        The first ones are dropped first: the most useful stand next to the question. Thread-safe.
        """
        examples = self.choose_examples(conversation)
        return [examples[dropped:] for dropped in range(len(examples))]

    def apply(self, conversation: Conversation, examples: Sequence[Conversation]) -> Conversation:
        """The conversation, which ends with the user or the system, with examples before it and the instruction for steps."""
        messages = insert_examples(examples, conversation).messages
        if not self.reasoning or not messages:
            return Conversation(messages)
        last = messages[-1]
        return Conversation((*messages[:-1], Message(last.role, f"{last.content}\n\n{STEP_BY_STEP}")))


def insert_examples(examples: Sequence[Conversation], conversation: Conversation) -> Conversation:
    """A conversation with examples before its first question, after its system message if it has one."""
    start = 1 if conversation.messages and conversation.messages[0].role == "system" else 0
    shown = tuple(m for example in examples for m in example.messages if m.role != "system")
    return Conversation((*conversation.messages[:start], *shown, *conversation.messages[start:]))


def _turn_roles(conversation: Conversation) -> list[str]:
    return [message.role for message in conversation.messages if message.role != "system"]


def _last_question(conversation: Conversation) -> str:
    return next((m.content for m in reversed(conversation.messages) if m.role == "user"), "")
