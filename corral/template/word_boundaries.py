"""Splits a text into words whose ids, joined, are those of the whole text, for tokenizers whose rules are known.

Most words repeat, and the ids of a known word need no tokenizer.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

# Split before a space that follows a visible ASCII character and precedes a letter. In each rule below, a match before it
# cannot contain the space, no rule looks behind, none looks ahead past a visible character, and the match that begins with
# the space is a word whatever comes before.
_BOUNDARY = re.compile(r"(?<=[!-~])(?= [A-Za-z])")

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_SPACE = "▁"


def split_words(text: str) -> list[str]:
    """The words of a text, each but the first with the space before it."""
    return _BOUNDARY.split(text)


def words_keep_ids(config: dict[str, Any]) -> bool:
    """Whether a tokenizer gives the words of a text the same ids as in the whole text.

    Words after the first must be tokenised as running text, without a space put before them.

    Args:
        config: the content of its `tokenizer.json`.
    """
    model: dict[str, Any] = config["model"]
    if model["type"] != "BPE" or model.get("dropout") or model.get("continuing_subword_prefix"):
        return False
    if not all(token["special"] for token in config["added_tokens"]):
        return False  # such a token may contain a space, and is found in any text
    if config.get("pre_tokenizer") is None:
        return _is_llama_2(config.get("normalizer"), model)
    return config.get("normalizer") is None and _splits_words(config["pre_tokenizer"])


def _is_llama_2(normalizer: Any, model: dict[str, Any]) -> bool:
    """SentencePiece's BPE on text with `▁` for spaces, where no token, and so no merge, crosses a word boundary."""
    parts: list[Any] = (normalizer or {}).get("normalizers", [])
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepends = {"type": "Prepend", "prepend": _SPACE}
    vocabulary: dict[str, int] = model["vocab"]
    return (
        parts in ([replaces], [prepends, replaces])
        and bool(model.get("byte_fallback"))
        and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
        and not any(a != _SPACE and b == _SPACE for token in vocabulary for a, b in pairwise(token))
    )


def _splits_words(pre_tokenizer: dict[str, Any]) -> bool:
    """GPT-2's rule for words, perhaps after splitting digits (SmolLM2), or Llama-3's."""
    *before, last = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        return False
    split = {"type": "Split", "pattern": {"Regex": _LLAMA_3}, "behavior": "Isolated", "invert": False}
    if last.get("use_regex", True):
        return all(part["type"] == "Digits" for part in before)
    return before == [split]
