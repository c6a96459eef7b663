"""Models with frozen weights in 4 or 8 bits, by bitsandbytes: how they are loaded, computed and turned back into floats.

- `nf4`: 4-bit NormalFloat in blocks of 64 with their scales quantised again (QLoRA: Dettmers et al. 2023, arXiv 2305.14314).
- `int8`: rows of 8 bits; inputs are rounded to 8 bits as well, except the columns with an outlier (LLM.int8: Dettmers et al.
  2022, arXiv 2208.07339).

On a GPU, bitsandbytes computes. On a CPU, this module does, from bitsandbytes' codes and with the same meaning:

- An NF4 weight is dequantised for each product, with an adapter merged into it (`lora_linear`), multiplied by oneDNN and
  dropped. bitsandbytes' own layer would, in evaluation mode, compute in bfloat16 where the processor has it: that is another
  model than the one that is trained.
- An int8 layer rounds its inputs in training, too. bitsandbytes' own layer does so in evaluation mode only.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from corral.errors import require
from corral.model.compute.cpu_matmul import times_transposed
from corral.model.compute.lora_linear import LoraLinear, accelerate, replace_forward
from corral.model.compute.quantised_weights import dequantise_rows, dequantise_weight, int8_codes, is_int8, is_nf4

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a model's linear layers are quantised. Embeddings, norms and the output layer keep their dtype.

    Args:
        kind: see above.
        threshold: with int8, inputs larger than this are multiplied unquantised; 0 quantises all.
    """

    kind: Literal["nf4", "int8"]
    threshold: float = 6.0


def import_bitsandbytes() -> Any:
    """The package, with its log messages silenced. Raises: MissingExtraError."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return require("bitsandbytes", "quant")


def transformers_config(quantization: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig:
    """The setting by which transformers quantises while it loads. Raises: MissingExtraError.

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


def accelerate_quantised(model: nn.Module) -> None:
    """Make quantised layers compute on a CPU as described above; on a GPU they stay bitsandbytes' own."""
    for module in model.modules():
        if is_nf4(module):
            replace_forward(module, _nf4_forward)
        elif is_int8(module):
            replace_forward(module, _int8_forward)


def dequantise_model(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace the quantised layers of a model by plain ones with the same weights, rounded to `dtype`."""
    any_model: Any = model
    for name, module in list(any_model.named_modules()):
        if not (is_nf4(module) or is_int8(module)):
            continue
        with torch.device("meta"):
            plain = nn.Linear(module.in_features, module.out_features, bias=False)
        plain.weight = nn.Parameter(dequantise_weight(module).to(dtype), requires_grad=False)
        plain.bias = module.bias
        plain.train(module.training)
        any_model.set_submodule(name, plain)
    any_model.hf_quantizer.remove_quantization_config(any_model)
    for attribute in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(any_model, attribute):
            delattr(any_model, attribute)
    accelerate(any_model)


class _Int8Linear(torch.autograd.Function):
    """LLM.int8. Inputs get the gradient of unrounded inputs, as in bitsandbytes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        from bitsandbytes.functional import int8_vectorwise_quant

        ctx.layer = layer
        codes, scales = int8_codes(layer)
        rows = x.reshape(-1, x.shape[-1])
        half = rows.to(torch.float16, copy=True)  # quantising overwrites outliers for a while
        row_codes, row_scales, outliers = int8_vectorwise_quant(half, threshold=layer.state.threshold)
        result = torch.ops.bitsandbytes.int8_scaled_mm.default(
            row_codes, codes, row_scales, scales, bias=None, dtype=x.dtype
        )
        if outliers is not None and outliers.numel():
            weight = dequantise_rows(codes[:, outliers], scales).to(x.dtype)
            result = result.add_(times_transposed(rows[:, outliers].contiguous(), weight))
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()
        return times_transposed(gradient, dequantise_weight(ctx.layer).to(gradient.dtype).T), None


def _nf4_forward(layer: Any, x: Tensor) -> Tensor:
    if x.device.type != "cpu" or not x.numel():
        return type(layer).forward(layer, x)
    linear = LoraLinear(layer)
    return _with_bias(linear.merged(x.to(linear.dtype)).to(x.dtype), layer)


def _int8_forward(layer: Any, x: Tensor) -> Tensor:
    if x.device.type != "cpu" or not x.numel():
        return type(layer).forward(layer, x)
    result: Any = _Int8Linear.apply(x, layer)
    return _with_bias(result, layer)


def _with_bias(result: Tensor, layer: Any) -> Tensor:
    return result if layer.bias is None else result + layer.bias.to(result.dtype)
