"""What training minimises: short maths on log-probabilities.

An objective sees the log-probabilities of the trained tokens of each example's sequences, and returns a sum over units
(trained tokens, pairs …). The loop divides by the units of the whole step, so that the result does not depend on how a
step is split into forward passes or over devices. Objectives know nothing about models, packs or optimizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from corral.data.prepare import Example


class Objective(Protocol):
    """One way to train."""

    name: str

    def units(self, example: Example) -> int:
        """What the example counts for in the mean of a step."""
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

    def units(self, example: Example) -> int:
        """Trained tokens; the first token of a sequence is predicted by nothing and never counts."""
        return sum(sum(sequence.trained[1:]) for sequence in example.sequences)

    def loss(self, examples: Sequence[Example], logprobs: Sequence[Sequence[Tensor]]) -> Tensor:
        """−Σ log π(token | what precedes it)."""
        import torch

        return -torch.cat([t for sequences in logprobs for t in sequences]).sum()


OBJECTIVES: dict[str, Objective] = {"sft": Sft()}
