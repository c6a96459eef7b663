from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from corral.template.tokenizer_files import save_tokenizer


def test_a_tokenizer_is_written_as_transformers_4_and_5_read_it(tiny_folder: Path, tmp_path: Path) -> None:
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(tiny_folder, clean_up_tokenization_spaces=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|ask|>", "<|done|>"]})
    save_tokenizer(tokenizer, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    # What transformers 4.57 knows: its class of tokenizers, and special tokens in a list of this name.
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|ask|>", "<|done|>"]
    assert "extra_special_tokens" not in config
    again: Any = AutoTokenizer.from_pretrained(tmp_path)
    assert again.all_special_tokens == tokenizer.all_special_tokens
    text = "ask<|ask|> 12 , 3 <|im_end|> ."
    assert dict(again(text)) == {"input_ids": tokenizer(text)["input_ids"], "attention_mask": [1] * len(again(text)[0])}
    assert again.decode(again(text)["input_ids"]) == text
