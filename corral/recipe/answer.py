"""`[answer]`: how a model is prompted, and how its answers are sampled and chosen."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from corral.recipe.data import Source
from corral.recipe.section import PositiveInt, Section, Seed

METHODS_WITHOUT_VOTES = ("rouge-l", "cosine")
"""Consensus methods that compare answers instead of counting votes; `stop = "adaptive"` does not apply to them."""


class Consensus(Section):
    """Several answers are sampled, and the one that agrees best with the others is chosen (self-consistency: Wang et al. 2022,
    arXiv 2203.11171)."""

    method: Literal["none", "rouge-l", "cosine", "majority", "rouge-l+math"] = "none"
    """How agreement is measured. `rouge-l`: mean ROUGE-L F with the other answers. `cosine`: mean cosine similarity of
    sentence embeddings. `majority`: the most frequent result (a number, a choice). `rouge-l+math`: `majority` where most
    answers have a number, else `rouge-l`. `none`: only one answer is sampled."""
    n: Annotated[int, Field(ge=2)] = 5
    """Number of answers sampled."""
    temperature: Annotated[float, Field(gt=0)] = 0.7
    """Sampling temperature; replaces `answer.temperature`."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Nucleus sampling; replaces `answer.top_p`."""
    stop: Literal["never", "lossless", "adaptive"] = "lossless"
    """When unfinished answers are cancelled. `lossless`: as soon as they cannot change the choice. `adaptive`: also when the
    majority is 95 % certain (Aggarwal et al. 2023, arXiv 2305.11860)."""


class Shots(Section):
    """Solved examples that are shown before the question (few-shot prompting)."""

    count: Annotated[int, Field(ge=0)] = 0
    """Number of examples; fewer are shown where the context is too short for all."""
    choose: Literal["static", "similar"] = "static"
    """`static`: the same examples for every question, sampled by `seed`. `similar`: the examples whose questions are most
    similar, by sentence embeddings."""
    source: Source | None = None
    """Where the examples come from; by default the run's training rows. Tasks of `[evaluate]` use other questions of their
    set."""


class Answer(Section):
    """How a model is prompted, and how answers are sampled and chosen: in evaluation, `corral batch`, `corral chat` and the
    server."""

    max_tokens: PositiveInt = 256
    """Most new tokens of an answer."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Sampling temperature; 0 always takes the most likely token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample only from the most likely tokens whose probabilities add up to this."""
    reasoning: bool = False
    """Ask for reasoning steps before the result (chain of thought: Wei et al. 2022, arXiv 2201.11903). The result is the text
    after the last `Answer:`."""
    seed: Seed | None = None
    """Seed of sampled answers and of the choice of examples; by default the recipe's."""
    shots: Shots = Shots()
    consensus: Consensus = Consensus()

    @model_validator(mode="after")
    def _check_adaptive_stop(self) -> Self:
        if self.consensus.stop == "adaptive" and self.consensus.method in METHODS_WITHOUT_VOTES:
            raise ValueError(
                f'`consensus.stop` = "adaptive" counts votes, and `consensus.method` = "{self.consensus.method}" has none: '
                'use "majority" or "rouge-l+math"'
            )
        return self

    @property
    def is_sampled(self) -> bool:
        """Whether answers depend on random numbers."""
        return self.temperature > 0 or self.consensus.method != "none"

    def with_changes(self, changes: dict[str, Any]) -> Answer:
        """These settings with some replaced. Raises ValidationError if the result is not valid.

        If the new consensus method counts no votes and no `stop` is given, `stop` goes back to its default.
        """
        settings = _merge(self.model_dump(mode="json"), changes)
        consensus: dict[str, Any] = changes.get("consensus", {})
        if "stop" not in consensus and consensus.get("method") in METHODS_WITHOUT_VOTES:
            del settings["consensus"]["stop"]
        return Answer.model_validate(settings)


def _merge(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Settings with changes merged in, table by table; a `source` is replaced as a whole."""
    tables = {
        key: _merge(settings[key], value)
        for key, value in changes.items()
        if isinstance(value, dict) and isinstance(settings[key], dict) and key != "source"
    }
    return settings | changes | tables
