"""Settings of the objectives that align a model with preferences, one section for each (`[train.dpo]` and the like), and of
what guards such a stage (`[train.guards]`)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from corral.recipe.section import Fraction, PathText, Section

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Score = Annotated[float, Field(ge=0, le=1)]


class Dpo(Section):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290): −log σ(β (r of chosen − r of rejected)), where
    r = log π(answer) − log π_reference(answer) and the reference is the model that the stage starts from."""

    beta: Positive = 0.1
    """β: the smaller, the further the model may move from the reference."""
    normalise: bool = False
    """Divide r by the answer's tokens, so that length earns nothing (Lambert et al. 2024, arXiv 2411.15124); β is then larger,
    about 5."""
    sft_weight: NotNegative = 0.2
    """Weight of a second term, the negative log-likelihood per token of the chosen answers (Pang et al. 2024, arXiv
    2404.19733). It keeps them likely: without it both answers may become less likely."""


class Ipo(Section):
    """Identity preference optimisation (Azar et al. 2023, arXiv 2310.12036): (r of chosen − r of rejected − 1 / 2β)², with r
    per token."""

    beta: Positive = 0.1
    """β (τ in the paper): the larger, the smaller the margin that is aimed at."""


class Kto(Section):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv 2402.01306): 1 − σ(β (r − KL)) for good answers,
    1 − σ(β (KL − r)) for bad ones. KL is the mean of r over a step (0 if it is negative) with each prompt under the answer of
    another row."""

    beta: Positive = 0.1
    """β: the smaller, the further the model may move from the reference."""
    threshold: Score = 0.5
    """Answers with at least this score are good, the others bad."""
    desirable_weight: Positive = 1.0
    """Weight of good answers. If one kind is rarer, weight it so that weight × rows is about the same for both."""
    undesirable_weight: Positive = 1.0
    """Weight of bad answers."""


class Orpo(Section):
    """Odds ratio preference optimisation (Hong et al. 2024, arXiv 2403.07691): the negative log-likelihood per token of chosen
    answers, plus λ × −log σ(log odds of chosen − log odds of rejected), with probabilities per token. It has no reference, and
    may start from a model without fine-tuning."""

    odds_weight: Positive = 0.1
    """λ."""


class Simpo(Section):
    """Simple preference optimisation (Meng et al. 2024, arXiv 2405.14734): −log σ(β (log π of chosen − log π of rejected)
    − γ), with log π per token. It has no reference."""

    beta: Positive = 2.0
    """β."""
    margin: NotNegative = 1.0
    """γ: by how much the rewards (β × log π) of chosen and rejected should differ; about half of β."""


class Ulma(Section):
    """ULMA (Cai et al. 2023, arXiv 2312.02554): the negative log-likelihood per token of good answers, each counting the same,
    plus the mean of −log σ(−β r − c) over bad ones."""

    beta: Positive = 0.1
    """β."""
    c: float = 0.0
    """c, which stands for the logarithm of the partition function."""
    normalise: bool = False
    """Divide r by the answer's tokens, as the authors' code does. Then a bad answer goes on counting long after it has become
    unlikely."""
    continuous: bool = False
    """For bad answers take (score − β r − c)² instead, which tells scores between 0 and 1 apart."""
    threshold: Score = 0.5
    """Answers with at least this score are good, the others bad."""


class Guards(Section):
    """When a stage that aligns a model is stopped, or its model not promoted. They are checked at every evaluation of the
    stage, and after it. A change of them trains nothing again."""

    chosen_fall: NotNegative = 0.2
    """Largest fall of the mean log-probability of chosen (or good) answers on the validation rows, as a share of its size
    before the first step; without validation rows, on up to `evaluate_rows` of the rows that are trained on."""
    prompts: PathText | None = None
    """Basic prompts, which a useful model must be able to answer: a text file with one in each line. By default 20 that ship
    with corral."""
    failing_prompts: Fraction = 0.1
    """Largest share of the basic prompts answered well by the model that the stage starts from which may be answered badly: by
    nothing, without an end, in a loop, or with the same answer as many others. One of them always may be, unless this is 0."""
    max_tokens: Annotated[int, Field(ge=8)] = 96
    """Most tokens of an answer to a basic prompt. The model that the stage starts from must have ended it within half of
    them, or the prompt does not count."""
    loss_rise: Annotated[float, Field(ge=0)] = 0.1
    """Largest rise, in nats per token, of the loss on held-out conversations (or on the chosen answers of held-out pairs, if
    the run has no conversations) over the model that the stage starts from."""
    quantisation_gap: Annotated[float, Field(ge=0)] = 0.1
    """With `quantization`: the same for the quantised form of the model that the stage starts from, before the first step."""

    def allows_failing(self, failing: int, asked: int) -> bool:
        """Whether so many of the basic prompts that count may be answered badly."""
        return failing <= (max(1.0, self.failing_prompts * asked) if self.failing_prompts else 0)
