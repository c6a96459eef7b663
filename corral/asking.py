"""A model and how it is asked, from a run's recipe and what the command line says otherwise, for chat and batch.

It is what answers depend on besides the questions. It knows neither questions nor where answers go.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corral.errors import RecipeError
from corral.recipe.answer import Answer

if TYPE_CHECKING:
    from corral.answerer import Answerer
    from corral.engines.load import Name
    from corral.messages import Conversation


@dataclass(frozen=True, slots=True)
class Settings:
    """A model and how it is asked. Can be sent to other machines.

    Args:
        model: a run directory, or any model spec.
        answer: how answers are drawn and chosen.
        seed: of all draws; None draws anew each time.
        engine: what computes; None takes the best one for the machine.
        urls: of endpoints that serve this model; they compute instead.
    """

    model: str
    answer: Answer
    seed: int | None
    engine: Name | None = None
    urls: tuple[str, ...] = ()

    @property
    def choices(self) -> int:
        """Completions drawn for a prompt."""
        consensus = self.answer.consensus
        return 1 if consensus.method == "none" else consensus.n

    def made_of(self) -> dict[str, Any]:
        """All of it as JSON values; the model by a hash of its files and template. Raises: as `open_model`."""
        from corral.model.folder import identity
        from corral.model.loading import load_tokenizer
        from corral.opening import find_model
        from corral.template import Template

        found = find_model(self.model)
        template = Template.load(load_tokenizer(found.folder), found.template or "tokenizer")
        weights = [identity(folder) for folder in (found.folder, found.adapter) if folder is not None]
        model = hashlib.sha256(" ".join([*weights, template.digest]).encode()).hexdigest()
        answer = self.answer.model_dump(mode="json")
        # Where it is computed may change on the way; by what kind of engine may not.
        engine = self.engine or ("remote" if self.urls else "auto")
        return {"model": model, "engine": engine, "answer": answer, "seed": self.seed}

    def open(self) -> Answerer:
        """Load the model, or reach it. The engine is the caller's to close. Raises: as `open_model` and `compose`."""
        from corral.composing import compose
        from corral.opening import open_model

        opened = open_model(self.model, self.engine, urls=self.urls).answerer
        return compose(opened.engine, opened.template, self.answer, examples=self._examples, seed=self.seed)

    def _examples(self) -> list[Conversation]:
        from corral.composing import training_examples
        from corral.run import Run

        return training_examples(Run(Path(self.model)), self.seed or 0)


def with_changes(model: str, changes: Mapping[str, Any]) -> tuple[Answer, int]:
    """(how a run's recipe asks, its seed), with changes; of a model that is no run, the defaults with changes.

    Args:
        changes: of `max_tokens`, `temperature`, `top_p` (those of a vote, if there is one), `consensus`, `n`, `shots` and
            `seed`.

    Raises:
        RecipeError: a value cannot be, or `n` is given and nothing is voted on.
    """
    from pydantic import ValidationError

    found, seed = _of(model)
    values = found.model_dump(mode="json")
    consensus: dict[str, Any] = values["consensus"]
    consensus["method"] = changes.get("consensus", consensus["method"])
    drawn = values if consensus["method"] == "none" else consensus
    if "n" in changes and drawn is values:
        raise RecipeError(
            f"{changes['n']} answers are to be drawn, and nothing chooses among them",
            where="--n",
            hint="add --consensus, e.g. rouge-l",
        )
    places = {"max_tokens": values, "temperature": drawn, "top_p": drawn, "n": consensus}
    for name, place in places.items():
        if name in changes:
            place[name] = changes[name]
    if "shots" in changes:
        values["shots"]["count"] = changes["shots"]
    try:
        answer = Answer.model_validate(values)
    except ValidationError as error:
        faults = [f"answer.{'.'.join(map(str, e['loc']))}: {e['msg']} (given: {e['input']!r})" for e in error.errors()]
        raise RecipeError("\n".join(faults), where="the command line", hint="give another value") from None
    return answer, changes.get("seed", seed)


def _of(model: str) -> tuple[Answer, int]:
    if not (Path(model) / "recipe.toml").is_file():
        return Answer(), 0
    from corral.run import Run

    recipe = Run(Path(model)).recipe
    return recipe.answer, recipe.seed
