"""Tiny checkpoints in Meta's layout, and Meta's model computed from the papers' formulas in plain torch."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Params = dict[str, Any]
Weights = dict[str, Tensor]

SHAPE: Params = {"dim": 32, "n_layers": 2, "n_heads": 4, "multiple_of": 16, "norm_eps": 1e-5}
LLAMA_2: Params = SHAPE | {"vocab_size": -1}
LLAMA_3: Params = SHAPE | {"n_kv_heads": 2, "ffn_dim_multiplier": 1.3, "rope_theta": 500000.0, "vocab_size": 530}
LLAMA_3_1: Params = LLAMA_3 | {"use_scaled_rope": True}
WORDS = ["▁t", "he", "▁the", "in", "▁a", "er", "▁w", "or", "ld", *"▁adehilnortw"]
JOINED = ["th", "the", " the", "in", " a", "er", " w", "or", "ld", "12", "is", " is", "it", "wor", "world", " q", "ue"]
TOKENS = [text.encode() for text in [*JOINED, "\n\n"]]


def sentencepiece(pieces: list[tuple[str, float, int]], **rules: Any) -> bytes:
    """A SentencePiece model of (text, score, kind), written by Google's own message classes."""
    from transformers.utils import sentencepiece_model_pb2_new as proto

    messages: Any = proto
    model = messages.ModelProto()
    for text, score, kind in pieces:
        model.pieces.add(piece=text, score=score, type=kind)
    stated = {
        "model_type": 2,
        "byte_fallback": True,
        "add_dummy_prefix": True,
        "remove_extra_whitespaces": False,
    } | rules
    for name, value in stated.items():
        spec = model.trainer_spec if name in model.trainer_spec.DESCRIPTOR.fields_by_name else model.normalizer_spec
        setattr(spec, name, value)
    model.normalizer_spec.name = "identity"
    return model.SerializeToString()


def llama_2_pieces(words: list[str]) -> list[tuple[str, float, int]]:
    """Special tokens, bytes, then words by falling score, runs of spaces last: as Llama 2's model has them."""
    first = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    first += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    return first + [(word, -1e9 if set(word) == {"▁"} else -float(i), 1) for i, word in enumerate(words)]


def tiktoken_lines(tokens: list[bytes]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def tiny_tokenizer(params: Params) -> bytes:
    if params["vocab_size"] == -1:
        return sentencepiece(llama_2_pieces(WORDS))
    return tiktoken_lines([bytes([i]) for i in range(256)] + TOKENS)


def random_weights(params: Params, rows: int, *, tied: bool = False) -> Weights:
    torch.manual_seed(0)
    dim, heads = params["dim"], params["n_heads"]
    kv = dim // heads * params.get("n_kv_heads", heads)
    hidden = int(params.get("ffn_dim_multiplier", 1) * int(2 * 4 * dim / 3))
    hidden = params["multiple_of"] * -(-hidden // params["multiple_of"])
    weights: Weights = {"tok_embeddings.weight": torch.randn(rows, dim), "norm.weight": 1 + 0.1 * torch.randn(dim)}
    for i in range(params["n_layers"]):
        shapes = {"attention.wq": (dim, dim), "attention.wk": (kv, dim), "attention.wv": (kv, dim)}
        shapes |= {"attention.wo": (dim, dim), "feed_forward.w1": (hidden, dim), "feed_forward.w2": (dim, hidden)}
        shapes |= {"feed_forward.w3": (hidden, dim)}
        weights |= {f"layers.{i}.{name}.weight": 0.3 * torch.randn(shape) for name, shape in shapes.items()}
        weights |= {f"layers.{i}.{name}_norm.weight": 1 + 0.1 * torch.randn(dim) for name in ("attention", "ffn")}
    return weights if tied else weights | {"output.weight": torch.randn(rows, dim)}


def write(
    folder: Path,
    params: Params,
    weights: Weights,
    *,
    parts: int = 1,
    tokenizer: bytes | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """The folder as Meta publishes it; a part is views of one storage, as Llama 2's are."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    (folder / "tokenizer.model").write_bytes(tokenizer or tiny_tokenizer(params))
    for part in range(parts):
        shares = {name: share(name, tensor, part, parts, params).to(dtype) for name, tensor in weights.items()}
        storage = torch.cat([tensor.flatten() for tensor in shares.values()])
        views = storage.split([tensor.numel() for tensor in shares.values()])
        table: dict[str, Any] = {name: view.view(shares[name].shape) for name, view in zip(shares, views, strict=True)}
        table["rope.freqs"] = torch.ones(4)
        torch.save(table, folder / f"consolidated.{part:02d}.pth")
    return folder


def share(name: str, tensor: Tensor, part: int, parts: int, params: Params) -> Tensor:
    """What one process of Meta's model-parallel program holds of a tensor."""
    if "norm" in name:
        return tensor
    by_columns = name.endswith(("wo.weight", "w2.weight"))
    by_columns |= name == "tok_embeddings.weight" and params["vocab_size"] == -1
    return tensor.chunk(parts, dim=int(by_columns))[part]


def logits(
    params: Params, weights: Weights, ids: Tensor, positions: Tensor, *, scaled_by: float | None = None
) -> Tensor:
    """[length, vocabulary] for `ids` [length]: pre-norm blocks, neighbours turned as complex numbers, SwiGLU.

    Touvron et al. 2023 (arXiv 2302.13971), Su et al. 2021 (arXiv 2104.09864), Shazeer 2020 (arXiv 2002.05202).
    """
    heads, kv_heads = params["n_heads"], params.get("n_kv_heads", params["n_heads"])
    size = params["dim"] // heads
    turns = torch.polar(torch.ones(()), torch.outer(positions.float(), _frequencies(params, size, scaled_by)))

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + params["norm_eps"]).sqrt() * weights[f"{name}.weight"]

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.complex(x[..., 0::2], x[..., 1::2]) * turns[:, None]
        return torch.stack((pairs.real, pairs.imag), -1).flatten(-2)

    x = weights["tok_embeddings.weight"][ids]
    future = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
    for i in range(params["n_layers"]):

        def linear(x: Tensor, name: str, layer: int = i) -> Tensor:
            return x @ weights[f"layers.{layer}.{name}.weight"].T

        y = norm(x, f"layers.{i}.attention_norm")
        q, k, v = (linear(y, f"attention.w{n}").unflatten(-1, (-1, size)) for n in "qkv")
        q, k = rotate(q), rotate(k)
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(size)
        attended = scores.masked_fill(future, -math.inf).softmax(-1)
        x = x + linear(torch.einsum("hqk,khd->qhd", attended, v).flatten(1), "attention.wo")
        y = norm(x, f"layers.{i}.ffn_norm")
        gate = linear(y, "feed_forward.w1")
        x = x + linear(gate * gate.sigmoid() * linear(y, "feed_forward.w3"), "feed_forward.w2")
    return norm(x, "norm") @ weights.get("output.weight", weights["tok_embeddings.weight"]).T


def _frequencies(params: Params, size: int, scaled_by: float | None) -> Tensor:
    """[size / 2]; with Llama 3.1's scaling: slow ones divided, fast ones kept, a blend between."""
    plain = [params.get("rope_theta", 10000.0) ** (-2 * i / size) for i in range(size // 2)]
    if scaled_by is None:
        return torch.tensor(plain)
    kept = [min(1.0, max(0.0, (8192 * f / (2 * math.pi) - 1) / (4 - 1))) for f in plain]
    return torch.tensor([f * (share + (1 - share) / scaled_by) for f, share in zip(plain, kept, strict=True)])
