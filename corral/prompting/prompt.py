"""What a model is asked: the token ids of a prompt, and what it shows besides the question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from corral.messages import Conversation
from corral.retrieval.passages import Hit


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as an engine reads it.

    Args:
        ids: all of it, with its template.
        examples: solved questions before the question, in the order shown.
        passages: numbered from 1 in this order; a citation `[n]` means the n-th.
    """

    ids: Sequence[int]
    examples: tuple[Conversation, ...] = ()
    passages: tuple[Hit, ...] = ()
