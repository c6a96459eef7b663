"""Answers under the prompts of other rows, as KTO's estimate of the KL divergence needs them."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np

from corral.data.example_store import Example, Ints, SizedExamples
from corral.template import Encoded
from corral.training.single_answers import SingleAnswers


class MismatchedRows(SizedExamples):
    """Answers to prompts, each with a second sequence: its prompt and the answer of the nearest row before it that has another
    prompt; before the first row comes the last. They are the same in every step, so that a reference can be computed ahead.

    A second sequence is cut to the longer of the two rows that it is made of.

    Attributes:
        answers: the rows without their second sequences.

    Args:
        rows: of at least two different prompts.
    """

    def __init__(self, rows: SingleAnswers) -> None:
        self.answers, prompts = rows, rows.prompts
        begins = np.flatnonzero(prompts != np.roll(prompts, 1))  # where the prompt differs from that of the row before
        assert len(begins), "all rows have one prompt"
        # A begin of -1 stands for the last one: rows before the first begin continue the last rows.
        run = np.searchsorted(begins, np.arange(len(prompts)), side="right") - 1
        self._before = (begins[run] - 1) % len(prompts)
        own, other = rows.lengths, rows.lengths[self._before]
        joined = rows.starts + other - rows.starts[self._before]
        self.lengths = own + np.minimum(joined, np.maximum(own, other))
        self.trained_tokens = rows.trained_tokens

    @property
    def loss_lengths(self) -> Ints:
        """Those of the rows."""
        return self.answers.lengths

    @cached_property
    def digest(self) -> str:
        """That of the rows."""
        return self.answers.digest

    def __len__(self) -> int:
        return len(self.answers)

    def example(self, index: int) -> Example:
        """The row with its second sequence."""
        row, before = self.answers[index], self.answers[int(self._before[index])]
        (own,), (other,) = row.sequences, before.sequences
        return replace(row, sequences=(own, _join(own, other)))


def _join(prompt: Encoded, answer: Encoded) -> Encoded:
    """The prompt of one sequence with the answer of another."""
    end, start = prompt.trained.index(True), answer.trained.index(True)
    longest = max(len(prompt.ids), len(answer.ids))
    ids, trained = prompt.ids[:end] + answer.ids[start:], prompt.trained[:end] + answer.trained[start:]
    return Encoded(ids[:longest], trained[:longest])
