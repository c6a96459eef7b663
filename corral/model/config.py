"""A Llama's config: read as its weights are, and written so that transformers 4 and 5 compute the same model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from corral.errors import ModelError
from corral.model.folder import read_json, tensor_shapes, weight_files
from corral.storage import write_json

if TYPE_CHECKING:
    from transformers import LlamaConfig

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ROWS = 4096  # compared at once


def read_config(folder: Path) -> LlamaConfig:
    """The config of a checked model folder, whose `tie_word_embeddings` is what the weights are.

    Programs that believe config.json leave out a head that differs from the embedding; others compute with it.

    Raises:
        ModelError: config.json cannot be used, or the weights lack the head.
    """
    from transformers import LlamaConfig

    where = str(folder / "config.json")
    try:
        config = LlamaConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the config's own validation raises classes of its own
        raise ModelError(f"config.json cannot be read: {error}", where=where, hint="fetch the model again") from error
    file_of = {name: path for path in weight_files(folder) for name in tensor_shapes(path)}
    if _HEAD not in file_of and not config.tie_word_embeddings:
        raise ModelError(
            f"the weights have no {_HEAD}, and tie_word_embeddings is false",
            where=where,
            hint="fetch or merge the model again; if its head is its embedding, set tie_word_embeddings to true",
        )
    if _HEAD in file_of and _EMBEDDING in file_of and config.tie_word_embeddings:
        config.tie_word_embeddings = _equal(file_of)
    return config


def _equal(file_of: dict[str, Path]) -> bool:
    """Whether the head in the weight files is the embedding."""
    import torch
    from safetensors import safe_open

    with safe_open(file_of[_EMBEDDING], "pt") as a, safe_open(file_of[_HEAD], "pt") as b:
        embedding, head = a.get_slice(_EMBEDDING), b.get_slice(_HEAD)
        shape = embedding.get_shape()
        return shape == head.get_shape() and all(
            torch.equal(embedding[row : row + _ROWS].float(), head[row : row + _ROWS].float())
            for row in range(0, shape[0], _ROWS)
        )


def state_for_transformers_4(folder: Path, config: LlamaConfig) -> None:
    """State the rotary embedding in config.json a second time, as transformers 4 reads it: `rope_theta`, `rope_scaling`.

    transformers 5 writes it as `rope_parameters` only. transformers 4 does not read that, and computes another model without a
    message. Where both forms are there, transformers 5 reads `rope_scaling` first, so they must agree in all that it reads.

    Args:
        folder: holds the config.json of `config`.
    """
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope: dict[str, Any] = dict(config.rope_parameters or {})
    stated: dict[str, Any] = {"rope_theta": rope.pop("rope_theta"), "rope_scaling": None}
    if rope["rope_type"] == "longrope":
        # transformers 4 reads the original length here only, and computes an attention factor that is not stated otherwise.
        stated["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
        rope["attention_factor"] = float(LlamaRotaryEmbedding(config).attention_scaling)
    if rope["rope_type"] != "default":
        stated["rope_scaling"] = rope
    path = folder / "config.json"
    write_json(path, read_json(path) | stated)
