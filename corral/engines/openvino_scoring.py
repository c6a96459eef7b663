"""Scores of given ids by OpenVINO: their log-probabilities, and the most likely ids at each position.

GenAI returns the log-probability of one id (as of 2026.4), so they come from plain inference. A text takes as much time as a
prompt of its length; one after another is computed, a part at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from corral.engines.openvino_inference import PART_TOKENS, Inference, Model

Key: TypeAlias = tuple[int, int | None]


@dataclass
class Text:
    """A text to score."""

    ids: list[int]
    start: int
    """The first id that is scored; not the first of the text."""
    top: int
    """How many of the most likely ids at each position are wanted."""
    inference: Inference | None = None


@dataclass
class Part:
    """Scores of the next ids of a text."""

    logprobs: list[float] = field(default_factory=list[float])
    tops: list[list[tuple[int, float]]] = field(default_factory=list[list[tuple[int, float]]])
    """The most likely (id, log-probability) at each position, if any are wanted."""
    failure: str | None = None
    """Why there are no more."""


class Scorer:
    """Scores texts, the oldest first."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._texts: dict[Key, Text] = {}

    @property
    def busy(self) -> bool:
        """Whether a step has something to compute."""
        return bool(self._texts)

    def add(self, key: Key, text: Text) -> None:
        """Take a text, whose parts `step` yields under this key."""
        self._texts[key] = text

    def cancel(self, request: int, choice: int | None) -> None:
        """Drop one choice of a request, or all."""
        for key in [key for key in self._texts if key[0] == request and choice in (None, key[1])]:
            del self._texts[key]

    def step(self) -> Iterator[tuple[Key, Part, bool]]:
        """Compute up to PART_TOKENS. Yields parts, and whether each is the last of its text."""
        left = PART_TOKENS
        while self._texts and left > 0:
            key, text = next(iter(self._texts.items()))
            begin = text.inference.computed if text.inference else 0
            end = min(begin + left, len(text.ids) - 1)  # nothing follows the last id
            left -= end - begin
            try:
                part = self._score(text, begin, end)
            except Exception as error:  # one text that fails must not end the others
                part = Part(failure=f"{type(error).__name__}: {error}")
            is_last = part.failure is not None or end == len(text.ids) - 1
            if is_last:
                del self._texts[key]
            yield key, part, is_last

    def _score(self, text: Text, begin: int, end: int) -> Part:
        """Compute these ids of a text."""
        inference = text.inference = text.inference or self._model.new_inference()
        logits = inference.logits(text.ids[:end])
        part = Part()
        for position in range(max(begin, text.start - 1), end):
            row = logits[position - begin]
            shifted = row - row.max()
            total = math.log(np.exp(shifted).sum())
            if not math.isfinite(total):
                return Part(failure="the model's logits are not finite numbers")
            part.logprobs.append(float(shifted[text.ids[position + 1]]) - total)
            if text.top:
                best = np.argpartition(shifted, -min(text.top, len(row)))[-text.top :]
                ranked = best[np.argsort(-shifted[best], kind="stable")]
                part.tops.append([(int(id_), float(shifted[id_]) - total) for id_ in ranked])
        return part
