"""Estimates what a training stage needs on a machine: memory by part, and tokens per second.

The estimate uses only the model's `config.json`, the stage's settings and the longest pack; it needs no torch. Each formula
counts what corral's own forward passes keep (`model/packed_forward.py` and the modules that it calls). Tests compare them
with measurements, and a plan says how far they are off on this machine.

Figures of devices are from their makers' data sheets: dense tensor-core rates, never the doubled ones for sparse weights.
The share of that rate that training reaches (MFU, at 4 FLOP per weight and token for an adapter, 6 for all weights) is taken
from published runs: Llama-3.1-8B LoRA on H100 at 40.6 % (NeMo AutoModel), Llama-3.2-3B LoRA on A100 at 34 % and in 4 bits at
33 % (torchtune).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from corral.errors import ModelError, RecipeError

if TYPE_CHECKING:
    from corral.model.loading import DType
    from corral.recipe import Train

GB = 10**9
_GIB = 2**30
_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
_LOGITS = 2**21  # logits that `model/packed_forward.py` computes at once
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a code, the 8-bit scale of a block of 64, the float32 scale of 256 scales
_LAUNCH_SECONDS = 1e-3  # of a layer's kernels, forward and backward: small models on a GPU wait for it
MOMENT_BYTES: Mapping[str, float] = {
    "adamw": 8.0,
    "adamw_8bit": 2.0 + 8 / 256,  # blocks of 256 with a float32 scale, two moments
    "paged_adamw_8bit": 2.0 + 8 / 256,
    "paged_adamw_32bit": 8.0,
}


@dataclass(frozen=True, slots=True)
class Device:
    """A device to train on.

    Args:
        memory: bytes that training can use.
        flops: FLOP/s of matrix products in 16 bits, from the data sheet or measured.
        flops32: the same in float32.
        bandwidth: bytes/s of its memory.
        mfu: the share of `flops` that training is assumed to reach.
        process: bytes in use before a model is loaded: a CUDA context, or Python with its packages.
        overhead: bytes that the first steps add: kernels and their buffers, threads, the tokenizer.
        allocator_waste: what the allocator wastes, as a share of temporary memory.
        half_dtype: the 16-bit type it computes in.
        source: where the figures come from.
    """

    name: str
    kind: Literal["cuda", "cpu"]
    memory: int
    flops: float
    flops32: float
    bandwidth: float
    mfu: float
    process: int
    overhead: int
    allocator_waste: float
    half_dtype: DType
    source: str

    def dtype(self, setting: str) -> DType:
        """The type that a recipe's `model.dtype` selects. Raises RecipeError if the device does not compute in it."""
        if setting == "auto":
            return "float32" if self.kind == "cpu" else self.half_dtype
        if setting == "bfloat16" and self.half_dtype == "float16":
            raise RecipeError(
                f"a {self.name} does not compute in bfloat16", where="model.dtype", hint='use "auto" or "float16"'
            )
        return cast("DType", setting)


def _gpu(
    name: str,
    gib: float,
    tera: float,
    tera32: float,
    bandwidth: float,
    mfu: float,
    source: str,
    half: DType = "bfloat16",
) -> Device:
    rates = tera * 1e12, tera32 * 1e12, bandwidth * 1e9
    return Device(name, "cuda", int(gib * _GIB), *rates, mfu, int(0.6 * GB), int(0.2 * GB), 0.08, half, source)


# Memory is what a current driver leaves of the nominal size, as torch reports it.
DEVICES: Mapping[str, Device] = {
    "t4": _gpu("T4", 14.6, 65, 8.1, 320, 0.25, "NVIDIA T4 data sheet; MFU assumed, no published run", "float16"),
    "24g": _gpu("24 GB card", 23.5, 71, 35.6, 936, 0.35, "GeForce RTX 3090 (GA102 whitepaper); newer ones are faster"),
    "a100-80g": _gpu("A100 80 GB", 79.1, 312, 19.5, 2039, 0.34, "NVIDIA A100 SXM data sheet; MFU of torchtune's runs"),
    "h100": _gpu("H100", 79.1, 989, 67, 3350, 0.38, "NVIDIA H100 SXM data sheet; MFU below NeMo's 40.6 %"),
    "h200": _gpu("H200", 139.8, 989, 67, 4800, 0.38, "NVIDIA H200 SXM data sheet; MFU below NeMo's 40.6 % on H100"),
}


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
class PackShape:
    """The size of one forward pass.

    Args:
        tokens: all of its tokens.
        trained: tokens for which the output layer computes logits.
        context: how many tokens a token attends to on average.
    """

    tokens: int
    trained: int
    context: float


@dataclass(frozen=True, slots=True)
class MemoryParts:
    """Bytes at the peak of a step, by what they are for."""

    process: int
    """In use before a model is loaded."""
    weights: int
    """The model and its adapters."""
    optimizer: int
    """Gradients and the optimizer's moments."""
    activations: int
    """Kept by the layers for the backward pass."""
    head: int
    """Logits of a chunk, and what the output layer keeps."""
    rest: int
    """Temporary memory of layers, and what the allocator does not give back."""

    @property
    def held(self) -> int:
        """Bytes that stay in use between steps."""
        return self.process + self.weights + self.optimizer

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(getattr(self, each.name) for each in fields(self))


def memory(shape: ModelShape, train: Train, pack: PackShape, device: Device, dtype: DType) -> MemoryParts:
    """Memory at the peak of a step.

    Args:
        pack: the longest one.
        dtype: of the model's weights. With `method = "full"`, weights are float32 and computation is in this type.
    """
    full = train.method == "full"
    trained = shape.trained_weights(train)
    stored, computed = (4, _compute_bytes(train, dtype)) if full else (_BYTES[dtype], _BYTES[dtype])
    adapters = 0 if full else trained * 4
    weights = int(shape.layer_weights * _bytes_per_weight(train, stored) + shape.other_weights * stored) + adapters
    saved = _saved_per_layer(shape, train, device, computed) * pack.tokens
    activations = saved * shape.layers
    working = (
        _working_per_layer(shape, computed) * pack.tokens + 2 * max(o * i for o, i in shape.linears.values()) * computed
    )
    if train.gradient_checkpointing:
        activations = shape.layers * shape.hidden * (4 if full else computed) * pack.tokens
        working += saved
    activations += (8 if full else 4) * shape.hidden * pack.tokens  # the last norm's input
    if full and computed == 2:  # weights are rounded for each product, and kept until its backward pass
        activations += shape.layer_weights * 2
    optimizer = int(trained * (4 + MOMENT_BYTES[train.optimizer.kind]))
    # Two chunks of logits, in float32 and rounded; hidden states, their sums and their gradients.
    state_bytes = 4 if full else computed
    logits = min(_LOGITS, pack.trained * shape.vocabulary)
    head = logits * (8 if state_bytes == 4 else 10) + pack.trained * shape.hidden * (8 + 2 * state_bytes)
    if full:
        head += shape.vocabulary * shape.hidden * 4
    rest = device.overhead + working + int(device.allocator_waste * (activations + head + working))
    if device.kind == "cpu" and train.quantization != "none":  # reading the full weights leaves this in the allocator
        rest += shape.layer_weights * stored // 2
    return MemoryParts(device.process, weights, optimizer, int(activations), head, rest)


def _compute_bytes(train: Train, dtype: DType) -> int:
    return 2 if dtype == "bfloat16" else 4


def _bytes_per_weight(train: Train, unquantised: int) -> float:
    """Bytes of a weight in a linear layer."""
    return {"none": float(unquantised), "nf4": _NF4_BYTES, "int8": 1.0}[train.quantization]


def _saved_per_layer(shape: ModelShape, train: Train, device: Device, size: int) -> int:
    """Bytes per token that a layer keeps for the backward pass."""
    hidden, inner = shape.hidden, shape.inner
    queries, keys = shape.heads * shape.head_size, shape.key_heads * shape.head_size
    targets = shape.adapter_targets(train)
    if _uses_cpu_decoder(train, device, size):
        # Input, queries, keys, values and attention's result; input and the two inputs of SwiGLU; two norms' factors.
        attended = queries if "o_proj" in targets else 0
        return 4 * (2 * hidden + queries + 2 * keys + attended + 2 * inner + 2)
    kept = 2 * (4 * hidden + 4)  # norms keep their input in float32
    if device.kind == "cuda":
        kept += 4 * queries * size  # keys and values repeated for each query head, and the result
    else:
        kept += (queries + 2 * keys) * size + (0 if size == 4 else 2 * queries * size)
    kept += 2 * inner * size
    if train.method == "full":
        kept += (2 * hidden + queries + inner) * size  # inputs of the linear layers
        # Norms keep their result for their weight's gradient; in 16 bits SwiGLU is not fused.
        return kept + 2 * hidden * size + (0 if size == 4 else inner * size)
    return kept + _saved_by_adapters(shape, train, device, size)


def _saved_by_adapters(shape: ModelShape, train: Train, device: Device, size: int) -> int:
    targets, rank = shape.adapter_targets(train), train.lora.rank
    inputs = {name: shape.linears[name][1] for name in targets}
    if train.lora.dropout == 0 and not train.lora.dora and size == 4:
        shared = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
        return 4 * sum({shared.get(name, name): count for name, count in inputs.items()}.values())
    # PEFT's own branches: each converts its input to float32 for itself, and with dropout keeps a mask too.
    copies = sum(inputs.values()) * (4 + (3 if train.lora.dropout else 0)) + 4 * rank * len(targets)
    if train.lora.dora:
        copies += sum(8 * shape.linears[name][0] for name in targets)
    return copies


def _uses_cpu_decoder(train: Train, device: Device, size: int) -> bool:
    """Whether `model/compute/cpu_decoder_layer.py` computes the layers."""
    plain = train.lora.dropout == 0 and not train.lora.dora
    return device.kind == "cpu" and size == 4 and train.method == "lora" and train.quantization != "int8" and plain


def _working_per_layer(shape: ModelShape, size: int) -> int:
    """Bytes per token that a layer's backward pass uses: four rows as wide as the MLP, four as wide as the model."""
    return 4 * (shape.inner + shape.hidden) * size


def tokens_per_second(shape: ModelShape, train: Train, pack: PackShape, device: Device, dtype: DType) -> float:
    """Training speed in tokens per second, without the optimizer's time.

    Args:
        pack: a typical one.
    """
    full = train.method == "full"
    # Forward pass, gradient of the input, gradient of the weight; the forward pass twice with gradient checkpointing.
    passes = 2 + (1 if full else 0) + (1 if train.gradient_checkpointing else 0)
    products = 2 * passes * shape.layer_weights
    if not full:
        products += 6 * shape.trained_weights(train)
    attention = (
        2 * 2 * shape.layers * shape.heads * shape.head_size * pack.context * (3.5 + train.gradient_checkpointing)
    )
    head = 2 * shape.vocabulary * shape.hidden * (3 if full else 2) * pack.trained / pack.tokens
    low = _compute_bytes(train, dtype) == 2 if full else _BYTES[dtype] == 2
    seconds = (products + attention + head) / ((device.flops if low else device.flops32) * device.mfu)
    if train.quantization != "none":  # weights are dequantised for each product: read, and written in full
        moved = shape.layer_weights * (_bytes_per_weight(train, 4) + 2 * _BYTES[dtype])
        seconds += passes * moved / device.bandwidth / pack.tokens
    launching = shape.layers * _LAUNCH_SECONDS / pack.tokens if device.kind == "cuda" else 0.0
    return 1 / (seconds + launching)


def optimizer_seconds(shape: ModelShape, train: Train, device: Device) -> float:
    """Seconds of the optimizer in one step: gradients, moments and weights are each read and written once."""
    return shape.trained_weights(train) * (12 + 2 * MOMENT_BYTES[train.optimizer.kind]) / device.bandwidth
