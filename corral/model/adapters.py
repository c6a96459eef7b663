"""LoRA adapters, in PEFT's own format: attach, save and load them, check their files, and find their base model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corral.errors import ModelError
from corral.model.folder import ADAPTER_CONFIG, read_json, tensor_shapes, weight_files
from corral.model.hub import HUB_ID
from corral.model.loading import quiet, resolve_model
from corral.run.directory import is_run

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from corral.recipe import Lora

_WEIGHTS = "adapter_model.safetensors"


def attach(model: PreTrainedModel, lora: Lora, *, seed: int) -> PeftModel:
    """Freeze a model and add a fresh adapter, ready to train. Its initial weights depend on the seed only.

    Raises:
        ModelError: no layer of the model has one of the target names, or it is the output layer's.
    """
    import torch

    from corral.model.compute.fused_forwards import fuse

    with quiet():
        from peft import LoraConfig, get_peft_model

    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    if not isinstance(targets, str):
        _check_targets(model, targets)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]  (declared int, used as a factor)
        lora_dropout=lora.dropout,
        target_modules=targets,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        bias="none",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    with quiet():
        adapted: Any = get_peft_model(model, config)
    fuse(adapted)
    return adapted


def _check_targets(model: PreTrainedModel, targets: list[str]) -> None:
    import torch

    head: Any = model.get_output_embeddings()
    names = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    layers = {name.rpartition(".")[2] for name, module in names.items() if module is not head}
    for target in targets:
        if target not in layers:
            outputs = any(module is head and name.rpartition(".")[2] == target for name, module in names.items())
            raise ModelError(
                f"{target!r} is the output layer, on which corral puts no adapter"
                if outputs
                else f"the model has no linear layer called {target!r}",
                where="train.lora.targets",
                hint=f'its linear layers are: {", ".join(sorted(layers))}; "all-linear" names them all',
            )


def save(model: PeftModel, folder: Path, *, base: str, weights: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write the adapter (never the base) into an existing folder.

    Args:
        base: the base model's name, as it is recorded in the adapter's config.
        weights: the trained parameters by name, if the model itself holds only this process's part of them.
    """
    model.peft_config["default"].base_model_name_or_path = base
    state = None if weights is None else dict(weights)
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False, state_dict=state)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card is an empty form


def load(model: PreTrainedModel, *folders: Path) -> PeftModel:
    """The model with the adapters of some folders, the first one active, in eval mode.

    In its `peft_config` they are in the given order; the first is called "default".

    Raises:
        ModelError: a folder holds no adapter.
    """
    with quiet():
        from peft import PeftModel

    for folder in folders:
        if not (folder / _WEIGHTS).is_file():
            hint = "give a folder that PEFT or corral wrote"
            raise ModelError("there is no adapter here", where=str(folder), hint=hint)
    first, *others = folders
    with quiet():
        adapted: Any = PeftModel.from_pretrained(model, str(first))
        for number, folder in enumerate(others, start=2):
            adapted.load_adapter(str(folder), f"adapter-{number}")
    return adapted.eval()


def check_adapter(folder: Path) -> str:
    """Check that a PEFT adapter can be loaded, from its config and the header of its weights.

    Returns: its base model, as its config names it.

    Raises:
        ModelError: its config or its weights cannot be used, or it is no LoRA adapter.
    """
    path = folder / ADAPTER_CONFIG
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise ModelError(
            f"the adapter's peft_type is {config.get('peft_type')!r}; corral loads LoRA adapters",
            where=str(path),
            hint="merge it with the program that made it, and name the merged model",
        )
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(
            "the adapter does not say which model it belongs to (base_model_name_or_path)",
            where=str(path),
            hint="write the model's name or folder there",
        )
    weights = folder / _WEIGHTS
    if not weights.is_file():
        raise ModelError(f"the adapter has no {_WEIGHTS}, and corral reads no other weights", where=str(folder))
    tensor_shapes(weights)
    return base


def find_base_model(adapter: Path) -> Path:
    """The folder of an adapter's base model: `asset:`, `hub:`, a folder or a hub id, as the adapter's config names it.

    If that folder is gone and the adapter lies in a run (which may have been moved), the folder of that name in the run.

    Raises:
        ModelError: the adapter cannot be used, or its base model is not found or cannot be loaded.
        AssetError: an unknown, unreachable or damaged asset.
    """
    base = check_adapter(adapter)
    if not base.startswith(("asset:", "hub:")) and not Path(base).expanduser().exists():
        run = adapter.absolute().parents[1]
        merged = run.joinpath(*Path(base).parts[-2:])
        if is_run(run) and merged.is_dir():
            base = str(merged)
        elif HUB_ID.fullmatch(base):
            base = f"hub:{base}"
    try:
        return resolve_model(base).folder
    except ModelError as error:
        raise ModelError(f"the base model of the adapter: {error.what}", where=str(adapter), hint=error.hint) from error


def check_fit(adapter: Path, folder: Path) -> None:
    """Check that the matrices of a LoRA adapter have the sizes of a model's weights.

    Without this, PEFT skips layers that the model lacks, and vLLM writes a small matrix into the corner of a large one.

    Raises:
        ModelError: it names the layer.
    """
    weights = {name: shape for path in weight_files(folder) for name, shape in tensor_shapes(path).items()}
    for key, shape in tensor_shapes(adapter / _WEIGHTS).items():
        layer, _, part = key.removeprefix("base_model.model.").partition(".lora_")
        weight = weights.get(f"{layer}.weight")
        if weight is None:
            problem = f"{folder} has no layer {layer!r}"
        elif (part == "A.weight" and shape[1] != weight[1]) or (part == "B.weight" and shape[0] != weight[0]):
            problem = f"its {key} is {shape}, the model's weight {weight}"
        else:
            continue
        raise ModelError(
            f"the adapter does not fit the model: {problem}",
            where=str(adapter),
            hint="name the model that it was trained on as base_model_name_or_path in its adapter_config.json",
        )
