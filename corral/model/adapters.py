"""LoRA adapters in memory, by PEFT: attach a fresh one to a model, load one or several from their folders, save one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corral.errors import ModelError
from corral.model.adapter_files import WEIGHTS_FILE, AdapterFiles
from corral.model.loading import quiet

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

    from corral.recipe import Lora


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


def load(model: PreTrainedModel, *folders: Path, trainable: bool = False) -> PeftModel:
    """The model with the adapters of some folders, the first one active, in eval mode.

    In its `peft_config` they are in the given order; the first is called "default". If an adapter was trained on a resized
    vocabulary, the model's embedding is resized.

    Args:
        trainable: the adapter is to be trained further.

    Raises:
        ModelError: a folder holds no adapter that corral loads, or it does not fit the model.
    """
    adapted: Any = model
    for number, folder in enumerate(folders, start=1):
        adapted = add(adapted, folder, "default" if number == 1 else f"adapter-{number}", trainable=trainable)
    return adapted.eval()


def add(model: PreTrainedModel | PeftModel, folder: Path, name: str, *, trainable: bool = False) -> PeftModel:
    """A model with one more adapter, under a name that it has not yet.

    Raises:
        ModelError: the folder holds no adapter that corral loads, or it does not fit the model.
    """
    with quiet():
        from peft import LoraConfig, PeftModel, PeftModelForCausalLM

    adapted: Any = model
    rows = AdapterFiles.read(folder).vocabulary_size
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT warns of is checked here
            if not isinstance(model, PeftModel):
                embedding: Any = model.get_input_embeddings()
                if rows not in (None, embedding.num_embeddings):
                    model.resize_token_embeddings(rows, mean_resizing=False)
                config = LoraConfig.from_pretrained(str(folder))
                config.inference_mode = not trainable
                adapted = PeftModelForCausalLM(model, config, name)
            result = adapted.load_adapter(str(folder), name, is_trainable=trainable, torch_device=str(model.device))
    except (KeyError, ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "size mismatch" not in str(error):
            raise
        missing = isinstance(error, KeyError)
        raise _unloadable(folder, f"its weights lack {error}" if missing else str(error).strip()) from error
    lost = [*result.missing_keys, *_lost(folder, result.unexpected_keys)]
    if lost:
        raise _unloadable(folder, f"{lost[0]} is in its weights or in its config, and not in both")
    return adapted


def _lost(folder: Path, unexpected: Sequence[str]) -> list[str]:
    """Those of the keys that PEFT did not load whose tensor is not in the file a second time, under a key that it did.

    PEFT writes what it trained of a resized embedding, and of an output layer that is tied to it, twice.
    """
    from safetensors.torch import load_file

    if not unexpected:
        return []
    weights = load_file(folder / WEIGHTS_FILE)
    loaded = [weight for key, weight in weights.items() if key not in unexpected]
    return [
        key
        for key in unexpected
        if key not in weights or not any(w.shape == weights[key].shape and w.equal(weights[key]) for w in loaded)
    ]


def _unloadable(folder: Path, reason: str) -> ModelError:
    return ModelError(
        f"the adapter cannot be loaded: {reason}", where=str(folder), hint="save it again with the program that made it"
    )


def resume(model: PreTrainedModel, folder: Path) -> PeftModel:
    """The model with the adapter of a folder, to train that adapter further.

    Raises:
        ModelError: as `load`, or a part of the adapter cannot be trained.
    """
    from corral.model.compute.fused_forwards import fuse

    adapted = load(model, folder, trainable=True)
    frozen = next((name for name, p in adapted.named_parameters() if ".lora_" in name and not p.requires_grad), None)
    if frozen:
        raise ModelError(
            f"the adapter cannot be trained further: its {frozen} is meant to stay as it was (init_lora_weights = "
            f"{adapted.peft_config['default'].init_lora_weights!r})",  # pyright: ignore[reportAttributeAccessIssue]
            where=str(folder),
            hint="merge it, and train a fresh adapter on the merged model",
        )
    fuse(adapted)
    return adapted
