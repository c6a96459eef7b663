"""LoRA adapters on a model, through PEFT: attach, save, load.

Knows nothing about training. What is saved is PEFT's own format, so that any tool that reads PEFT adapters reads ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from corral.errors import ModelError
from corral.model.fused import fuse
from corral.model.loading import quiet

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from corral.recipe import Lora


def attach(model: PreTrainedModel, lora: Lora, *, seed: int) -> PeftModel:
    """Freeze a model and put fresh adapters on it, ready to train; their first weights depend on the seed alone.

    Raises:
        ModelError: no layer of the model has one of the target names.
    """
    import torch

    with quiet():
        from peft import LoraConfig, get_peft_model

    layers = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    unknown = [target for target in lora.targets if target not in layers]
    if unknown:
        raise ModelError(
            f"the model has no linear layer called {unknown[0]!r}",
            where="train.lora.targets",
            hint=f"its linear layers are: {', '.join(sorted(layers))}",
        )
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]  (declared int, used as a factor)
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    with quiet():
        adapted: Any = get_peft_model(model, config)
    fuse(adapted)
    return adapted


def save(model: PeftModel, folder: Path, *, base: str) -> None:
    """Write the adapter (never the base) into an existing folder; `base` is recorded as the model it belongs to."""
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card is a form with nothing filled in


def load(model: PreTrainedModel, folder: Path) -> PeftModel:
    """The model with an adapter from a folder on it, in eval mode. Raises: ModelError."""
    with quiet():
        from peft import PeftModel

    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError("there is no adapter here", where=str(folder), hint="give a folder that PEFT or corral wrote")
    with quiet():
        adapted: Any = PeftModel.from_pretrained(model, str(folder))
    return adapted.eval()
