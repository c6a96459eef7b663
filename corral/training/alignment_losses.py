"""Objectives that align a model with preferences, as short maths on log-probabilities.

π is the model in training, and r = log π(answer | prompt) − log π_reference(answer | prompt), summed over the answer's tokens
unless it says per token. The settings of each are in `corral.recipe.alignment`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from corral.messages import Feedback
from corral.model.compute.gpu_attention import copy_to
from corral.training.objectives import Objective, Scored, Sums, trained_positions

if TYPE_CHECKING:
    from corral.data.example_store import Example
    from corral.recipe import alignment as settings

_METRICS = ("reward_chosen", "reward_rejected", "reward_accuracy", "logprob_chosen", "logprob_rejected")


def dpo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """−log σ(β (r_chosen − r_rejected))."""
    return -logsigmoid(beta * (chosen - rejected))


def ipo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """(r_chosen − r_rejected − 1 / 2β)², with r per token."""
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def orpo_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """−log σ(log odds of chosen − log odds of rejected), of log-probabilities per token."""
    return -logsigmoid(log_odds(chosen) - log_odds(rejected))


def simpo_loss(chosen: Tensor, rejected: Tensor, beta: float, margin: float) -> Tensor:
    """−log σ(β (log π_chosen − log π_rejected) − γ), with log π per token."""
    return -logsigmoid(beta * (chosen - rejected) - margin)


def kto_loss(ratio: Tensor, good: Tensor, kl: float, beta: float) -> Tensor:
    """1 − σ(β (r − KL)) of good answers, 1 − σ(β (KL − r)) of bad ones."""
    return 1 - torch.sigmoid(beta * torch.where(good, ratio - kl, kl - ratio))


def ulma_loss(ratio: Tensor, beta: float, c: float) -> Tensor:
    """−log σ(−β r − c) of bad answers."""
    return -logsigmoid(-beta * ratio - c)


def ulma_continuous_loss(ratio: Tensor, score: Tensor, beta: float, c: float) -> Tensor:
    """(score − β r − c)² of bad answers."""
    return (score - beta * ratio - c) ** 2


def log_odds(logprob: Tensor) -> Tensor:
    """log(p / (1 − p)) of log p < 0, exact for p near 0 and near 1; of an answer that is certain in float32, as of one with
    log p = −1e-6."""
    logprob = logprob.clamp(max=-1e-6)
    near_one = logprob > -math.log(2)
    # Each branch gets only values that it can differentiate.
    small = torch.log1p(-torch.exp(torch.where(near_one, -1.0, logprob)))
    large = torch.log(-torch.expm1(torch.where(near_one, logprob, -1.0)))
    return logprob - torch.where(near_one, large, small)


@dataclass(frozen=True, slots=True)
class Answers:
    """Log-probabilities of answers. [examples, sequences of each]

    Args:
        policy: summed over the answer's tokens.
        reference: the same under the reference; zeros without one.
        lengths: tokens.
    """

    policy: Tensor
    reference: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, batch: Sequence[Scored]) -> Answers:
        """Those of a batch."""
        policy = torch.stack([torch.stack([logprobs.sum() for logprobs in scored.policy]) for scored in batch])
        lengths = [[float(len(logprobs)) for logprobs in scored.policy] for scored in batch]
        reference = [scored.reference or (0.0,) * len(scored.policy) for scored in batch]
        return cls(policy, *(copy_to(torch.tensor(values), policy.device) for values in (reference, lengths)))

    def ratios(self, *, per_token: bool) -> Tensor:
        """r; without a reference log π."""
        ratios = self.policy - self.reference
        return ratios / self.lengths if per_token else ratios


class PairObjective(Objective):
    """A loss of each pair, and optionally the negative log-likelihood of the chosen answers per token.

    Args:
        weight: of the pairs' loss.
        nll_weight: of the second term; without it at 0.
    """

    metrics = (*_METRICS, "reward_margin", "preference_loss")

    def __init__(self, weight: float = 1.0, nll_weight: float = 0.0) -> None:
        self.weights = (weight, nll_weight) if nll_weight else (weight,)

    @abstractmethod
    def losses(self, answers: Answers) -> tuple[Tensor, Tensor]:
        """(loss, [pairs]; rewards of chosen and rejected, [pairs, 2])."""

    def counts(self, example: Example) -> tuple[int, ...]:
        """One pair, and the chosen answer's tokens."""
        return (1, len(trained_positions(example.sequences[0])))[: len(self.weights)]

    def sums(self, batch: Sequence[Scored], statistic: float) -> Sums:
        """The pairs' loss, then the negative log-likelihood of the chosen answers."""
        answers, n = Answers.of(batch), len(batch)
        losses, rewards = self.losses(answers)
        terms = (losses.sum(), -answers.policy[:, 0].sum())
        values = {
            "reward_chosen": rewards[:, 0],
            "reward_rejected": rewards[:, 1],
            "reward_accuracy": _share_above(rewards[:, 0] - rewards[:, 1]),
            "logprob_chosen": answers.policy[:, 0],
            "logprob_rejected": answers.policy[:, 1],
            "reward_margin": rewards[:, 0] - rewards[:, 1],
            "preference_loss": losses,
        }
        return Sums(terms[: len(self.weights)], {name: (value.sum(), n) for name, value in values.items()})


class Dpo(PairObjective):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290)."""

    needs_reference = True

    def __init__(self, config: settings.Dpo) -> None:
        super().__init__(nll_weight=config.sft_weight)
        self.config = config

    def losses(self, answers: Answers) -> tuple[Tensor, Tensor]:
        """See `dpo_loss`; the reward is β r."""
        ratios, beta = answers.ratios(per_token=self.config.normalise), self.config.beta
        return dpo_loss(ratios[:, 0], ratios[:, 1], beta), beta * ratios


class Ipo(PairObjective):
    """Identity preference optimisation (Azar et al. 2023, arXiv 2310.12036)."""

    needs_reference = True

    def __init__(self, config: settings.Ipo) -> None:
        super().__init__()
        self.config = config

    def losses(self, answers: Answers) -> tuple[Tensor, Tensor]:
        """See `ipo_loss`; the reward is β r, per token."""
        ratios, beta = answers.ratios(per_token=True), self.config.beta
        return ipo_loss(ratios[:, 0], ratios[:, 1], beta), beta * ratios


class Orpo(PairObjective):
    """Odds ratio preference optimisation (Hong et al. 2024, arXiv 2403.07691)."""

    def __init__(self, config: settings.Orpo) -> None:
        super().__init__(config.odds_weight, nll_weight=1.0)
        self.config = config

    def losses(self, answers: Answers) -> tuple[Tensor, Tensor]:
        """See `orpo_loss`; the reward is λ log π, per token."""
        logprobs = answers.ratios(per_token=True)
        return orpo_loss(logprobs[:, 0], logprobs[:, 1]), self.config.odds_weight * logprobs


class Simpo(PairObjective):
    """Simple preference optimisation (Meng et al. 2024, arXiv 2405.14734)."""

    def __init__(self, config: settings.Simpo) -> None:
        super().__init__()
        self.config = config

    def losses(self, answers: Answers) -> tuple[Tensor, Tensor]:
        """See `simpo_loss`; the reward is β log π, per token."""
        logprobs, beta = answers.ratios(per_token=True), self.config.beta
        return simpo_loss(logprobs[:, 0], logprobs[:, 1], beta, self.config.margin), beta * logprobs


class FeedbackObjective(Objective):
    """A loss of single answers, which are good or bad by their score.

    Args:
        threshold: the lowest score of a good answer.
    """

    needs_reference = True
    metrics = _METRICS

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def is_good(self, example: Example) -> bool:
        """Whether the answer's score reaches the threshold."""
        return _score(example) >= self.threshold

    def good(self, batch: Sequence[Scored], like: Tensor) -> Tensor:
        """Whether each answer is good, where another tensor is. [batch]"""
        return copy_to(torch.tensor([self.is_good(scored.example) for scored in batch]), like.device)

    def measure(
        self, batch: Sequence[Scored], logprobs: Tensor, rewards: Tensor, baseline: float = 0.0
    ) -> dict[str, tuple[Tensor, int]]:
        """The metrics summed over a batch.

        Args:
            logprobs, rewards: of the answers. [batch] each
            baseline: the reward of a good answer should be above it, that of a bad one below.
        """
        good, count, n = self.good(batch, rewards), sum(self.is_good(scored.example) for scored in batch), len(batch)
        right = _share_above(torch.where(good, rewards - baseline, baseline - rewards))
        return {
            "reward_chosen": (torch.where(good, rewards, 0.0).sum(), count),
            "reward_rejected": (torch.where(good, 0.0, rewards).sum(), n - count),
            "reward_accuracy": (right.sum(), n),
            "logprob_chosen": (torch.where(good, logprobs, 0.0).sum(), count),
            "logprob_rejected": (torch.where(good, 0.0, logprobs).sum(), n - count),
        }

    def summarise(self, means: dict[str, float]) -> dict[str, float]:
        """With the difference of the mean rewards of good and bad answers, if there are both."""
        if "reward_chosen" in means and "reward_rejected" in means:
            return {**means, "reward_margin": means["reward_chosen"] - means["reward_rejected"]}
        return means


class Kto(FeedbackObjective):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv 2402.01306).

    An example has a second sequence, its prompt with the answer of another row, for the KL (see `mismatched_rows`).
    """

    statistic_sequences = 1
    metrics = (*_METRICS, "kl")

    def __init__(self, config: settings.Kto) -> None:
        super().__init__(config.threshold)
        self.config = config

    def counts(self, example: Example) -> tuple[int, ...]:
        """One answer."""
        return (1,)

    def statistic(self, batch: Sequence[Scored]) -> Tensor:
        """r of the mismatched answers."""
        return Answers.of(batch).ratios(per_token=False).sum()

    def sums(self, batch: Sequence[Scored], statistic: float) -> Sums:
        """See `kto_loss`; the reward is β r."""
        config, kl = self.config, max(0.0, statistic)
        answers = Answers.of(batch)
        ratios = answers.ratios(per_token=False)[:, 0]
        good = self.good(batch, ratios)
        weights = torch.where(good, config.desirable_weight, config.undesirable_weight)
        metrics = self.measure(batch, answers.policy[:, 0], config.beta * ratios, config.beta * kl)
        metrics["kl"] = (torch.full_like(ratios, kl).sum(), len(batch))
        return Sums(((weights * kto_loss(ratios, good, kl, config.beta)).sum(),), metrics)


class Ulma(FeedbackObjective):
    """ULMA (Cai et al. 2023, arXiv 2312.02554): likelihood of good answers, a pointwise preference loss of bad ones."""

    weights = (1.0, 1.0)

    def __init__(self, config: settings.Ulma) -> None:
        super().__init__(config.threshold)
        self.config = config

    def counts(self, example: Example) -> tuple[int, ...]:
        """One good answer or one bad answer."""
        return (1, 0) if self.is_good(example) else (0, 1)

    def sums(self, batch: Sequence[Scored], statistic: float) -> Sums:
        """Of good answers the negative log-likelihood per token, of bad ones `ulma_loss`; the reward is β r."""
        config = self.config
        answers = Answers.of(batch)
        ratios = answers.ratios(per_token=config.normalise)[:, 0]
        good = self.good(batch, ratios)
        if config.continuous:
            scores = copy_to(torch.tensor([_score(scored.example) for scored in batch]), ratios.device)
            bad_losses = ulma_continuous_loss(ratios, scores, config.beta, config.c)
        else:
            bad_losses = ulma_loss(ratios, config.beta, config.c)
        good_losses = -answers.policy[:, 0] / answers.lengths[:, 0]
        terms = torch.where(good, good_losses, 0.0).sum(), torch.where(good, 0.0, bad_losses).sum()
        return Sums(terms, self.measure(batch, answers.policy[:, 0], config.beta * ratios))


def _share_above(values: Tensor) -> Tensor:
    """1 for each value above zero, 0 below, and ½ at zero, where nothing is preferred."""
    return (torch.sign(values) + 1) / 2


def _score(example: Example) -> float:
    assert isinstance(example.record, Feedback)
    return example.record.score
