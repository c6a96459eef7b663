"""`[answer]`: how answers are asked for, drawn and chosen. Knows nothing about how a model is run."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from corral.recipe.data import Source
from corral.recipe.section import PositiveInt, Section

METHODS_WITHOUT_VOTES = ("rouge-l", "cosine")
"""The ways to vote that count no votes, so that an adaptive stop means nothing to them."""


class Consensus(Section):
    """Several answers are drawn and the one that agrees best with the others is given (self-consistency: Wang et al. 2022,
    arXiv 2203.11171)."""

    method: Literal["none", "rouge-l", "cosine", "majority", "rouge-l+math"] = "none"
    """What agreement is. `rouge-l`: mean ROUGE-L F with the others. `cosine`: mean cosine of sentence embeddings.
    `majority`: most votes over the answers' results (a number, a choice). `rouge-l+math`: that where most of them have a
    number, else `rouge-l`. `none`: one answer is drawn."""
    n: Annotated[int, Field(ge=2)] = 5
    """Answers drawn."""
    temperature: Annotated[float, Field(gt=0)] = 0.7
    """In place of `answer.temperature`."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    """In place of `answer.top_p`."""
    stop: Literal["never", "lossless", "adaptive"] = "lossless"
    """When the rest is cancelled. `lossless`: once they cannot change the choice. `adaptive`: also once a lead in
    `majority` is 95 % certain (Aggarwal et al. 2023, arXiv 2305.11860)."""


class Shots(Section):
    """Solved examples that are shown before the question (few-shot prompting)."""

    count: Annotated[int, Field(ge=0)] = 0
    """How many; fewer where the context has no room for them."""
    choose: Literal["static", "similar"] = "static"
    """`static`: the same for every question, drawn by `seed`. `similar`: those whose questions are most like it, by sentence
    embeddings."""
    source: Source | None = None
    """Where they come from; by default the training rows of the run. Public questions are shown others of their set."""


class Answer(Section):
    """How answers are asked for, drawn and chosen: in evaluation, `corral batch`, `corral chat` and the server."""

    max_tokens: PositiveInt = 256
    """Most new tokens of an answer."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the most likely token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the most likely tokens that reach this probability together."""
    reasoning: bool = False
    """Ask for the steps before the result (chain of thought: Wei et al. 2022, arXiv 2201.11903); the result is what follows
    the last `Answer:`."""
    shots: Shots = Shots()
    consensus: Consensus = Consensus()

    @model_validator(mode="after")
    def _agreement_on_what(self) -> Self:
        if self.consensus.stop == "adaptive" and self.consensus.method in METHODS_WITHOUT_VOTES:
            raise ValueError(
                f'`consensus.stop` = "adaptive" counts votes, and `consensus.method` = "{self.consensus.method}" has none: '
                'use "majority" or "rouge-l+math"'
            )
        return self

    def with_changes(self, changes: dict[str, Any]) -> Answer:
        """These settings with others in their place, some or all of them. Raises: ValidationError (they do not go together).

        An adaptive stop, where another way to vote is asked for and no stop, is left to the default.
        """
        settings = _merge(self.model_dump(mode="json"), changes)
        asked: dict[str, Any] = changes.get("consensus", {})
        if "stop" not in asked and asked.get("method") in METHODS_WITHOUT_VOTES:
            del settings["consensus"]["stop"]
        return Answer.model_validate(settings)


def _merge(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Settings with others in their place; a source of rows is replaced as a whole."""
    inner = {
        key: _merge(settings[key], value)
        for key, value in changes.items()
        if isinstance(value, dict) and isinstance(settings[key], dict) and key != "source"
    }
    return settings | changes | inner
