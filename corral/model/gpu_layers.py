"""The training computation on a GPU: what transformers and PEFT compute, to rounding, in fewer and larger steps.

- Attention within each sequence of a pack is one call of torch's variable-length kernel, with grouped heads as they are;
  where there is none (float32, processors before Ampere), one call a sequence.
- A decoder layer is two functions of tensors, before attention and after it, that `torch.compile` makes into few kernels, once
  for all layers and for all lengths of packs. (`TORCH_COMPILE_DISABLE=1` is torch's own way to switch that off.)
- In bfloat16 and float16 an adapter stays a branch of its own: W + s·BA, rounded to W's dtype, would lose what is smaller
  than 1/256 of a weight.
- Nothing waits for the device: what a pack needs is sent from pinned memory.

Knows nothing about losses, recipes or training; nor about quantised layers and models that are not Llama's, which keep their
own forwards. The functions of tensors run on any device, which is how they are tested.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from corral.model import cpu_decoder_layer
from corral.model.cpu_gemm import is_plain_linear

Projection: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None, float]
"""W [out, in]; A [r, in] and B [out, r], or neither; s."""

_LOGITS = 2**27  # held at once: 256 MiB in bfloat16; fewer would make products too small to fill a GPU


def sent(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, without waiting for what the device has yet to do."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def ends_of(lengths: Sequence[int], device: torch.device) -> Tensor | None:
    """What `attend` takes as `ends`, made once a pack; None on a CPU, which does not need it."""
    if device.type != "cuda":
        return None
    return sent(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), device)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, lengths: Sequence[int], ends: Tensor) -> Tensor:
    """Causal attention within each of the sequences that lie end to end.

    Args:
        query: [tokens, heads, head size]; key and value with as many heads or a part of them.
        scale: of the scores.
        lengths: of the sequences.
        ends: [0, where each sequence ends], int32, on the same device.

    Returns: as `query`.
    """
    kernel = _kernel(query.device.index, query.dtype, query.shape[-1]) if query.is_cuda else None
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and kernel != "grouped":
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if kernel:
        return _variable_length(query, key, value, scale, max(lengths), ends)
    apart = zip(*(t.transpose(0, 1)[None].split(list(lengths), dim=2) for t in (query, key, value)), strict=True)
    parts = [F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale) for q, k, v in apart]
    return torch.cat(parts, dim=2)[0].transpose(0, 1)


def _variable_length(query: Tensor, key: Tensor, value: Tensor, scale: float, longest: int, ends: Tensor) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # Before torch 2.12 grouped heads need no mention.
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    settings: dict[str, Any] = {"scale": scale, "window_size": (-1, 0), **grouped}
    found: Any = varlen_attn(query, key, value, ends, ends, longest, longest, **settings)
    return found


@cache
def _kernel(device: int, dtype: torch.dtype, head_size: int) -> Literal["grouped", "repeated"] | None:
    """How the variable-length kernel can be used there, held to its meaning on two short sequences; None: it cannot."""
    if dtype not in (torch.bfloat16, torch.float16) or torch.cuda.get_device_capability(device) < (8, 0):
        return None
    ways: tuple[tuple[Literal["grouped", "repeated"], int], ...] = (("grouped", 1), ("repeated", 2))
    for way, key_heads in ways:
        try:
            if _is_right(torch.device("cuda", device), dtype, head_size, key_heads):
                return way
        except (RuntimeError, ValueError, TypeError, ImportError):
            continue
    return None


def _is_right(device: torch.device, dtype: torch.dtype, head_size: int, key_heads: int) -> bool:
    lengths, heads = (3, 130), 2
    wave = torch.arange(sum(lengths) * heads * head_size, device=device).mul_(0.37).sin_()
    query = wave.view(-1, heads, head_size).to(dtype)
    key, value = (query[:, :key_heads].roll(by, dims=0).contiguous() for by in (1, 2))
    ends = torch.tensor([0, 3, 133], device=device, dtype=torch.int32)
    found: list[list[Tensor]] = []
    with torch.enable_grad():
        for exact in (True, False):
            q, k, v = (t.detach().to(torch.float32 if exact else dtype).requires_grad_() for t in (query, key, value))
            scale = head_size**-0.5
            out = attend(q, k, v, scale, lengths, ends) if exact else _variable_length(q, k, v, scale, 130, ends)
            found.append([out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
    pairs = zip(*found, strict=True)
    return all(torch.allclose(a, b.float(), rtol=0.05, atol=0.05 * a.abs().max().item()) for a, b in pairs)


class _Lora(torch.autograd.Function):
    """x Wᵀ + s (x Aᵀ) Bᵀ in the dtype of W, keeping x and x Aᵀ; A and B, and their gradients, in their own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        inner = F.linear(x, a.to(x.dtype))
        result = F.linear(x, weight)
        result.flatten(0, -2).addmm_(inner.flatten(0, -2), b.to(x.dtype).T, alpha=scale)
        ctx.save_for_backward(x, inner, weight, a, b)
        ctx.scale = scale
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor, None]:
        x, inner, weight, a, b = ctx.saved_tensors
        gradient = gradients[0].flatten(0, -2)
        of_inner = gradient @ b.to(x.dtype)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (gradient @ weight).addmm_(of_inner, a.to(x.dtype), alpha=ctx.scale).view_as(x)
        of_a = (of_inner.T @ x.flatten(0, -2)).to(a.dtype).mul_(ctx.scale)
        of_b = (gradient.T @ inner.flatten(0, -2)).to(b.dtype).mul_(ctx.scale)
        return of_x, None, of_a, of_b, None


def lora(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """x Wᵀ + s (x Aᵀ) Bᵀ for a frozen W.

    Args:
        x: [..., in], in the dtype of W.
        weight: [out, in], in bfloat16 or float16.
        a, b: [r, in] and [out, r], in that dtype or float32, which their gradients then have as well. The products are
            rounded to W's dtype, as they are under mixed precision.

    Returns: [..., out].
    """
    result: Any = _Lora.apply(x, weight, a, b, scale)
    return result


def is_low_precision(layer: Any) -> bool:
    """Whether PEFT's layer is LoRA on a plain linear layer in bfloat16 or float16 on a GPU, and adds s·BA and nothing else."""
    base = layer.get_base_layer()
    return (
        is_plain_linear(base)
        and base.weight.is_cuda
        and base.weight.dtype in (torch.bfloat16, torch.float16)
        and cpu_decoder_layer.is_exact(layer)
    )


def lora_forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What PEFT's layer computes, for layers that `is_low_precision`."""
    weight = layer.get_base_layer().weight
    if layer.disable_adapters or layer.merged or args or kwargs or x.dtype != weight.dtype:
        return type(layer).forward(layer, x, *args, **kwargs)
    name = layer.active_adapters[0]
    return lora(x, weight, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])


def before_attention(
    x: Tensor, norm: Tensor, epsilon: float, cos: Tensor, sin: Tensor, q: Projection, k: Projection, v: Projection
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys (both turned by their positions' angles) and values of a decoder layer.

    Args:
        x: [tokens, hidden size].
        norm, epsilon: of the norm before attention.
        cos, sin: [tokens, head size], both halves alike.

    Returns: each [tokens, its heads, head size].
    """
    normed = _norm(x, norm, epsilon)
    size = cos.shape[-1]
    query, key, value = (_product(normed, p).unflatten(-1, (-1, size)) for p in (q, k, v))
    return _turned(query, cos, sin), _turned(key, cos, sin), value


def after_attention(
    x: Tensor,
    attended: Tensor,
    o: Projection,
    norm: Tensor,
    epsilon: float,
    gate: Projection,
    up: Projection,
    down: Projection,
) -> Tensor:
    """The result of a decoder layer, [tokens, hidden size], from its input and what attention gave, [tokens, heads · size]."""
    x = x + _product(attended, o)
    normed = _norm(x, norm, epsilon)
    return x + _product(F.silu(_product(normed, gate)) * _product(normed, up), down)


def _norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    wide = x.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()).to(x.dtype) * weight


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-right, left), dim=-1) * sin[:, None]


def _product(x: Tensor, projection: Projection) -> Tensor:
    weight, a, b, scale = projection
    result = F.linear(x, weight)
    if a is None or b is None:
        return result
    return result + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * scale


def layer_forward(
    layer: Any, x: Tensor, rotation: tuple[Tensor, Tensor], lengths: Sequence[int], ends: Tensor
) -> Tensor | None:
    """A Llama decoder layer over a pack.

    Args:
        x: [1, tokens, hidden size].
        rotation: cosines and sines as transformers gives them, [1, tokens, head size].
        lengths, ends: see `attend`.

    Returns: as `x`; None if anything in the layer is not known to be computed here, or nothing compiles on this machine.
    """
    parts = _parts(layer) if compiles(x.device.index) else None
    if parts is None:
        return None
    before, after, scale = parts

    def forward(x: Tensor) -> Tensor:
        rows, cos, sin = (_of_any_length(t[0]) for t in (x, *rotation))
        first, epsilon, *three = before
        q, k, v = _compiled(before_attention)(rows, first, epsilon, cos, sin, *three)
        attended = attend(q, k, v, scale, lengths, ends).flatten(1)
        return _compiled(after_attention)(rows, _of_any_length(attended), *after)[None]

    if layer.gradient_checkpointing and layer.training:
        return layer._gradient_checkpointing_func(forward, x)
    return forward(x)


def _parts(layer: Any) -> tuple[tuple[Any, ...], tuple[Any, ...], float] | None:
    """What both functions take besides tokens, and the scale of scores, as the layer is now: adapters may be switched off."""
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

    attention, mlp = layer.self_attn, layer.mlp
    first, second = layer.input_layernorm, layer.post_attention_layernorm
    if not isinstance(attention, LlamaAttention) or not isinstance(mlp, LlamaMLP):
        return None
    if not isinstance(first, LlamaRMSNorm) or not isinstance(second, LlamaRMSNorm):
        return None
    # Whoever hangs hooks on a part wants the part to be called.
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in layer.modules() if m is not layer)  # pyright: ignore[reportPrivateUsage]
    if hooked or not cpu_decoder_layer.is_silu(mlp.act_fn) or (attention.training and attention.attention_dropout):
        return None
    names = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj)
    found = [_projection(m) for m in (*names, mlp.down_proj)]
    dtypes = {p[0].dtype for p in found if p is not None} | {first.weight.dtype, second.weight.dtype}
    if None in found or len(dtypes) > 1:
        return None
    q, k, v, o, gate, up, down = found
    before = (first.weight, first.variance_epsilon, q, k, v)
    return before, (o, second.weight, second.variance_epsilon, gate, up, down), attention.scaling


def _projection(layer: Any) -> Projection | None:
    from peft.tuners.lora import LoraLayer

    if not isinstance(layer, LoraLayer):
        return (layer.weight, None, None, 0.0) if is_plain_linear(layer) else None
    adapted: Any = layer
    base = adapted.get_base_layer()
    if not is_plain_linear(base):
        return None
    if layer.disable_adapters or layer.merged:
        return base.weight, None, None, 0.0
    if not cpu_decoder_layer.is_exact(layer):
        return None
    (name,) = layer.active_adapters
    return base.weight, adapted.lora_A[name].weight, adapted.lora_B[name].weight, layer.scaling[name]


def _of_any_length(rows: Tensor) -> Tensor:
    """The same, marked as one of many lengths: one program serves them all."""
    torch._dynamo.maybe_mark_dynamic(rows, 0)  # pyright: ignore[reportPrivateUsage]
    return rows


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


@cache
def compiles(device: int | None) -> bool:
    """Whether `torch.compile` works for that GPU on this machine; says so, once, if it does not."""
    if device is None:
        return False

    def tried(x: Tensor) -> Tensor:
        return x * 2 + 1

    try:
        made: Any = torch.compile(tried)(torch.ones(64, device=torch.device("cuda", device)))
        return bool(made.sum().item() == 192)
    except Exception as error:  # of torch, triton, a C compiler that is not there
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(f"torch.compile does not work here, so layers run slower, uncompiled: {reason}", stacklevel=2)
        return False


def log_softmax_at(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(log softmax(logits)[target] in float32 [n], softmax in the dtype of the logits [n, vocabulary])."""
    wide = logits.float()
    above = wide - wide.amax(-1, keepdim=True)
    exponentials = above.exp()
    total = exponentials.sum(-1, keepdim=True)
    found = above.gather(1, targets[:, None]) - total.log()
    return found.squeeze(1), (exponentials / total).to(logits.dtype)


class _TokenLogProbs(torch.autograd.Function):
    """As `packed`'s function of that kind, in chunks of rows, each large enough to fill a GPU."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        rows = max(1, _LOGITS // len(weight))
        soften = _softener(hidden.device)
        logprobs = torch.empty(len(hidden), device=hidden.device)
        slopes = torch.empty_like(hidden) if want_hidden else None
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logprobs[part], probabilities = soften(F.linear(hidden[part], weight), targets[part])
            if slopes is not None:
                torch.sub(weight[targets[part]], probabilities @ weight, out=slopes[part])
        ctx.save_for_backward(slopes, *((hidden, weight, targets) if want_weight else ()))
        return logprobs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        slopes, *rest = ctx.saved_tensors
        of_hidden = None if slopes is None else slopes * gradient[:, None].to(slopes.dtype)
        of_weight = None
        if rest:
            hidden, weight, targets = rest
            rows = max(1, _LOGITS // len(weight))
            soften = _softener(hidden.device)
            of_weight = torch.zeros_like(weight)
            for start in range(0, len(hidden), rows):
                part = slice(start, start + rows)
                _, probabilities = soften(F.linear(hidden[part], weight), targets[part])
                scaled = hidden[part] * gradient[part, None].to(hidden.dtype)
                of_weight.addmm_(probabilities.T, scaled, alpha=-1)
                of_weight.index_add_(0, targets[part], scaled)
        return of_hidden, of_weight, None


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As `packed.token_logprobs`."""
    result: Any = _TokenLogProbs.apply(hidden, weight, targets)
    return result


def _softener(device: torch.device) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    if device.type != "cuda" or not compiles(device.index):
        return log_softmax_at
    made = _compiled(log_softmax_at)
    return lambda logits, targets: made(_of_any_length(logits), _of_any_length(targets))
