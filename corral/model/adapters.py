"""What of a model is trained: LoRA adapters through PEFT (attach, save, load), or all of its weights.

Knows nothing about training. What is saved is PEFT's own format, so that any tool that reads PEFT adapters reads ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corral.errors import ModelError
from corral.model.compute.fused_forwards import fuse
from corral.model.compute.lora_linear import replace_forward
from corral.model.loading import quiet

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from corral.recipe import Lora


def attach(model: PreTrainedModel, lora: Lora, *, seed: int) -> PeftModel:
    """Freeze a model and put fresh adapters on it, ready to train; their first weights depend on the seed alone.

    Raises:
        ModelError: no layer of the model has one of the target names, or it is the output layer's.
    """
    import torch

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


def train_all_weights(model: PreTrainedModel, compute: torch.dtype) -> PreTrainedModel:
    """A model of which every weight is trained, tied ones as one.

    Weights and their gradients stay in float32: in bfloat16 an update smaller than 1/256 of a weight is lost. With bfloat16 to
    compute in, the layers see weights and activations rounded to it, and the head computes in float32. float16, too narrow
    for that, is float32 throughout.

    Args:
        model: in float32.
        compute: the dtype that the layers compute in.
    """
    import torch

    model.requires_grad_(True)
    if compute == torch.bfloat16:
        _compute_in_bfloat16(model)
    else:
        fuse(model)
    return model


def _compute_in_bfloat16(model: PreTrainedModel) -> None:
    from torch import nn

    backbone: Any = model.base_model
    last = {id(child) for child in backbone.children()}
    for module in backbone.modules():
        if isinstance(module, nn.Linear):
            replace_forward(module, _rounded_linear)
        elif isinstance(module, nn.Embedding):
            replace_forward(module, _rounded_embedding)
        elif next(module.parameters(recurse=False), None) is not None and id(module) not in last:  # a norm in a layer
            replace_forward(module, _rounded_norm)


def _rounded_linear(layer: Any, x: torch.Tensor) -> torch.Tensor:
    import torch.nn.functional as F

    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


def _rounded_embedding(embedding: Any, ids: torch.Tensor) -> torch.Tensor:
    return type(embedding).forward(embedding, ids).bfloat16()


def _rounded_norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return type(norm).forward(norm, x).to(x.dtype)


def save(model: PeftModel, folder: Path, *, base: str, weights: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write the adapter (never the base) into an existing folder.

    Args:
        base: recorded as the model it belongs to.
        weights: the trained parameters by name, instead of those the model holds; with several processes it holds parts.
    """
    model.peft_config["default"].base_model_name_or_path = base
    state = None if weights is None else dict(weights)
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False, state_dict=state)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card is a form with nothing filled in


def load(model: PreTrainedModel, *folders: Path) -> PeftModel:
    """The model with adapters from folders on it, the first one switched on, in eval mode.

    In its `peft_config` the first is called "default"; they stand there in the order given.

    Raises:
        ModelError: a folder holds no adapter.
    """
    with quiet():
        from peft import PeftModel

    for folder in folders:
        if not (folder / "adapter_model.safetensors").is_file():
            hint = "give a folder that PEFT or corral wrote"
            raise ModelError("there is no adapter here", where=str(folder), hint=hint)
    first, *others = folders
    with quiet():
        adapted: Any = PeftModel.from_pretrained(model, str(first))
        for number, folder in enumerate(others, start=2):
            adapted.load_adapter(str(folder), f"adapter-{number}")
    return adapted.eval()
