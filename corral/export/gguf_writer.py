"""Writes a merged model folder as one GGUF file for llama.cpp and programs built on it.

Weights are read, permuted and written a few rows at a time, so a model larger than memory can be exported. Names, row order
and metadata follow llama.cpp's own converter. Tensor types follow its quantiser, with one exception (the last rule):

- Norms and rope divisors are float32. Every other tensor has the requested type.
- Rows whose length is not a multiple of 32 cannot be cut into blocks, and are stored as float16.
- In a q4_0 file the output matrix (with tied embeddings: the embeddings) is q8_0, where llama.cpp uses q6_K if it can. q8_0
  is a little larger and more exact, and is llama.cpp's own fallback.

GGUF has a metadata key for the licence's name but none for its text. The Modelfile holds the text, and the licence file
should be kept next to the GGUF file. This module does not check the result; `export.contract` compares it with the folder.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from errno import ENOSPC
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, RopeScalingType
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray
from safetensors import safe_open

from corral.errors import ModelError
from corral.export.gguf_vocabulary import GgufVocabulary, read_vocabulary
from corral.export_forms import GgufType
from corral.model.config import read_config
from corral.model.folder import check_folder, licence_texts, weight_files
from corral.model.gguf_shapes import ROPE_DIVISORS
from corral.model.rope import llama3_divisors
from corral.storage import storage_errors

_FILE_TYPES: dict[GgufType, int] = {"f16": 1, "q8_0": 7, "q4_0": 2}  # llama.cpp's LLAMA_FTYPE_MOSTLY_…
_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_ALIGNMENT = 32
_LARGEST = 65504.0  # the largest float16; the scales of the quantised types are float16 too
_CHUNK = 2**22  # elements read at once: 16 MiB as float32
_LICENCES = (
    (re.compile(r"\s*Apache License\s+Version 2\.0"), "apache-2.0", "Apache License 2.0"),
    (re.compile(r"\s*(The )?MIT License", re.I), "mit", "MIT License"),
    (re.compile(r"\s*LLAMA 2 COMMUNITY LICENSE", re.I), "llama2", "Llama 2 Community License"),
    (re.compile(r"\s*(META )?LLAMA 3 COMMUNITY LICENSE", re.I), "llama3", "Llama 3 Community License"),
    (re.compile(r"\s*LLAMA 3\.1 COMMUNITY LICENSE", re.I), "llama3.1", "Llama 3.1 Community License"),
    (re.compile(r"\s*LLAMA 3\.2 COMMUNITY LICENSE", re.I), "llama3.2", "Llama 3.2 Community License"),
)


def write_gguf(
    folder: Path,
    path: Path,
    type: GgufType,  # noqa: A002 - as on the command line
    *,
    stop_ids: Sequence[int],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the model of a Hugging Face folder as a GGUF file. The write is atomic.

    Concurrent writers of one `path` must share a lock (`storage.file_lock`).

    Args:
        folder: safetensors (one file or several), config, tokenizer and chat template.
        path: the file to create or replace; its folder is created if missing.
        type: type of the matrices.
        stop_ids: the ids that end an answer, one to three.
        progress: called with (bytes of weights written, bytes in total) after each piece.

    Raises:
        ModelError: if the folder is not a Llama model, if llama.cpp would compute the model or split text differently, or if
            a weight does not fit float16.
        TemplateError: if the chat template has generation markers and cannot be used.
        StorageError: if the disk is full or `path` cannot be written.
    """
    check_folder(folder)
    config = check_config(folder)
    with ExitStack() as stack:
        weights = _weights(folder, config, stack)
        embedding = next(w for w in weights if w.name == "token_embd.weight")
        words = read_vocabulary(folder, embedding.shape[0], stop_ids)
        plan = [(weight, _type_of(weight, type, tied=bool(config.tie_word_embeddings))) for weight in weights]
        total = sum(_padded(_size(weight.shape, kind)) for weight, kind in plan)
        with _new_file(path, total) as temporary:
            _write_head(temporary, folder, config, words, plan, type)
            _write_data(temporary, plan, total, progress)


@dataclass(frozen=True, slots=True)
class _Weight:
    """A tensor to write: its GGUF name, its shape (rows first), and a function that reads rows [first, last) as float32."""

    name: str
    shape: tuple[int, ...]
    rows: Callable[[int, int], NDArray[np.float32]]
    step: int
    """Rows are read in multiples of this number."""


def stored_weight(name: str, weight: NDArray[np.float32], types: Mapping[str, str]) -> NDArray[np.float32]:
    """Rounds a weight as the GGUF file stores it, and converts it back to float32.

    Args:
        name: the weight's name in transformers.
        weight: the unrounded weight.
        types: type of each tensor of the file by its GGUF name, from `gguf_reader.read_header`.
    """
    kind = GGMLQuantizationType[types[_gguf_name(name)]]
    return np.ascontiguousarray(dequantize(quantize(weight, kind), kind), dtype=np.float32).reshape(weight.shape)


def permute_rotary_rows(rows: NDArray[np.float32], head_dim: int) -> NDArray[np.float32]:
    """Reorders the rows of query or key heads from transformers' order to llama.cpp's.

    transformers pairs each row of a head's first half with a row of its second half for the rotation; llama.cpp pairs
    neighbouring rows.

    Args:
        rows: [heads × head_dim, hidden], whole heads only.
        head_dim: rows of one head.
    """
    heads = rows.shape[0] // head_dim
    return rows.reshape(heads, 2, head_dim // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def check_config(folder: Path) -> Any:
    """The config of a model folder. Raises: ModelError (it says what a GGUF file of the llama architecture cannot)."""
    config: Any = read_config(folder)
    rope: dict[str, Any] = config.rope_parameters
    checks = (
        ("rope_type", rope.get("rope_type"), ("default", "linear", "llama3")),
        ("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), (1.0,)),
        ("hidden_act", config.hidden_act, ("silu",)),
        ("attention_bias", config.attention_bias, (False,)),
        ("mlp_bias", config.mlp_bias, (False,)),
    )
    for key, value, known in checks:
        if value not in known:
            raise ModelError(
                f"{key} is {value!r}; a GGUF file of the llama architecture can say {' or '.join(map(repr, known))}",
                where=str(folder / "config.json"),
                hint="use the model folder itself; vLLM and transformers read it",
            )
    return config


def _weights(folder: Path, config: Any, stack: ExitStack) -> list[_Weight]:
    """All tensors in file order. Raises ModelError if a tensor is missing, unknown or has the wrong shape."""
    tensors: dict[str, Any] = {}
    for file in weight_files(folder):
        opened: Any = stack.enter_context(safe_open(file, "pt"))
        tensors |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    head_dim = config.head_dim
    wide, narrow = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    sizes: dict[str, tuple[int, ...]] = {"attn_q": (wide, hidden), "attn_k": (narrow, hidden)}
    sizes |= {"attn_v": (narrow, hidden), "attn_output": (hidden, wide), "ffn_down": (hidden, inner)}
    sizes |= {"ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "attn_norm": (hidden,), "ffn_norm": (hidden,)}
    sizes |= {
        "token_embd": (config.vocab_size, hidden),
        "output": (config.vocab_size, hidden),
        "output_norm": (hidden,),
    }
    inner_names = [f"model.layers.{i}.{theirs}.weight" for i in range(config.num_hidden_layers) for theirs in _INNER]
    ordered = ["model.embed_tokens.weight", *inner_names, "model.norm.weight", "lm_head.weight"]
    names = {name: _gguf_name(name) for name in ordered}
    if config.tie_word_embeddings:
        del names["lm_head.weight"]
        tensors.pop("lm_head.weight", None)
    known = {key for key in tensors if key.endswith("rotary_emb.inv_freq")} | names.keys()
    wrong = {"lacks": sorted(names.keys() - tensors.keys()), "has unknown": sorted(tensors.keys() - known)}
    wrong |= {"has in another shape": [key for key, name in names.items() if key in tensors
              and tuple(tensors[key].get_shape()) != sizes[name.split(".")[-2]]]}  # fmt: skip
    for what, keys in wrong.items():
        if keys:
            raise ModelError(
                f"the model {what} {keys[0]}{f' and {len(keys) - 1} more' if len(keys) > 1 else ''}",
                where=str(folder),
                hint="export a model folder that transformers loads without a warning",
            )
    weights = [_weight(names[key], tensors[key], head_dim) for key in names]
    if config.rope_parameters["rope_type"] == "llama3":
        divisors = llama3_divisors(config)
        weights.append(_Weight(ROPE_DIVISORS, divisors.shape, lambda a, b: divisors[a:b], 1))
    return weights


def _gguf_name(name: str) -> str:
    """Converts transformers' name of a weight to its GGUF name."""
    if name in _OUTER:
        return _OUTER[name]
    _, _, layer, inner = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{_INNER[inner]}.weight"


def _weight(name: str, source: Any, head_dim: int) -> _Weight:
    turned = name.endswith(("attn_q.weight", "attn_k.weight"))

    def rows(first: int, last: int) -> NDArray[np.float32]:
        part: NDArray[np.float32] = source[first:last].float().numpy()
        return permute_rotary_rows(part, head_dim) if turned else part

    return _Weight(name, tuple(source.get_shape()), rows, head_dim if turned else 1)


def _type_of(weight: _Weight, form_type: GgufType, *, tied: bool) -> GGMLQuantizationType:
    if len(weight.shape) == 1:
        return GGMLQuantizationType.F32
    if form_type == "f16" or weight.shape[-1] % 32:
        return GGMLQuantizationType.F16
    if form_type == "q8_0" or weight.name == ("token_embd.weight" if tied else "output.weight"):
        return GGMLQuantizationType.Q8_0
    return GGMLQuantizationType.Q4_0


def _size(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block, width = GGML_QUANT_SIZES[kind]
    return prod(shape) // block * width


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


@contextmanager
def _new_file(path: Path, needed: int) -> Generator[Path]:
    """Yields a temporary path next to `path`. It replaces `path` if the block succeeds; otherwise it is deleted."""
    temporary = path.with_name(f".corral-tmp-{path.name}")
    with storage_errors(path, needed=needed):
        path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(path.parent).free < needed:
            raise OSError(ENOSPC, os.strerror(ENOSPC), str(path))
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _write_head(
    path: Path,
    folder: Path,
    config: Any,
    words: GgufVocabulary,
    plan: list[tuple[_Weight, GGMLQuantizationType]],
    form_type: GgufType,
) -> None:
    """Writes the header, the metadata and the tensor table."""
    path.unlink(missing_ok=True)  # a killed writer may have left one
    writer = GGUFWriter(str(path), "llama")
    try:
        _add_model(writer, folder, config, form_type)
        _add_vocabulary(writer, words)
        for weight, kind in plan:
            size = _size(weight.shape, kind)
            writer.add_tensor_info(weight.name, weight.shape, np.dtype(np.float32), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _add_model(writer: GGUFWriter, folder: Path, config: Any, form_type: GgufType) -> None:
    writer.add_type("model")
    writer.add_name(folder.resolve().name)
    for text in licence_texts(folder):
        start = text.read_text("utf-8", errors="replace")[:500]
        for pattern, identifier, name in _LICENCES:
            if pattern.match(start):
                writer.add_license(identifier)
                writer.add_license_name(name)
                break
        else:
            continue
        break
    writer.add_file_type(_FILE_TYPES[form_type])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    rope: dict[str, Any] = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _add_vocabulary(writer: GGUFWriter, words: GgufVocabulary) -> None:
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    if words.scores:
        writer.add_token_scores(words.scores)
    if words.merges:
        writer.add_token_merges(words.merges)
    if words.add_space_prefix is not None:
        writer.add_add_space_prefix(words.add_space_prefix)
    for name, token in words.ids.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    writer.add_add_bos_token(words.add_bos)
    writer.add_add_eos_token(words.add_eos)
    if words.chat_template is not None:
        writer.add_chat_template(words.chat_template)


def _write_data(
    path: Path,
    plan: list[tuple[_Weight, GGMLQuantizationType]],
    total: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    written = 0
    with open(path, "ab") as file:
        file.write(bytes(_padded(file.tell()) - file.tell()))
        for weight, kind in plan:
            size = 0
            for data in _encoded(weight, kind):
                size += file.write(data)
                if progress:
                    progress(written + size, total)
            assert size == _size(weight.shape, kind), f"{weight.name} has {size} bytes"
            written += size + file.write(bytes(_padded(size) - size))
        if progress:
            progress(written, total)
        file.flush()
        os.fsync(file.fileno())


def _encoded(weight: _Weight, kind: GGMLQuantizationType) -> Iterator[bytes]:
    """Yields the tensor's encoded bytes, some rows at a time."""
    count = weight.shape[0]
    step = max(1, _CHUNK // prod(weight.shape[1:]) // weight.step) * weight.step
    for first in range(0, count, step):
        rows = weight.rows(first, min(first + step, count))
        largest = float(np.abs(rows).max())
        if not largest <= _LARGEST:  # NaN too
            raise ModelError(
                f"{weight.name} holds {largest}, beyond what float16 can hold ({_LARGEST:g})",
                where=f"rows {first} to {first + len(rows)}",
                hint="the model is damaged or was trained to overflow: train it again with a lower learning rate",
            )
        yield quantize(rows, kind).tobytes()
