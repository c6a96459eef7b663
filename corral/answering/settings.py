"""A model and how it is asked: the recipe's `[answer]` with the overrides of the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from corral.answering.build import build_answerer
from corral.answering.examples import training_examples, training_examples_digest
from corral.answering.identity import (
    AnswerIdentity,
    examples_digest,
    identify_model,
    weights_identity,
)
from corral.answering.open_model import check_engine, choose_engine, open_model
from corral.errors import RecipeError
from corral.model.folder import ADAPTER_CONFIG
from corral.model.naming import find_model_files
from corral.recipe.answer import Answer
from corral.run.directory import Run, is_run

if TYPE_CHECKING:
    from corral.answering.answerer import Answerer
    from corral.engines.embedding import Embedder
    from corral.engines.registry import EngineName
    from corral.messages import Conversation


@dataclass(frozen=True, slots=True)
class AnswererSettings:
    """All that answers depend on besides the questions. Can be pickled and sent to other machines.

    Args:
        model: a run directory, or any model spec.
        answer: how the model is asked, and how its answers are sampled and chosen.
        seed: of all sampling; None samples anew each time.
        engine: None takes the best one for the machine.
        urls: of endpoints that serve this model and compute in place of this machine.
    """

    model: str
    answer: Answer
    seed: int | None
    engine: EngineName | None = None
    urls: tuple[str, ...] = ()

    @property
    def choices_per_prompt(self) -> int:
        """Completions generated for each prompt."""
        consensus = self.answer.consensus
        return 1 if consensus.method == "none" else consensus.n

    def identity(self) -> AnswerIdentity:
        """What the answers of this model depend on, without loading it.

        Raises: as `open_model` and `build_answerer`.
        """
        files = find_model_files(self.model)
        template = files.load_template()
        local = check_engine(self.engine, self.urls)
        # Another machine or server may go on with a batch; another kind of engine or precision may not.
        engine, device, dtype = "remote", None, None
        if not self.urls:
            engine, device, dtype = choose_engine(files.folder, local, adapter=files.adapter is not None)
        return self.identity_on(identify_model(weights_identity(files), template, engine, dtype=dtype, device=device))

    def identity_on(self, model: AnswerIdentity) -> AnswerIdentity:
        """What the answers of a loaded model depend on with these settings.

        Raises: DataError, AssetError (the examples cannot be read).
        """
        examples = examples_digest(self.answer.shots, lambda: training_examples_digest(self._run))
        return model.asked(self.answer, self.seed, examples)

    def open_answerer(self) -> Answerer:
        """Load the model, or connect to it. The caller closes the engine. Raises: as `open_model` and `build_answerer`."""
        return self.build_on(open_model(self.model, self.engine, urls=self.urls).answerer)

    def build_on(self, loaded: Answerer, embed: Embedder | None = None) -> Answerer:
        """An Answerer with these settings on the engine and template of another. Args and Raises: as `build_answerer`."""
        return build_answerer(
            loaded.engine, loaded.template, self.answer, examples=self._examples, seed=self.seed, embed=embed
        )

    def _examples(self) -> list[Conversation]:
        return training_examples(self._run, self.seed or 0)

    @property
    def _run(self) -> Run:
        """Raises: RunError (the model belongs to no run)."""
        return find_run(self.model) or Run(Path(self.model))


def find_run(model: str) -> Run | None:
    """The run that a model spec belongs to: the spec is a run directory, or an adapter inside one."""
    path = Path(model).expanduser()
    folders = [path, path.absolute().parent.parent] if (path / ADAPTER_CONFIG).is_file() else [path]
    return next((Run(folder) for folder in folders if is_run(folder)), None)


def load_answer_settings(model: str, overrides: Mapping[str, Any]) -> tuple[Answer, int]:
    """(`[answer]`, seed) of the recipe of a model's run, with overrides; of a model that belongs to no run, the defaults.

    Args:
        overrides: of `max_tokens`, `temperature`, `top_p` (those of a vote, if there is one), `consensus`, `n`, `shots` and
            `seed`.

    Raises:
        RecipeError: a value is not allowed, or `n` is given without a vote.
    """
    run = find_run(model)
    answer, seed = (run.recipe.answer, run.recipe.answers_seed) if run else (Answer(), 0)
    votes = overrides.get("consensus", answer.consensus.method) != "none"
    if "n" in overrides and not votes:
        raise RecipeError(
            f"{overrides['n']} answers are to be drawn, and nothing chooses among them",
            where="--n",
            hint="add --consensus, e.g. rouge-l",
        )
    sampling = ("consensus",) if votes else ()
    paths = {
        "max_tokens": ("max_tokens",),
        "temperature": (*sampling, "temperature"),
        "top_p": (*sampling, "top_p"),
        "consensus": ("consensus", "method"),
        "n": ("consensus", "n"),
        "shots": ("shots", "count"),
    }
    changes: dict[str, Any] = {}
    for name, (*tables, key) in paths.items():
        if name in overrides:
            table = changes
            for each in tables:
                table = table.setdefault(each, {})
            table[key] = overrides[name]
    try:
        changed = answer.with_changes(changes)
    except ValidationError as error:
        faults = [_describe_fault(each) for each in error.errors()]
        raise RecipeError("\n".join(faults), where="the command line", hint="give another value") from None
    return changed, overrides.get("seed", seed)


def _describe_fault(error: Any) -> str:
    if error["type"] == "value_error":
        return f"[answer]: {error['ctx']['error']}"
    return f"answer.{'.'.join(map(str, error['loc']))}: {error['msg']} (given: {error['input']!r})"
