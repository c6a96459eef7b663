"""Reads and checks `params.json` of Meta's checkpoints: the hyperparameters of a dense Llama.

Names and defaults are those of Meta's code. An unknown key could change the architecture, so it is an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from corral.errors import ModelError

AGAIN = "fetch the folder again as Meta publishes it, and compare with its checklist.chk"
"""Error hint for a damaged checkpoint."""
OTHER = "corral converts Meta's Llama 2 and Llama 3 text models; for others use a Hugging Face folder"
"""Error hint for a checkpoint of another architecture."""
_RUNTIME = frozenset({"max_seq_len", "max_batch_size"})  # buffer sizes of Meta's own program


@dataclass(frozen=True, slots=True)
class MetaParams:
    """The checked values of `params.json`, under Meta's names.

    `hidden` is not in the file: it is the width of the feed-forward layers, computed from the other values. If `vocab_size`
    is None, the tokenizer determines it. If a rope value is None, `meta_checkpoint` chooses it.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int | None
    hidden: int
    norm_eps: float
    rope_theta: float | None
    use_scaled_rope: bool
    rope_scaling_factor: float | None
    rope_high_freq_factor: float


def read_params(path: Path) -> MetaParams:
    """Reads and checks `params.json`.

    Raises:
        ModelError: if the file cannot be read, a value is invalid, or it describes another architecture.
    """

    def fail(what: str) -> ModelError:
        return ModelError(f"params.json {what}", where=str(path), hint=AGAIN)

    try:
        value: Any = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise fail(f"cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise fail("holds no JSON object")
    stated = {key: entry for key, entry in cast("dict[str, Any]", value).items() if entry is not None}

    def number(key: str, kind: type[int] | type[float], default: Any = None, most: float = 2**31) -> Any:
        value = stated.pop(key, default)
        fits = isinstance(value, (int, kind)) and not isinstance(value, bool)
        if value is not default and not (fits and 0 < value <= most):
            raise fail(f"has {key} {value!r}, which is not {'a count' if kind is int else 'a number above 0'}")
        return value

    def count(key: str) -> int:
        value = number(key, int)
        if value is None:
            raise fail(f"does not say {key}")
        return value

    if stated.get("vocab_size") == -1:  # in Llama 2: the size of the tokenizer
        del stated["vocab_size"]
    dim, heads = count("dim"), count("n_heads")
    kv_heads: int = number("n_kv_heads", int, heads)
    scaled = stated.pop("use_scaled_rope", False)
    if not isinstance(scaled, bool):
        raise fail(f"has use_scaled_rope {scaled!r}, which is not true or false")
    # Meta's rule for the feed-forward width: 2/3 of 4 × dim, times ffn_dim_multiplier, rounded up to a multiple.
    stretched = int(number("ffn_dim_multiplier", float, 1.0, most=1000) * int(8 * dim / 3))
    multiple: int = number("multiple_of", int, 256)
    factor: float | None = number("rope_scaling_factor", float)
    params = MetaParams(
        dim=dim,
        n_layers=count("n_layers"),
        n_heads=heads,
        n_kv_heads=kv_heads,
        vocab_size=number("vocab_size", int),
        hidden=math.ceil(stretched / multiple) * multiple,
        norm_eps=number("norm_eps", float, 1e-5, most=1),
        rope_theta=number("rope_theta", float),
        use_scaled_rope=scaled,
        rope_scaling_factor=factor,
        rope_high_freq_factor=number("rope_high_freq_factor", float, 4.0),
    )
    _refuse_others(stated, fail)
    if dim % (2 * heads) or heads % kv_heads:
        raise fail(f"has dim {dim}, n_heads {heads} and n_kv_heads {kv_heads}, which do not divide one another")
    for key, least in (("rope_high_freq_factor", params.rope_high_freq_factor), ("rope_scaling_factor", factor)):
        if scaled and least is not None and least <= 1:
            raise fail(f"has {key} {least}, which must be above 1")
    return params


def _refuse_others(rest: dict[str, Any], fail: Callable[[str], ModelError]) -> None:
    """Raises ModelError for any remaining key, unless it is switched off or a runtime setting."""
    unknown = sorted(key for key, entry in rest.items() if entry not in (False, {}, -1) and key not in _RUNTIME)
    if unknown:
        error = fail(f"says {', '.join(unknown[:4])}: this is not a dense Llama 2 or 3 for text alone")
        error.hint = OTHER
        raise error
