"""What a training stage needs of memory, computed from the model's `config.json` and the stage's settings; no torch is needed.

Each formula counts the tensors that corral's own forward and backward passes hold at once (`model/packed_forward.py` and the
modules that it calls). Tests compare them with runs on a CPU, and with traces of Llama-3.2-3B and Llama-3.1-8B on torch's
`meta` device along the way that a GPU takes. On a GPU, kernels and the allocator may differ: that was not measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from corral.errors import ModelError

if TYPE_CHECKING:
    from corral.model.loading import DType
    from corral.recipe import Train

DeviceKind = Literal["cuda", "cpu"]
GB = 10**9
BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
MOMENT_BYTES: Mapping[str, float] = {
    "adamw": 8.0,
    "adamw_8bit": 2.0 + 8 / 256,  # blocks of 256 with a float32 scale, two moments
    "paged_adamw_8bit": 2.0 + 8 / 256,
    "paged_adamw_32bit": 8.0,
}
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a code, the 8-bit scale of a block of 64, the float32 scale of 256 scales
_LOGITS: Mapping[str, int] = {"cuda": 2**26, "cpu": 2**21}  # that `token_logprobs` computes at once
# Python with its packages, or a GPU's context and the kernels that are loaded with it.
PROCESS: Mapping[str, int] = {"cuda": int(0.8 * GB), "cpu": int(0.36 * GB)}
# What the allocator does not give back, as a share of what comes and goes: of a GPU's an assumption, of the C library's
# measured, and worse where PEFT's own forward passes make many tensors of many sizes.
_GPU_WASTE = 0.05
_CPU_WASTE, _CPU_WASTE_FULL, _CPU_WASTE_PEFT, _CPU_WASTE_INT8 = 0.4, 0.75, 1.5, 2.4


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a Llama-family model."""

    layers: int
    hidden: int
    inner: int
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int
    tied: bool

    @classmethod
    def from_folder(cls, folder: Path) -> ModelShape:
        """Read from a model folder's config.json. Raises ModelError if the file or a size in it is missing."""
        path = folder / "config.json"
        try:
            config: dict[str, Any] = json.loads(path.read_text("utf-8"))
            hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
            return cls(
                layers=int(config["num_hidden_layers"]),
                hidden=hidden,
                inner=int(config["intermediate_size"]),
                heads=heads,
                key_heads=int(config.get("num_key_value_heads") or heads),
                head_size=int(config.get("head_dim") or hidden // heads),
                vocabulary=int(config["vocab_size"]),
                tied=bool(config.get("tie_word_embeddings", False)),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"the model's sizes cannot be read: {type(error).__name__}: {error}",
                where=str(path),
                hint="give a Llama-family model with a complete config.json",
            ) from None

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) features of each linear layer of a decoder layer."""
        queries, keys = self.heads * self.head_size, self.key_heads * self.head_size
        return {
            "q_proj": (queries, self.hidden),
            "k_proj": (keys, self.hidden),
            "v_proj": (keys, self.hidden),
            "o_proj": (self.hidden, queries),
            "gate_proj": (self.inner, self.hidden),
            "up_proj": (self.inner, self.hidden),
            "down_proj": (self.hidden, self.inner),
        }

    @property
    def layer_weights(self) -> int:
        """Number of weights in all decoder layers' linear layers."""
        return self.layers * sum(out * into for out, into in self.linears.values())

    @property
    def other_weights(self) -> int:
        """Number of weights in embeddings, output layer and norms."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + (2 * self.layers + 1) * self.hidden

    @property
    def weights(self) -> int:
        """Number of all weights."""
        return self.layer_weights + self.other_weights

    def trained_weights(self, train: Train) -> int:
        """Number of weights that a stage trains."""
        if train.method == "full":
            return self.weights
        rank, targets = train.lora.rank, self.adapter_targets(train)
        sizes = (self.linears[name] for name in targets)
        return self.layers * sum(rank * (out + into) + (out if train.lora.dora else 0) for out, into in sizes)

    def adapter_targets(self, train: Train) -> list[str]:
        """Names of a decoder layer's linear layers that get an adapter."""
        if train.method == "full":
            return []
        targets = train.lora.targets
        return [name for name in self.linears if targets == "all-linear" or name in targets]


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes at the peak of a step.

    Args:
        weights: of the model and its adapters.
        held: with the process, gradients and moments, which stay between steps.
        kept: tensors of the longest pass that the backward pass needs.
        peak: with all that the longest pass adds.
    """

    weights: int
    held: int
    kept: int
    peak: int


def memory(shape: ModelShape, train: Train, tokens: int, trained: int, device: DeviceKind, dtype: DType) -> Memory:
    """Memory at the peak of a step.

    Args:
        train: its `gradient_checkpointing` is taken for on only if it is True.
        tokens: of the longest pack.
        trained: tokens of it for which the output layer computes logits.
        dtype: of the model's weights. With `method = "full"`, weights are float32 and computation is in this type.
    """
    full = train.method == "full"
    stored = 4 if full else BYTES[dtype]
    computed = (2 if dtype == "bfloat16" else 4) if full else stored
    count = shape.trained_weights(train)
    per_weight = {"none": float(stored), "nf4": _NF4_BYTES, "int8": 1.0}[train.quantization]
    weights = shape.layer_weights * per_weight + shape.other_weights * stored + (0 if full else 4 * count)
    held = PROCESS[device] + weights + count * (4 + MOMENT_BYTES[train.optimizer.kind])
    if device == "cpu" and train.quantization != "none":  # what reading the full weights leaves in the allocator
        held += shape.layer_weights * stored / 2
    # The residual stream's dtype: float32 with full fine-tuning, whose norms are.
    state = 4 if full else computed
    layer = _kept_by_a_layer(shape, train, device, computed) * tokens
    kept = layer * shape.layers
    if train.gradient_checkpointing is True:
        kept = shape.layers * shape.hidden * state * tokens
    if full and computed == 2:  # weights are rounded for each product, and kept until its backward pass
        kept += shape.layer_weights * 2
    kept += 4 * shape.hidden * tokens  # the input of the last norm, in float32
    # Either the head works, or one layer's backward pass, which gradient checkpointing precedes with its forward pass.
    widest = max(out * into for out, into in shape.linears.values())  # a weight dequantised, or merged with its adapter
    working = computed * (_working_of_a_layer(shape, train, device) * tokens + widest)
    if train.gradient_checkpointing is True:
        working += layer
    logits = min(_LOGITS[device], trained * shape.vocabulary)
    head = logits * (8 if device == "cpu" else 12.5) + trained * shape.hidden * 8 * (device == "cpu")
    head += state * shape.hidden * (tokens + 2 * trained)  # the last hidden states, those that are picked, their slopes
    if full:
        head += shape.vocabulary * shape.hidden * 4
    peak = held + (kept + max(head, working)) * (1 + _waste(train, device))
    return Memory(int(weights), int(held), int(kept), int(peak))


def _waste(train: Train, device: DeviceKind) -> float:
    if device == "cuda":
        return _GPU_WASTE
    if train.quantization == "int8":
        return _CPU_WASTE_INT8
    return _CPU_WASTE_FULL if train.method == "full" else _CPU_WASTE if _is_plain(train) else _CPU_WASTE_PEFT


def _kept_by_a_layer(shape: ModelShape, train: Train, device: DeviceKind, size: int) -> int:
    """Bytes per token that a decoder layer keeps for its backward pass; `size` is that of a number in its products."""
    hidden, inner = shape.hidden, shape.inner
    queries, keys = shape.heads * shape.head_size, shape.key_heads * shape.head_size
    targets = set(shape.adapter_targets(train))
    plain = _is_plain(train)
    attention = queries + 2 * keys
    if plain and device == "cpu" and size == 4:  # `cpu_decoder_layer`
        return 4 * (2 * hidden + attention + (queries if "o_proj" in targets else 0) + 2 * inner + 2)
    # Inputs of the layers that have an adapter: they share them. The attention result is kept in any case.
    normed = hidden * bool(targets & {"q_proj", "k_proj", "v_proj"}) + hidden * bool(targets & {"gate_proj", "up_proj"})
    product = inner * ("down_proj" in targets)
    if plain and device == "cuda" and train.quantization == "none":  # `gpu_decoder_layer`, compiled
        return size * (2 * hidden + normed + attention + queries + 2 * inner + product)
    kept = 2 * (4 * hidden + 4) + size * (attention + queries + 2 * inner)  # norms keep their input in float32
    if device == "cpu" and size == 2:
        kept += size * queries  # keys and values are repeated for each query head; the result is not kept
    if train.method == "full":
        # Inputs of all layers, norms' results for their weights' gradients; in 16 bits SwiGLU is not fused.
        return kept + size * (4 * hidden + inner + (0 if size == 4 else inner))
    dropped = train.lora.dropout > 0
    if (plain and device == "cuda") or (size == 4 and not dropped and not train.lora.dora):
        return kept + size * (normed + product)
    # PEFT's own branches: each keeps an input of its own, in float32, and with dropout a mask.
    inputs = sum(shape.linears[name][1] for name in targets)
    kept += inputs * (4 + dropped) + 4 * train.lora.rank * len(targets)
    return kept + (sum(8 * shape.linears[name][0] for name in targets) if train.lora.dora else 0)


def _is_plain(train: Train) -> bool:
    """Whether adapters are computed by `lora_linear` and the decoder layers, not by PEFT."""
    return train.method == "lora" and train.lora.dropout == 0 and not train.lora.dora and train.quantization != "int8"


def _working_of_a_layer(shape: ModelShape, train: Train, device: DeviceKind) -> int:
    """Numbers per token that come and go in a layer's backward pass: gradients of SwiGLU's inputs, and of the layer's."""
    if device == "cuda" and _is_plain(train) and train.quantization == "none":
        return 3 * shape.inner + 4 * shape.hidden
    return 2 * shape.inner + shape.hidden
