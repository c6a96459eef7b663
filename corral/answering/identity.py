"""What an answer depends on, as hashes and JSON values, for evaluation, batch and serving.

Finished evaluations and batches are recognised by these values: what is hashed, and how, must stay the same between versions.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import corral
from corral.data.sources import hash_source
from corral.errors import DataError
from corral.model.folder import model_identity
from corral.run.stage_record import read_fingerprint

if TYPE_CHECKING:
    from corral.model.naming import ModelFiles
    from corral.recipe.answer import Answer, Shots
    from corral.run.directory import Run
    from corral.template import Template


def model_digest(files: ModelFiles, template: Template, *settings: str) -> str:
    """sha256 (hex) of a model's weights, its adapter's, the chat template, and settings such as the engine's name."""
    weights = [model_identity(folder) for folder in (files.folder, files.adapter) if folder is not None]
    return _sha256(" ".join([*weights, template.digest, *settings]))


def variant_digest(weights: str, template: Template, engine: str, device: str, dtype: str) -> str:
    """sha256 (hex) of a model that a run evaluates, where `weights` identifies the base or what the run made of it."""
    return _sha256(json.dumps([weights, template.fingerprint, engine, device, dtype]))


def variant_conditions(
    weights: str, template: Template, engine: str, placement: tuple[str, str], answer: Answer, seed: int, examples: str
) -> dict[str, Any]:
    """What the rows of a variant depend on, as JSON values that can be compared one by one; settings without effect are left
    out.

    Args:
        placement: device and dtype.
        examples: hash of the examples that are shown.
    """
    conditions: dict[str, Any] = {
        "corral": corral.__version__,
        "model": _sha256(weights)[:12],
        "template": template.digest[:12],
        "tokenizer": _sha256(template.tokenizer.backend_tokenizer.to_str())[:12],
        "engine": engine,
        "device": placement[0],
        "dtype": placement[1],
        "answer": answer.model_dump(mode="json", exclude_none=True),
    }
    if answer.consensus.method == "none":
        conditions["answer"]["consensus"] = {"method": "none"}
    if not answer.shots.count:
        conditions["answer"]["shots"] = {"count": 0}
    if answer.is_sampled or answer.shots.count:
        conditions["seed"] = seed
    return conditions | ({"examples": examples[:12]} if answer.shots.count else {})


def row_digest(
    model: str, measurement: str, settings: Answer | None = None, seed: int = 0, *, own: str = "", source: str = ""
) -> str:
    """A short hash of all that a row of an evaluation depends on besides its own content.

    Args:
        model: from `variant_digest`.
        measurement: what is measured, such as `loss` or `answers`.
        settings: how the model is asked; None where that has no effect, as on a loss.
        own: hash of the examples that are shown where the settings name no source of them.
        source: hash of the examples of that source.
    """
    depends: list[Any] = [corral.__version__, model, measurement]
    if settings is not None:
        depends += [settings.model_dump(mode="json"), seed]
        if settings.is_sampled:
            depends.append("a seed for each row")
        if settings.shots.count:
            depends.append(own if settings.shots.source is None else source)
    return _sha256(json.dumps(depends, sort_keys=True))[:16]


def batch_identity(
    model: str, engine: str, dtype: str | None, examples: str, answer: Answer, seed: int | None
) -> dict[str, Any]:
    """What the answers of a batch depend on besides the prompts, as JSON values that can be compared one by one."""
    return {
        "corral": corral.__version__,
        "model": model,
        "engine": engine,
        **({"dtype": dtype} if dtype else {}),
        **({"examples": examples} if examples else {}),
        "answer": answer.model_dump(mode="json"),
        "seed": seed,
    }


def fingerprint_with_settings(fingerprint: str, answer: Answer) -> str:
    """The fingerprint of a served model that is asked with examples, instructions or a vote."""
    return _sha256(f"{fingerprint} {answer.model_dump_json()}")[:12]


def source_examples_digest(shots: Shots) -> str:
    """sha256 of the rows that few-shot examples are taken from; empty if none are shown, or they are the run's own.

    Raises: DataError, AssetError.
    """
    if not shots.count or shots.source is None:
        return ""
    return hash_source(shots.source)


def training_examples_digest(run: Run) -> str:
    """The same for few-shot examples from the training rows of a run. Raises: DataError (it has not prepared its rows)."""
    fingerprint = read_fingerprint(run.path, "prepare")
    if fingerprint is None:
        raise DataError(
            "the run has no prepared rows to show as examples",
            where=str(run.path / "prepare"),
            hint="finish the run, or name rows with [answer.shots.source]",
        )
    return fingerprint


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
