from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from corral.errors import ModelError
from corral.model.meta_params import read_params

LLAMA_2_7B = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05, "vocab_size": -1}
LLAMA_3 = {"norm_eps": 1e-05, "rope_theta": 500000.0, "vocab_size": 128256, "n_kv_heads": 8}
# As Meta publishes them, and the width of the feed-forward layers of their Hugging Face form.
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "Llama 2 7B": (LLAMA_2_7B, 11008),
    "Llama 2 13B": (LLAMA_2_7B | {"dim": 5120, "n_heads": 40, "n_layers": 40}, 13824),
    "Llama 2 70B": (
        LLAMA_2_7B
        | {"dim": 8192, "n_heads": 64, "n_kv_heads": 8, "n_layers": 80, "multiple_of": 4096, "ffn_dim_multiplier": 1.3},
        28672,
    ),
    "Llama 3 8B": (
        LLAMA_3 | {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 1024, "ffn_dim_multiplier": 1.3},
        14336,
    ),
    "Llama 3.2 1B": (
        LLAMA_3 | {"dim": 2048, "n_layers": 16, "n_heads": 32, "multiple_of": 256, "ffn_dim_multiplier": 1.5},
        8192,
    ),
    "Llama 3.2 3B": (
        LLAMA_3 | {"dim": 3072, "n_layers": 28, "n_heads": 24, "multiple_of": 256, "ffn_dim_multiplier": 1.0},
        8192,
    ),
}


def write_params(folder: Path, value: Any) -> Path:
    path = folder / "params.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_params_give_the_published_shape(name: str, tmp_path: Path) -> None:
    stated, hidden = PUBLISHED[name]
    params = read_params(write_params(tmp_path, stated))
    assert params.hidden == hidden
    assert params.n_kv_heads == stated.get("n_kv_heads", stated["n_heads"])
    assert params.vocab_size == (None if stated["vocab_size"] == -1 else 128256)
    assert params.norm_eps == 1e-5


def test_what_is_null_or_off_or_of_the_program_alone_changes_nothing(tmp_path: Path) -> None:
    plain = read_params(write_params(tmp_path, LLAMA_2_7B))
    more = {"n_kv_heads": None, "ffn_dim_multiplier": None, "use_scaled_rope": False, "moe_args": None}
    more |= {"vision_chunk_size": -1, "use_qk_norm": False, "max_seq_len": 2048, "max_batch_size": 32}
    assert read_params(write_params(tmp_path, LLAMA_2_7B | more)) == plain


SCALED = {"use_scaled_rope": True}
FAULTS: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "cannot be read"),
    "not UTF-8": ("\udcff", "cannot be read"),
    "a list": ([LLAMA_2_7B], "holds no JSON object"),
    "no width": ({"n_heads": 4, "n_layers": 2}, "does not say dim"),
    "no layers": (LLAMA_2_7B | {"n_layers": None}, "does not say n_layers"),
    "layers in words": (LLAMA_2_7B | {"n_layers": "many"}, "has n_layers 'many', which is not a count"),
    "half a layer": (LLAMA_2_7B | {"n_layers": 1.5}, "has n_layers 1.5"),
    "a negative width": (LLAMA_2_7B | {"dim": -4096}, "has dim -4096"),
    "true as a count": (LLAMA_2_7B | {"n_heads": True}, "has n_heads True"),
    "a huge count": (LLAMA_2_7B | {"multiple_of": 10**30}, "has multiple_of 1000000"),
    "no number": (LLAMA_2_7B | {"norm_eps": float("nan")}, "has norm_eps nan"),
    "an infinite width": (LLAMA_2_7B | {"ffn_dim_multiplier": float("inf")}, "has ffn_dim_multiplier inf"),
    "no vocabulary": (LLAMA_2_7B | {"vocab_size": 0}, "has vocab_size 0"),
    "heads that do not divide": (LLAMA_2_7B | {"n_heads": 24}, "do not divide one another"),
    "groups that do not divide": (LLAMA_2_7B | {"n_kv_heads": 5}, "do not divide one another"),
    "scaling in words": (LLAMA_2_7B | {"use_scaled_rope": "yes"}, "has use_scaled_rope 'yes'"),
    "scaling by less than one": (LLAMA_2_7B | SCALED | {"rope_scaling_factor": 0.5}, "has rope_scaling_factor 0.5"),
    "a band without width": (LLAMA_2_7B | SCALED | {"rope_high_freq_factor": 1}, "has rope_high_freq_factor 1"),
    "Llama 4": (
        LLAMA_2_7B | {"moe_args": {"num_experts": 16}, "use_qk_norm": True},
        "says moe_args, use_qk_norm: this",
    ),
    "images": (LLAMA_2_7B | {"vision_chunk_size": 448}, "says vision_chunk_size: this is not a dense Llama"),
    "quantised": (
        LLAMA_2_7B | {"quantization_args": {"group_size": 32}, "lora_args": {"rank": 16}},
        "lora_args, quant",
    ),
    "Mixtral": (LLAMA_2_7B | {"moe": {"num_experts": 8}, "head_dim": 128}, "says head_dim, moe: this"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_nonsense_and_other_architectures_are_refused(fault: str, tmp_path: Path) -> None:
    value, message = FAULTS[fault]
    path = tmp_path / "params.json"
    if fault == "not UTF-8":
        path.write_bytes(b"\xff")
    else:
        write_params(tmp_path, value)
    with pytest.raises(ModelError) as caught:
        read_params(path)
    assert message in caught.value.what
    assert caught.value.where == str(path)
    assert caught.value.hint
