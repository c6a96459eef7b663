"""Frozen weights in 4 or 8 bits, by bitsandbytes: how they are loaded, multiplied with, and turned back into numbers.

- `nf4`: 4-bit NormalFloat in blocks of 64 with their scales quantised again (QLoRA: Dettmers et al. 2023, arXiv 2305.14314).
- `int8`: rows of 8 bits; inputs are rounded to 8 bits as well, except the columns with an outlier (LLM.int8: Dettmers et al.
  2022, arXiv 2208.07339).

On a GPU bitsandbytes computes. On a CPU this module does, from bitsandbytes' own codes and with the same meaning:

- An NF4 weight is restored for each product, multiplied by oneDNN and dropped; backward restores it again. With an adapter
  s·BA is added to it first, so that there is one product (as in `fused`). bitsandbytes' layer would compute in bfloat16 while
  evaluating where the processor has it, in another layout of the same tensor: another model than the one that is trained.
- An int8 layer rounds its inputs while training too. bitsandbytes' layer only does so while evaluating.

Knows nothing about adapters' files, training or where models come from.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from corral.extras import require
from corral.model.cpu_gemm import accelerate, lora_gradients, replace_forward, times_transposed

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel


@dataclass(frozen=True, slots=True)
class Quantization:
    """In what a model's linear layers are held. Embeddings, norms and the output layer keep their dtype.

    Args:
        kind: see above.
        threshold: with int8, inputs larger than this are multiplied unquantised; 0 quantises all.
    """

    kind: Literal["nf4", "int8"]
    threshold: float = 6.0


def import_bitsandbytes() -> Any:
    """The package, without its advice to install others and its notes on each product. Raises: MissingExtraError."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return require("bitsandbytes", "quant")


def transformers_config(quantization: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What makes transformers quantise while it loads. Raises: MissingExtraError.

    Args:
        dtype: what layers compute in.
    """
    import_bitsandbytes()
    from transformers import BitsAndBytesConfig

    if quantization.kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=quantization.threshold)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def is_nf4(layer: Any) -> bool:
    """Whether a layer's weight is in NF4."""
    weight = getattr(layer, "weight", None)
    return type(weight).__name__ == "Params4bit" and isinstance(layer, nn.Linear)


def is_int8(layer: Any) -> bool:
    """Whether a layer's weight is in int8."""
    weight = getattr(layer, "weight", None)
    return type(weight).__name__ == "Int8Params" and isinstance(layer, nn.Linear)


def dequantise_weight(layer: Any) -> Tensor:
    """The weight of a quantised layer as numbers, bit for bit as bitsandbytes restores it.

    Returns: [out, in]; NF4 in the dtype it was quantised from, int8 in float32. The caller may write into it.
    """
    if is_nf4(layer):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    codes, scales = _codes(layer)
    return codes.float().mul_(scales.unsqueeze(1).mul(1.0 / 127.0))


def _codes(layer: Any) -> tuple[Tensor, Tensor]:
    """(codes [out, in], the largest magnitude of each row [out]) of an int8 layer."""
    scales = layer.weight.SCB
    return layer.weight.data, layer.state.SCB if scales is None else scales


def speed_up(model: nn.Module) -> None:
    """Make quantised layers compute on a CPU as this module says; on a GPU they stay bitsandbytes' own."""
    for module in model.modules():
        if is_nf4(module):
            replace_forward(module, _nf4_forward)
        elif is_int8(module):
            replace_forward(module, _int8_forward)


def dequantise_model(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace the quantised layers of a model by plain ones that hold the same weights, rounded to `dtype`."""
    inside: Any = model
    for name, module in list(inside.named_modules()):
        if not (is_nf4(module) or is_int8(module)):
            continue
        with torch.device("meta"):
            plain = nn.Linear(module.in_features, module.out_features, bias=False)
        plain.weight = nn.Parameter(dequantise_weight(module).to(dtype), requires_grad=False)
        plain.bias = module.bias
        plain.train(module.training)
        inside.set_submodule(name, plain)
    inside.hf_quantizer.remove_quantization_config(inside)
    for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(inside, mark):
            delattr(inside, mark)
    accelerate(inside)


class _Nf4Linear(torch.autograd.Function):
    """x Wᵀ for a W in NF4, of which nothing restored is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        return times_transposed(x, dequantise_weight(layer))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return times_transposed(gradients[0].contiguous(), dequantise_weight(ctx.layer).T), None


class _Nf4LoraLinear(torch.autograd.Function):
    """x (W + s·BA)ᵀ for a W in NF4."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, layer: Any, scale: float) -> Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.layer, ctx.scale = layer, scale
        return times_transposed(x, dequantise_weight(layer).addmm_(b, a, alpha=scale))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        x, a, b = ctx.saved_tensors
        weights = (
            (lambda: dequantise_weight(ctx.layer).addmm_(b, a, alpha=ctx.scale)) if ctx.needs_input_grad[0] else None
        )
        of_x, of_a, of_b = lora_gradients(gradients[0], x, a, b, ctx.scale, weights)
        return of_x, of_a, of_b, None, None


class _Int8Linear(torch.autograd.Function):
    """LLM.int8; the gradient goes to the inputs as if they had not been rounded, as in bitsandbytes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        from bitsandbytes.functional import int8_vectorwise_quant

        ctx.layer = layer
        codes, scales = _codes(layer)
        rows = x.reshape(-1, x.shape[-1])
        half = rows.to(torch.float16, copy=True)  # outliers are cut out of it for a while
        of_rows, row_scales, outliers = int8_vectorwise_quant(half, threshold=layer.state.threshold)
        result = torch.ops.bitsandbytes.int8_scaled_mm.default(
            of_rows, codes, row_scales, scales, bias=None, dtype=x.dtype
        )
        if outliers is not None and outliers.numel():
            weight = codes[:, outliers].float().mul_(scales.unsqueeze(1).mul(1.0 / 127.0)).to(x.dtype)
            result = result.add_(times_transposed(rows[:, outliers].contiguous(), weight))
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()
        return times_transposed(gradient, dequantise_weight(ctx.layer).to(gradient.dtype).T), None


def _nf4_forward(layer: Any, x: Tensor) -> Tensor:
    if x.device.type != "cpu" or not x.numel():
        return type(layer).forward(layer, x)
    result: Any = _Nf4Linear.apply(x.to(layer.weight.quant_state.dtype), layer)
    return _with_bias(result.to(x.dtype), layer)


def _int8_forward(layer: Any, x: Tensor) -> Tensor:
    if x.device.type != "cpu" or not x.numel():
        return type(layer).forward(layer, x)
    result: Any = _Int8Linear.apply(x, layer)
    return _with_bias(result, layer)


def _with_bias(result: Tensor, layer: Any) -> Tensor:
    return result if layer.bias is None else result + layer.bias.to(result.dtype)


def fuse_adapter(layer: Any) -> None:
    """One product instead of three for a LoRA layer on NF4, where that is exact: without dropout, bias and DoRA, and with the
    adapter in the dtype of the restored weight. Another layer is left as it is."""
    base = layer.get_base_layer()
    if len(layer.active_adapters) != 1 or not is_nf4(base) or base.bias is not None:
        return
    name = layer.active_adapters[0]
    if (
        isinstance(layer.lora_dropout[name], nn.Identity)
        and not layer.use_dora[name]
        and layer.lora_A[name].weight.dtype == base.weight.quant_state.dtype
    ):
        replace_forward(layer, _nf4_lora_forward)


def _nf4_lora_forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    base = layer.get_base_layer()
    wanted = x.device.type == "cpu" and x.numel() and x.dtype == base.weight.quant_state.dtype
    # Whether the adapter is on may change between two passes (a reference policy is "adapter off"): PEFT decides then.
    if not wanted or layer.disable_adapters or layer.merged or args or kwargs:
        return type(layer).forward(layer, x, *args, **kwargs)
    name = layer.active_adapters[0]
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    result: Any = _Nf4LoraLinear.apply(x, a, b, base, layer.scaling[name])
    return result
