"""Writes a tokenizer's files so that transformers 4 and 5 read the same tokenizer from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corral.storage import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` into a folder.

    transformers 5 writes a config that transformers 4 refuses: it does not know the class `TokenizersBackend`, nor a list of
    `extra_special_tokens`. It would also return inputs that no Llama takes, and decode with fewer spaces.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(path.read_text("utf-8"))
    for circumstance in ("backend", "is_local", "local_files_only"):
        config.pop(circumstance, None)
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["model_input_names"] = ["input_ids", "attention_mask"]
    config["clean_up_tokenization_spaces"] = False
    write_json(path, config)
