"""The interface between the training loop and what it minimises, and fine-tuning on answers (`alignment_losses` has the rest).

An objective gets log-probabilities of the trained tokens of examples and returns sums: of the terms of its loss, and of its
metrics. The loop adds them up over the whole step and over all processes, and only then divides each term by its own number
of units (trained tokens, pairs …). So the result does not depend on how a step is split into forward passes or over devices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from corral.data.example_store import Example
    from corral.template import Encoded


@dataclass(frozen=True, slots=True)
class Scored:
    """An example and its log-probabilities.

    Args:
        example: k sequences, or those of them that the objective asks for.
        policy: for each sequence a float32 tensor, [its trained tokens], under the model in training.
        reference: for each sequence the sum over its trained tokens under the reference; empty if the objective needs none.
    """

    example: Example
    policy: tuple[Tensor, ...]
    reference: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over examples.

    Args:
        terms: of each term of the loss, a scalar.
        metrics: of each metric, a scalar and the number of values in it.
    """

    terms: tuple[Tensor, ...]
    metrics: Mapping[str, tuple[Tensor, int]] = field(default_factory=dict[str, "tuple[Tensor, int]"])

    def detach(self) -> Sums:
        """The same values, which keep nothing of the pass that computed them."""
        metrics = {name: (value.detach(), count) for name, (value, count) in self.metrics.items()}
        return Sums(tuple(term.detach() for term in self.terms), metrics)


class Objective(ABC):
    """A loss over examples: Σ over its terms of weight × sum / count, both taken over a step.

    Attributes:
        needs_reference: whether it compares the model with the one that the stage starts from.
        statistic_sequences: how many of an example's last sequences only the statistic reads, not the loss.
        weights: of its terms.
        metrics: names of its metrics.
    """

    needs_reference: ClassVar[bool] = False
    statistic_sequences: ClassVar[int] = 0
    weights: tuple[float, ...] = (1.0,)
    metrics: tuple[str, ...] = ()

    def is_good(self, example: Example) -> bool:
        """Whether its first answer should become more likely."""
        return True

    @abstractmethod
    def counts(self, example: Example) -> tuple[int, ...]:
        """The units of each term that the example has."""

    def statistic(self, batch: Sequence[Scored]) -> Tensor:
        """The sum over the batch of a value whose mean over a step is known before any gradient is computed.

        Args:
            batch: scored without gradients; its log-probabilities are those of the last `statistic_sequences` only.
        """
        raise NotImplementedError

    @abstractmethod
    def sums(self, batch: Sequence[Scored], statistic: float) -> Sums:
        """The terms and metrics summed over a batch.

        Args:
            batch: at least one example, without the sequences that only the statistic reads.
            statistic: its mean over the step; 0 for an objective that has none.
        """

    def summarise(self, means: dict[str, float]) -> dict[str, float]:
        """The means of the metrics with what follows from them; of a metric without values there is none."""
        return means


class Sft(Objective):
    """Supervised fine-tuning: the negative log-likelihood of the trained tokens."""

    def counts(self, example: Example) -> tuple[int, ...]:
        """Trained tokens."""
        return (sum(len(trained_positions(sequence)) for sequence in example.sequences),)

    def sums(self, batch: Sequence[Scored], statistic: float) -> Sums:
        """−Σ log π(token | preceding tokens)."""
        import torch

        return Sums((-torch.cat([t for scored in batch for t in scored.policy]).sum(),))


def trained_positions(sequence: Encoded) -> list[int]:
    """Positions whose tokens are trained; the first token of a sequence has no prediction and never counts."""
    return [i for i, trained in enumerate(sequence.trained) if trained and i]
