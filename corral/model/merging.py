"""Merging an adapter into its base, as a plain Hugging Face folder that stands by itself.

Knows nothing about whether the result is good: `contract` measures it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corral.model.loading import quiet
from corral.template import Template

if TYPE_CHECKING:
    from peft import PeftModel


def merge_to_folder(model: PeftModel, template: Template, folder: Path, *, licences: Sequence[Path]) -> None:
    """Add the adapter's update to the base weights and write the model into an existing folder.

    The folder then holds safetensors weights, config, tokenizer, `chat_template.jinja` in the form that others render,
    `generation_config.json` with every id that ends an answer, and the licence texts of the base. transformers and vLLM
    load it as it is. The adapted model is consumed: its base weights now hold the update.
    """
    merged: Any = model.merge_and_unload(safe_merge=True)
    generation = merged.generation_config
    generation.eos_token_id = list(template.stop_ids)
    generation.bos_token_id = template.tokenizer.bos_token_id
    pad: Any = template.tokenizer.pad_token_id
    generation.pad_token_id = template.stop_ids[0] if pad is None else pad
    # The base's advice on sampling is for the base.
    generation.do_sample, generation.temperature, generation.top_p, generation.top_k = False, None, None, None
    with quiet():
        merged.save_pretrained(str(folder), safe_serialization=True)
    template.save(folder)
    for licence in licences:
        shutil.copyfile(licence, folder / licence.name)
