"""A model and how it is asked, from a run's recipe and what the command line says otherwise, for chat and batch.

It is what answers depend on besides the questions. It knows neither questions nor where answers go.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import corral
from corral.errors import RecipeError
from corral.recipe.answer import Answer

if TYPE_CHECKING:
    from corral.answering.answerer import Answerer
    from corral.engines.embedding import Embedder
    from corral.engines.registry import EngineName
    from corral.messages import Conversation
    from corral.run.directory import Run


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
    engine: EngineName | None = None
    urls: tuple[str, ...] = ()

    @property
    def choices(self) -> int:
        """Completions drawn for a prompt."""
        consensus = self.answer.consensus
        return 1 if consensus.method == "none" else consensus.n

    def made_of(self) -> dict[str, Any]:
        """All of it as JSON values; the model by a hash of its files and template, examples by one of their rows.

        Raises: as `open_model` and `compose`.
        """
        from corral.answering.open_model import computing, local_engine
        from corral.model.folder import model_identity
        from corral.model.loading import load_tokenizer
        from corral.model.naming import find_model_files
        from corral.template import Template

        found = find_model_files(self.model)
        template = Template.load(load_tokenizer(found.folder), found.template or "tokenizer")
        weights = [model_identity(folder) for folder in (found.folder, found.adapter) if folder is not None]
        model = hashlib.sha256(" ".join([*weights, template.digest]).encode()).hexdigest()
        made: dict[str, Any] = {"corral": corral.__version__, "model": model, "engine": "remote"}
        # Where it is computed may change on the way; by what kind of engine, and in what numbers, may not.
        local = local_engine(self.engine, self.urls)
        if not self.urls:
            name, _, dtype = computing(found.folder, local, adapter=found.adapter is not None)
            made |= {"engine": name, "dtype": dtype}
        if examples := self._examples_identity():
            made["examples"] = examples
        return {**made, "answer": self.answer.model_dump(mode="json"), "seed": self.seed}

    def open(self) -> Answerer:
        """Load the model, or reach it. The engine is the caller's to close. Raises: as `open_model` and `compose`."""
        from corral.answering.open_model import open_model

        return self.over(open_model(self.model, self.engine, urls=self.urls).answerer)

    def over(self, plain: Answerer, embed: Embedder | None = None) -> Answerer:
        """The model, loaded, asked as this says. Raises: as `compose`.

        Args:
            embed: where similar examples or a vote need embeddings; by default one of its own.
        """
        from corral.answering.build import compose

        return compose(plain.engine, plain.template, self.answer, examples=self._examples, seed=self.seed, embed=embed)

    def _examples(self) -> list[Conversation]:
        from corral.answering.build import training_examples

        return training_examples(self._run, self.seed or 0)

    def _examples_identity(self) -> str:
        from corral.answering.build import examples_identity, training_identity

        shots = self.answer.shots
        own = shots.count and shots.source is None
        return training_identity(self._run) if own else examples_identity(shots)

    @property
    def _run(self) -> Run:
        """Raises: RunError (the model belongs to none)."""
        from corral.run.directory import Run

        return run_of(self.model) or Run(Path(self.model))


def run_of(model: str) -> Run | None:
    """The run that a model spec belongs to: it names a run directory, or an adapter that lies in one."""
    from corral.model.folder import ADAPTER_CONFIG
    from corral.run.directory import Run

    path = Path(model).expanduser()
    folders = [path, path.absolute().parent.parent] if (path / ADAPTER_CONFIG).is_file() else [path]
    return next((Run(folder) for folder in folders if (folder / "recipe.toml").is_file()), None)


def with_changes(model: str, changes: Mapping[str, Any]) -> tuple[Answer, int]:
    """(how a run's recipe asks, its seed), with changes; of a model that belongs to no run, the defaults with changes.

    Args:
        changes: of `max_tokens`, `temperature`, `top_p` (those of a vote, if there is one), `consensus`, `n`, `shots` and
            `seed`.

    Raises:
        RecipeError: a value cannot be, or `n` is given and nothing is voted on.
    """
    from pydantic import ValidationError

    found, seed = _of(model)
    votes = changes.get("consensus", found.consensus.method) != "none"
    if "n" in changes and not votes:
        raise RecipeError(
            f"{changes['n']} answers are to be drawn, and nothing chooses among them",
            where="--n",
            hint="add --consensus, e.g. rouge-l",
        )
    given: dict[str, Any] = {}
    drawn = given.setdefault("consensus", {}) if votes else given
    places = {
        "max_tokens": (given, "max_tokens"),
        "temperature": (drawn, "temperature"),
        "top_p": (drawn, "top_p"),
        "consensus": (given.setdefault("consensus", {}), "method"),
        "n": (drawn, "n"),
        "shots": (given.setdefault("shots", {}), "count"),
    }
    for name, (place, key) in places.items():
        if name in changes:
            place[key] = changes[name]
    try:
        answer = found.with_changes(given)
    except ValidationError as error:
        faults = [_fault(each) for each in error.errors()]
        raise RecipeError("\n".join(faults), where="the command line", hint="give another value") from None
    return answer, changes.get("seed", seed)


def _fault(error: Any) -> str:
    if error["type"] == "value_error":
        return f"[answer]: {error['ctx']['error']}"
    return f"answer.{'.'.join(map(str, error['loc']))}: {error['msg']} (given: {error['input']!r})"


def _of(model: str) -> tuple[Answer, int]:
    run = run_of(model)
    return (run.recipe.answer, run.recipe.seed) if run else (Answer(), 0)
