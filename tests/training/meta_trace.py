"""Traces a training pass of a model of full size on torch's `meta` device, along the way of a GPU: bytes, no values."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from corral.model import adapters, packed_forward
from corral.model.compute import gpu_attention, gpu_compile
from corral.recipe import Train
from corral.training.memory_estimate import ModelShape


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages on `meta` that are alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # or nothing would be compiled

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.device.type == "meta" and storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_iter(result):
            if isinstance(each, Tensor):
                self.count(each)
        return result


def take_the_gpus_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let packs on `meta` go through the variable-length kernel and compiled layers, cut as torch's compiler cuts them."""
    functions: dict[Any, Any] = {}

    def compiled(function: Callable[..., Any]) -> Any:
        return functions.setdefault(
            function, torch.compile(function, backend="aot_eager_decomp_partition", fullgraph=True)
        )

    def ends(lengths: Sequence[int], device: torch.device) -> Tensor:
        return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)

    torch.compiler.reset()
    monkeypatch.setattr(gpu_attention, "sequence_ends", ends)
    monkeypatch.setattr(gpu_attention, "choose_kernel", lambda *_: ("grouped", None))  # pyright: ignore[reportUnknownLambdaType]
    monkeypatch.setattr(gpu_compile, "can_compile", lambda _: True)  # pyright: ignore[reportUnknownLambdaType]
    monkeypatch.setattr(gpu_compile, "compiled", compiled)


def meta_model(shape: ModelShape, train: Train) -> Any:
    """The model of that size in bfloat16, perhaps with NF4 weights as bitsandbytes lays them out, and its adapter."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        head_dim=shape.head_size,
        tie_word_embeddings=shape.tied,
    )
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    if train.quantization == "nf4":
        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                model.set_submodule(name, _nf4_layer(module.out_features, module.in_features))
    model = adapters.attach(model.eval(), train.lora, seed=0)
    if train.gradient_checkpointing is True:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def _nf4_layer(out: int, into: int) -> Any:
    import bitsandbytes
    from bitsandbytes.functional import QuantState

    def empty(count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=dtype, device="meta")

    blocks = out * into // 64
    scales = QuantState(
        absmax=empty(blocks // 256, torch.float32), blocksize=256, code=empty(256, torch.float32), dtype=torch.float32
    )
    state = QuantState(
        absmax=empty(blocks, torch.uint8),
        shape=torch.Size([out, into]),
        dtype=torch.bfloat16,
        blocksize=64,
        code=empty(16, torch.float32),
        quant_type="nf4",
        offset=torch.empty((), device="meta"),
        state2=scales,
    )
    layer = bitsandbytes.nn.Linear4bit(
        into, out, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
    )
    codes = torch.empty(out * into // 2, 1, dtype=torch.uint8, device="meta")
    layer.weight = bitsandbytes.nn.Params4bit(
        codes, requires_grad=False, quant_state=state, bnb_quantized=True, quant_type="nf4"
    )
    layer.weight.quant_state = layer.quant_state = state
    return layer


def pass_peak(model: Any, lengths: Sequence[int], trained: int) -> int:
    """Bytes that a pass forward and back adds to the weights, at most; `trained` tokens of each sequence are."""
    live = LiveBytes()
    for parameter in model.parameters():
        live.count(parameter.detach())
    before = live.now
    with live:
        positions = [range(n - trained, n) for n in lengths]
        logprobs = packed_forward.target_logprobs(model, [[5] * n for n in lengths], positions)
        (-torch.cat(logprobs).sum()).backward()
    return live.peak - before
