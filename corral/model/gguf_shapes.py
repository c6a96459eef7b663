"""Compares the tensors of a GGUF file with those that its Llama metadata requires.

transformers builds a model from the metadata before it loads the tensors, so a few changed bytes could make it build
billions of layers. This check runs before any model is built. It looks at names and shapes only, not at types or data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ROPE_DIVISORS = "rope_freqs.weight"
_PER_LAYER = 9


def find_shape_error(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Describes the first mismatch between metadata and tensors; None if there is none.

    Args:
        metadata: metadata of a file of the llama architecture.
        shapes: shape of each tensor by name, in GGUF's order (the row length first).
    """
    names = ("embedding_length", "feed_forward_length", "block_count", "attention.head_count")
    numbers = {name: metadata.get(f"llama.{name}") for name in names}
    numbers["attention.head_count_kv"] = metadata.get("llama.attention.head_count_kv", numbers["attention.head_count"])
    for name, value in numbers.items():
        if not _is_count(value):
            return f"llama.{name} is {value!r}"
    hidden, inner, layers, heads, groups = (int(value or 0) for value in numbers.values())
    head_dim = metadata.get("llama.rope.dimension_count", hidden // heads)
    if not _is_count(head_dim) or head_dim % 2 or metadata.get("llama.attention.key_length", head_dim) != head_dim:
        return f"llama.rope.dimension_count is {head_dim!r}, with {heads} heads in {hidden} dimensions"
    if heads % groups:
        return f"{heads} query heads cannot share {groups} key heads"
    if not layers * _PER_LAYER < len(shapes):
        return f"llama.block_count is {layers}, with {len(shapes)} tensors in all"
    wide, narrow = heads * head_dim, groups * head_dim
    rows = shapes.get("token_embd.weight", (0, 0))[-1]
    if metadata.get("llama.vocab_size", rows) != rows:
        return f"llama.vocab_size is {metadata['llama.vocab_size']!r}, with {rows} rows of embeddings"
    expected: dict[str, tuple[int, ...]] = {"token_embd.weight": (hidden, rows), "output_norm.weight": (hidden,)}
    for layer in range(layers):
        each = {"attn_norm": (hidden,), "ffn_norm": (hidden,)}
        each |= {"attn_q": (hidden, wide), "attn_k": (hidden, narrow), "attn_v": (hidden, narrow)}
        each |= {"attn_output": (wide, hidden), "ffn_down": (inner, hidden)}
        each |= {"ffn_gate": (hidden, inner), "ffn_up": (hidden, inner)}
        expected |= {f"blk.{layer}.{name}.weight": shape for name, shape in each.items()}
    optional = {"output.weight": (hidden, rows), ROPE_DIVISORS: (head_dim // 2,)}
    for name in expected:
        if name not in shapes:
            return f"it lacks {name}"
    expected |= optional
    for name, shape in shapes.items():
        if shape != expected.get(name):
            fault = f"not {expected[name]}" if name in expected else "and no Llama has such a tensor"
            return f"{name} has shape {shape}, {fault}"
    return None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
