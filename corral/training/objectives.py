"""Losses that training minimises, as short maths on log-probabilities.

An objective gets the log-probabilities of the trained tokens of each example's sequences and returns a sum over units
(trained tokens, pairs …). The loop divides by the units of the whole step, so that the result does not depend on how a
step is split into forward passes or over devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from corral.messages import Conversation, Record, Text

if TYPE_CHECKING:
    from torch import Tensor

    from corral.data.example_store import Example
    from corral.template import Encoded


class Objective(Protocol):
    """A loss over examples.

    Attributes:
        name: as a recipe's `objective` names it.
        takes: types of the records that it trains.
    """

    name: str
    takes: tuple[type[Record], ...]

    def units(self, example: Example) -> int:
        """The example's weight in the mean of a step."""
        ...

    def loss(self, examples: Sequence[Example], logprobs: Sequence[Sequence[Tensor]]) -> Tensor:
        """The loss summed over units.

        Args:
            examples: k examples.
            logprobs: for each example and each of its sequences a float32 tensor, [its trained tokens].

        Returns: a scalar.
        """
        ...


class Sft:
    """Supervised fine-tuning: the negative log-likelihood of the trained tokens."""

    name = "sft"
    takes: tuple[type[Record], ...] = (Conversation, Text)

    def units(self, example: Example) -> int:
        """Trained tokens."""
        return sum(len(trained_positions(sequence)) for sequence in example.sequences)

    def loss(self, examples: Sequence[Example], logprobs: Sequence[Sequence[Tensor]]) -> Tensor:
        """−Σ log π(token | preceding tokens)."""
        import torch

        return -torch.cat([t for sequences in logprobs for t in sequences]).sum()


def trained_positions(sequence: Encoded) -> list[int]:
    """Positions whose tokens are trained; the first token of a sequence has no prediction and never counts."""
    return [i for i, trained in enumerate(sequence.trained) if trained and i]


OBJECTIVES: dict[str, Objective] = {"sft": Sft()}
