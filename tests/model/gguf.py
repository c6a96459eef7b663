"""GGUF files written with llama.cpp's own package, as its converter lays them out, and their conversion to a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

from corral.model.gguf_reader import convert_to_folder
from corral.model.loading import quiet

TEXTS = [
    "hello  world",
    "\n1. Step 2,350 g",
    "  lead and trail  ",
    "naïve 🍕 東京 ½ cup",
    "[INST] hi [/INST] ok",
    "",
    " ",
    "a\n\n\nb\t\tc \n 12 345 6789",
    "Don't WE'LL they'Ve",
    "\u200b\u00a0x\u3000y e\u0301",
    "def f(x):\n    return {'a': [1, 2]}  # ok\r\n",
    "حروف עברית हिन्दी ไทย",
]


def as_llama_cpp_orders(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q and k as llama.cpp orders them: each head's two rotary halves interleaved."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def add_model(writer: GGUFWriter, model: Any) -> None:
    """Metadata and float32 weights of a Llama, as llama.cpp's own converter lays them out."""
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for key, tensor in model.state_dict().items():
        weight = tensor.numpy()
        module = key.removesuffix(".weight")
        if module in outer:
            writer.add_tensor(f"{outer[module]}.weight", weight)
            continue
        _, _, layer, rest = module.split(".", 3)
        name = names[rest]
        weight = as_llama_cpp_orders(weight, heads[name]) if name in heads else weight
        writer.add_tensor(f"blk.{layer}.{name}.weight", np.ascontiguousarray(weight))


def add_byte_level_tokenizer(writer: GGUFWriter, backend: Any, pre: str, bos: int, eos: int) -> None:
    state = json.loads(backend.to_str())
    tokens = [token for token, _ in sorted(backend.get_vocab().items(), key=lambda item: item[1])]
    specials = {token["id"] for token in state["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i in specials else 1 for i in range(len(tokens))])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]])
    writer.add_bos_token_id(bos)
    writer.add_eos_token_id(eos)


def write_gguf_file(path: Path, *parts: Callable[[GGUFWriter], None], architecture: str = "llama") -> Path:
    writer = GGUFWriter(str(path), architecture)
    for part in parts:
        part(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def convert(path: Path) -> Path:
    """The folder that corral converts a GGUF file into."""
    folder = path.with_suffix(".converted")
    folder.mkdir()
    with quiet():
        convert_to_folder(path, folder)
    return folder
