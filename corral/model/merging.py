"""A trained model as a plain Hugging Face folder that stands by itself.

Knows nothing about whether the result is good: `contract` measures it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corral.errors import ModelError
from corral.model.loading import quiet
from corral.storage import write_json
from corral.template import Template

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


def merge_adapter(model: PeftModel) -> PreTrainedModel:
    """The model with the adapter's update added to its weights, which must not be quantised. The adapted one is consumed.

    Raises:
        ModelError: the update is not finite.
    """
    try:
        with quiet():
            result: Any = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError(
            f"the adapter cannot be merged: {error}",
            where="the adapter's weights",
            hint="train it again with a lower learning rate",
        ) from error
    return result.eval()


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

    The folder then holds safetensors weights, config, tokenizer, `chat_template.jinja` in the form that others render,
    `generation_config.json` with every id that ends an answer, and the licence texts of the base. transformers and vLLM
    load it as it is.

    Args:
        weights: the parameters by name, instead of those the model holds; with several processes it holds parts only.
        dtype: what they are rounded to on disk; by default they are written as they are.
    """
    written: Any = model
    generation = written.generation_config
    generation.eos_token_id = list(template.stop_ids)
    generation.bos_token_id = template.tokenizer.bos_token_id
    pad: Any = template.tokenizer.pad_token_id
    generation.pad_token_id = template.stop_ids[0] if pad is None else pad
    # The base's advice on sampling is for the base.
    generation.do_sample, generation.temperature, generation.top_p, generation.top_k = False, None, None, None
    settings: dict[str, Any] = {}
    if weights is not None:
        settings["state_dict"] = {n: w.detach().to("cpu", dtype or w.dtype).contiguous() for n, w in weights.items()}
    with quiet():
        written.save_pretrained(str(folder), safe_serialization=True, **settings)
    if dtype is not None:  # transformers writes down what the model itself is in
        config = json.loads((folder / "config.json").read_text("utf-8"))
        write_json(folder / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
    template.save(folder)
    for licence in licences:
        shutil.copyfile(licence, folder / licence.name)
