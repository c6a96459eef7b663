"""Answers under the prompts of other rows, as KTO's estimate of the KL divergence needs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from corral.data.example_store import Example, ExampleSequence
from corral.template import Encoded


class MismatchedRows(ExampleSequence[Example]):
    """The rows of answers to prompts, each with a second sequence: its prompt and the answer of the row before it; of the
    first row, of the last. The pairs are the same in every step, so that a reference can be computed ahead.

    A second sequence is cut to the longer of the two rows that it is made of.
    """

    def __init__(self, rows: Sequence[Example]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def example(self, index: int) -> Example:
        """The row with its second sequence."""
        row, before = self._rows[index], self._rows[(index or len(self)) - 1]
        (own,), (other,) = row.sequences, before.sequences
        return replace(row, sequences=(own, _join(own, other)))


def _join(prompt: Encoded, answer: Encoded) -> Encoded:
    """The prompt of one sequence with the answer of another."""
    end, start = prompt.trained.index(True), answer.trained.index(True)
    longest = max(len(prompt.ids), len(answer.ids))
    ids, trained = prompt.ids[:end] + answer.ids[start:], prompt.trained[:end] + answer.trained[start:]
    return Encoded(ids[:longest], trained[:longest])
