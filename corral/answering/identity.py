"""What an answer depends on, in one value: evaluation, batch and serving recognise finished rows and batches by it.

It has two parts. The weights, template, engine, dtype, settings, seed and examples decide the answer: their hash is `digest`.
The version of corral and the device are circumstances: recorded, and reported by a comparison, but no reason to answer again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import corral
from corral.data.sources import hash_source
from corral.model.folder import model_identity
from corral.recipe.answer import Answer

if TYPE_CHECKING:
    from corral.model.naming import ModelFiles
    from corral.recipe.answer import Shots
    from corral.template import Template

CIRCUMSTANCES = ("corral", "device")
"""Keys of `AnswerIdentity.conditions` that do not decide the answer."""
HASHED = ("model", "template", "tokenizer", "examples")
"""Keys of `AnswerIdentity.conditions` whose values are hashes."""
_VERSION = 1  # raised when corral answers differently with the same settings: finished rows are measured again


@dataclass(frozen=True, slots=True)
class AnswerIdentity:
    """Everything that an answer, or a log-probability, depends on besides the prompt. Made by `identify_model` and `asked`.

    Attributes:
        weights: identifies the weights: a hash of them, or the fingerprint of the stage that trained them.
        template: sha256 of the saved chat template, which holds the default system prompt.
        tokenizer: sha256 of the tokenizer.
        engine: its name.
        dtype: None where endpoints compute.
        device: a circumstance.
        endpoints: where the answers come from, if other endpoints may hold other weights.
        answer: how the model is asked; None for the likelihood of given text.
        seed: of sampling and of the choice of examples; None samples anew each time.
        examples: hash of the rows that examples are taken from.
        version: of corral; a circumstance.
    """

    weights: str
    template: str
    tokenizer: str
    engine: str
    dtype: str | None
    device: str | None = None
    endpoints: tuple[str, ...] = ()
    answer: Answer | None = None
    seed: int | None = None
    examples: str = ""
    version: str = field(default_factory=lambda: corral.__version__)

    def asked(self, answer: Answer, seed: int | None, examples: str) -> AnswerIdentity:
        """The identity of this model's answers with these settings.

        Args:
            seed: the one that is used, whatever `answer.seed` is.
            examples: from `examples_digest`.
        """
        return replace(self, answer=answer, seed=seed, examples=examples)

    def scoring(self) -> AnswerIdentity:
        """The identity of the likelihood of given text without anything shown before it."""
        return replace(self, answer=None, seed=None, examples="")

    @property
    def digest(self) -> str:
        """A short hash of all that decides the answer."""
        decisive = {name: value for name, value in self.conditions().items() if name not in CIRCUMSTANCES}
        return _sha256(json.dumps([_VERSION, decisive], sort_keys=True))[:16]

    def conditions(self) -> dict[str, Any]:
        """All of it as JSON values that can be compared one by one; what has no effect is left out."""
        conditions: dict[str, Any] = {
            "corral": self.version,
            "model": _sha256(self.weights)[:12],
            "template": self.template[:12],
            "tokenizer": self.tokenizer[:12],
            "engine": self.engine,
        }
        optional = {"device": self.device, "dtype": self.dtype, "endpoints": list(self.endpoints)}
        conditions |= {name: value for name, value in optional.items() if value}
        if self.answer is not None:
            conditions["answer"] = _effective_settings(self.answer)
            if self.answer.is_sampled or self.answer.shots.count:
                conditions["seed"] = self.seed
            if self.answer.shots.count:
                conditions["examples"] = self.examples[:12]
        return conditions


def identify_model(
    weights: str,
    template: Template,
    engine: str,
    *,
    dtype: str | None,
    device: str | None = None,
    endpoints: Sequence[str] = (),
) -> AnswerIdentity:
    """The identity of the likelihoods of a model in an engine; `AnswerIdentity.asked` adds how it is asked."""
    tokenizer = _sha256(template.tokenizer.backend_tokenizer.to_str())
    return AnswerIdentity(weights, template.digest, tokenizer, engine, dtype, device, tuple(endpoints))


def weights_identity(files: ModelFiles) -> str:
    """Identifies the weights of a model and of its adapter by their content."""
    return " ".join(model_identity(folder) for folder in (files.folder, files.adapter) if folder is not None)


def differing_conditions(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(name, value of one, value of the other) of each condition that is not the same; `answer.max_tokens` names one within a
    table, and a value that is not there is None."""
    first, second = _flatten(one), _flatten(other)
    for name in dict.fromkeys((*first, *second)):
        if first.get(name) != second.get(name):
            yield name, first.get(name), second.get(name)


def examples_digest(shots: Shots, training: Callable[[], str]) -> str:
    """sha256 of the rows that few-shot examples are taken from; empty if none are shown.

    Args:
        training: returns the hash of the rows that are taken where the settings name no source.

    Raises: DataError, AssetError.
    """
    if not shots.count:
        return ""
    return training() if shots.source is None else hash_source(shots.source)


def _effective_settings(answer: Answer) -> dict[str, Any]:
    """`[answer]` as JSON values. Settings without effect have their defaults or are left out; so is where the examples lie, as
    their content counts."""
    settings = answer.model_dump(mode="json", exclude_none=True, exclude={"seed"})
    if answer.consensus.method == "none":
        settings["consensus"] = {"method": "none"}
    if answer.consensus.method != "none" or not answer.is_sampled:
        settings |= {"temperature": 0.0, "top_p": 1.0}  # a vote has its own
    if not answer.shots.count:
        settings["shots"] = {"count": 0}
    elif answer.shots.source is not None:
        for name in ("path", "name", "side", "repeat", "weight"):
            settings["shots"]["source"].pop(name, None)
    return settings


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` → `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flatten(item, f"{prefix}{key}.") if isinstance(item, dict) and item else {f"{prefix}{key}": item}
    return flat


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
