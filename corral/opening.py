"""From what a user names (a run, a folder, `asset:`, `hub:`, a `.gguf` file) to an Answerer over it, for chat and serve.

It knows where a run keeps its model. It does not know what the answers are for, nor how a model is found, loaded or run.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from corral import contract
from corral.answerer import Answerer
from corral.engines.base import Sampling
from corral.engines.load import Name, default_engine, load_engine
from corral.forms import CONTRACT, OPENVINO
from corral.template import Template


@dataclass(frozen=True, slots=True)
class Opened:
    """A loaded model."""

    name: str
    """A short name: the run's, the folder's, the asset's, or the hub's OWNER/NAME."""
    fingerprint: str
    """Short hash of weights, configuration, tokenizer, template and engine: the same text and seed, the same answer."""
    answerer: Answerer


def model_folder(spec: str) -> Path:
    """The model folder of a run directory, or of any model spec. Raises: RunError, ModelError, AssetError."""
    from corral.model.loading import resolve
    from corral.run import Run

    if _is_run(spec):
        return Run(Path(spec)).merged_model
    if (Path(spec) / OPENVINO).is_file():
        return Path(spec)
    return resolve(spec).folder


def contract_of(spec: str) -> Path:
    """Where the contract of a run's model, a model folder or an exported form stands, if it has one. Raises: as above."""
    path = Path(spec)
    if path.suffix == ".gguf":
        model_folder(spec)
    return path.with_suffix(".contract.json") if path.suffix == ".gguf" else model_folder(spec) / CONTRACT


def open_model(spec: str, engine: Name | None = None, sampling: Sampling | None = None) -> Opened:
    """Load a model into an engine on this machine's best device. The engine is the caller's to close.

    Args:
        engine: one of `engines.load.ENGINES`; None takes the one meant for the device.
        sampling: the Answerer's default.

    A model that carries a contract is held to it as far as that takes no computing: `contract.unchanged`.

    Raises:
        RunError, ModelError, AssetError: there is no such model, or it cannot be loaded.
        ContractError: its files or its template are not those its contract was written for.
        TemplateError: its tokenizer has no chat template that can be used.
        MissingExtraError: the engine is not installed.
    """
    from corral.model.folder import identity
    from corral.model.loading import load_tokenizer
    from corral.model.placement import placement

    folder = model_folder(spec)
    template = Template.load(load_tokenizer(folder))
    record = contract_of(spec)
    if record.is_file():
        contract.enforce(contract.unchanged(record, template), where=record)
    if engine is None and (folder / OPENVINO).is_file():
        engine = "openvino"
    device, dtype = placement("cpu" if engine == "openvino" else "auto")
    engine = engine or default_engine(device)
    loaded = load_engine(engine, folder, dtype=dtype, device=device)
    made_of = f"{identity(folder)} {template.digest} {loaded.name}"
    fingerprint = hashlib.sha256(made_of.encode()).hexdigest()[:12]
    return Opened(_short_name(spec), fingerprint, Answerer(loaded, template, sampling))


def _is_run(spec: str) -> bool:
    return (Path(spec) / "recipe.toml").is_file()


def _short_name(spec: str) -> str:
    if _is_run(spec):
        from corral.run import Run

        return Run(Path(spec)).recipe.name
    kind, _, name = spec.partition(":")
    if kind in ("asset", "hub") and name:
        return name.partition("@")[0]
    path = Path(spec).expanduser().resolve()
    return path.stem if path.suffix == ".gguf" else path.name or "model"
