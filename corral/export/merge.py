"""Merges an adapter that a user names into its base: a model folder with a contract, as a training stage writes it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from corral.errors import InputError
from corral.export import contract
from corral.model import adapters, packed_forward
from corral.model.adapter_files import AdapterFiles
from corral.model.device import choose_device
from corral.model.folder import read_json
from corral.model.loading import load_model
from corral.model.merging import merge_adapter, save_model
from corral.model.naming import find_model_files
from corral.progress import Progress
from corral.storage import new_directory, storage_errors

if TYPE_CHECKING:
    from corral.export.contract import Check, Probe
    from corral.model.loading import DType


def merge(spec: str, out: Path, progress: Progress, *, base: str | None = None) -> list[Check]:
    """Merge an adapter, in the dtype in which its base is stored, and compare the written model with the adapter.

    Args:
        spec: the adapter: its folder or `hub:OWNER/NAME`.
        out: the folder to write; nothing may be there.
        base: the base model, in place of the one that the adapter names.

    Returns: what was checked.

    Raises:
        InputError: `spec` names no adapter, or something is at `out`.
        ModelError, AssetError, TemplateError: the adapter or its base cannot be used.
        ContractError: the written model is not the adapter on its base; it stays beside `out`, as `candidate-NAME`.
        StorageError: it cannot be written.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise InputError("the output folder exists and is not empty", where=str(out), hint="give another folder: --out")
    files = find_model_files(spec, base=base)
    if files.adapter is None:
        raise InputError(f"{spec!r} is a model, not an adapter", hint="name a folder with an adapter_config.json")
    read = AdapterFiles.read(files.adapter)
    read.check_fit(files.folder)
    read.check_trained()
    template, dtype = files.load_template(), _stored_dtype(files.folder)
    device = choose_device("auto", dtype).device
    probes = contract.make_probes(template)
    progress.start(f"Merging in {dtype}", None)
    adapted = adapters.load(load_model(files.folder, dtype=dtype, device=device), files.adapter)
    expected = _logprobs(adapted, probes)
    candidate = out.with_name(f"candidate-{out.name}")
    merged = merge_adapter(adapted)
    with new_directory(candidate) as folder:
        save_model(merged, template, folder, licences=files.licences)
    del adapted, merged
    progress.start("Measuring the contract", None)
    measured = _logprobs(load_model(candidate, dtype=dtype, device=device), probes)
    check = contract.compare_logprobs("adapter and merged model", expected, measured, contract.TOLERANCES[dtype])
    checks = contract.certify_merged(candidate, template, probes, measured, [check], form=dtype)
    with storage_errors(out):
        if out.is_dir():
            out.rmdir()
        candidate.rename(out)
    return checks


def _stored_dtype(folder: Path) -> DType:
    config = read_json(folder / "config.json")
    stored: Any = config.get("dtype") or config.get("torch_dtype")
    return stored if stored in ("bfloat16", "float16") else "float32"


def _logprobs(model: Any, probes: list[Probe]) -> list[list[float]]:
    return packed_forward.score(model, [probe.ids for probe in probes], [probe.start for probe in probes])
