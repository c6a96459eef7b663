"""Merge an adapter into its model, and save a trained model as a complete Hugging Face folder."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from corral.errors import ModelError
from corral.model.config import state_for_transformers_4
from corral.model.loading import quiet
from corral.storage import write_json
from corral.template import Template

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def merge_adapter(model: PeftModel) -> PreTrainedModel:
    """The model with the adapter's update added to its weights, which must not be quantised. Consumes `model`.

    An embedding that is also the output layer becomes two weights if the adapter changes the two differently.

    Raises:
        ModelError: the update is not finite, or adds a bias to layers that have none.
    """
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if any(any(layer.lora_bias.values()) and getattr(layer.get_base_layer(), "bias", None) is None for layer in layers):
        raise ModelError(
            "the adapter cannot be merged: it adds biases (lora_bias) to layers that have none",
            where="the adapter's weights",
            hint="use it as it is, with the transformers engine",
        )
    _untie(model)
    adapted: Any = model
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's advice for tied weights, which are untied here
            result: Any = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError(
            f"the adapter cannot be merged: {error}",
            where="the adapter's weights",
            hint="train it again with a lower learning rate",
        ) from error
    return result.eval()


def _untie(model: PeftModel) -> None:
    """Give the output layer a weight of its own if it shares the embedding's and the adapter may change them differently.

    PEFT would add what the adapter learned for one to both.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import TrainableTokensWrapper

    causal: Any = model.get_base_model()
    parts: list[Any] = [causal.get_input_embeddings(), causal.get_output_embeddings()]
    parts = [part.token_adapter if isinstance(part, TrainableTokensWrapper) else part for part in parts]
    is_adapted = [isinstance(part, BaseTunerLayer) for part in parts]
    if not any(is_adapted) or getattr(parts[1], "tied_adapter", None) is not None:
        return
    embedding, head = (
        part.get_base_layer() if adapted else part for part, adapted in zip(parts, is_adapted, strict=True)
    )
    if head.weight is embedding.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        causal.config.tie_word_embeddings = False


def save_model(
    model: PreTrainedModel,
    template: Template,
    folder: Path,
    *,
    licences: Sequence[Path],
    weights: Mapping[str, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model into an existing folder.

    The folder then holds safetensors weights, config, tokenizer, `chat_template.jinja` as other programs render it,
    `generation_config.json` with every id that ends an answer and no other setting of the base model's, and its licence texts.
    transformers 4 and 5 and vLLM load it as it is.

    Args:
        weights: the parameters by name, if the model itself holds only this process's part of them.
        dtype: to round `weights` to; by default they are written as they are.
    """
    from transformers import GenerationConfig

    written: Any = model
    written.config.eos_token_id = list(template.stop_ids)
    pad: Any = template.tokenizer.pad_token_id
    # The base model's settings are not meant for the trained model, and corral did not evaluate it with them.
    written.generation_config = GenerationConfig(
        eos_token_id=list(template.stop_ids),
        bos_token_id=template.tokenizer.bos_token_id,
        pad_token_id=template.stop_ids[0] if pad is None else pad,
    )
    settings: dict[str, Any] = {}
    if weights is not None:
        settings["state_dict"] = {n: w.detach().to("cpu", dtype or w.dtype).contiguous() for n, w in weights.items()}
    with quiet():
        written.save_pretrained(str(folder), safe_serialization=True, **settings)
    if dtype is not None:  # transformers records the dtype of the model in memory
        config = json.loads((folder / "config.json").read_text("utf-8"))
        write_json(folder / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
    state_for_transformers_4(folder, written.config)
    template.save(folder)
    for licence in licences:
        shutil.copyfile(licence, folder / licence.name)
