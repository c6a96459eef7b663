"""Several sequences in one forward pass, isolated from each other, with the head only where it is asked for.

A pack is sequences laid end to end in one row. Attention runs within each sequence alone and positions start anew, so
the result for a sequence is what it would be by itself (to rounding); no padding is computed, and no square over the
whole pack. The head runs in chunks over the vocabulary, for the wanted positions: no [tokens, vocabulary] tensor exists.

This module knows nothing about losses, optimizers, templates or rows.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from corral.model import cpu_gemm, gpu_layers
from corral.model.cpu_attention import packed_attention
from corral.model.cpu_gemm import times_transposed

ATTENTION_NAME = "corral_packed"
_CHUNK_ELEMENTS = 2**21  # logits held at once: 8 MiB in float32


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    lengths: Sequence[int] | None = None,
    ends: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within each of `lengths`; without `lengths`, transformers' own. Shapes as transformers has them."""
    if lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if ends is not None and not dropout:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        q, k, v = (t[0].transpose(0, 1).contiguous() for t in (query, key, value))
        return gpu_layers.attend(q, k, v, scale, lengths, ends)[None], None
    if query.device.type == "cpu" and query.dtype == torch.float32 and not dropout:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return packed_attention(query, key, value, scale, lengths), None
    parts = [
        F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True)
        for q, k, v in zip(*(t.split(list(lengths), dim=2) for t in (query, key, value)), strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION_NAME, _packed_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def hidden_states(model: nn.Module, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Last hidden states of the sequences, end to end: [total tokens, hidden size].

    Args:
        model: a causal language model, or a PEFT model around one.
        sequences: token ids; none may be empty.
    """
    causal = _causal_model(model)
    if causal.config._attn_implementation != ATTENTION_NAME:  # pyright: ignore[reportPrivateUsage]
        causal.set_attn_implementation(ATTENTION_NAME)
    lengths = [len(s) for s in sequences]
    total = sum(lengths)
    device = causal.device
    fill = cpu_gemm.fill(total, 64) if device.type == "cpu" else 0
    lengths[-1] += fill  # comes after all that is asked for, so nothing sees it
    ids = gpu_layers.sent(torch.tensor([i for s in sequences for i in s] + [0] * fill), device).unsqueeze(0)
    positions = gpu_layers.sent(torch.cat([torch.arange(n) for n in lengths]), device).unsqueeze(0)
    backbone: Any = causal.base_model
    # The 4-d mask is not read: it only keeps transformers from building a [tokens, tokens] one.
    ignored = torch.zeros(1, 1, 1, 1, device=device)
    output = backbone(
        input_ids=ids,
        attention_mask=ignored,
        position_ids=positions,
        use_cache=False,
        lengths=tuple(lengths),
        ends=gpu_layers.ends_of(lengths, device),
    )
    return output.last_hidden_state[0, :total]


def _causal_model(model: nn.Module) -> PreTrainedModel:
    causal: Any = model
    return causal.get_base_model() if hasattr(causal, "get_base_model") else causal


def head_weight(model: nn.Module) -> Tensor:
    """The output embedding, [vocabulary, hidden size]."""
    head: Any = _causal_model(model).get_output_embeddings()
    return head.weight


class _TokenLogProbs(torch.autograd.Function):
    """log softmax(h Wᵀ)[target] for each row, without keeping logits.

    Its gradient by h is W[target] − softmax(h Wᵀ) W, a vector per row that any later weighting only scales. So it is
    formed in the forward pass, where the probabilities are at hand, and backward costs a multiplication. The vocabulary is
    gone through in parts, with sums that are scaled to the highest logit so far (Milakov and Gimelshein 2018, arXiv
    1805.02867).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        fill = cpu_gemm.fill(len(hidden), 64) if hidden.device.type == "cpu" else 0
        rows = F.pad(hidden, (0, 0, 0, fill)) if fill else hidden
        highest = torch.full((len(rows), 1), -torch.inf, device=rows.device)
        total, summed = torch.zeros_like(highest), torch.zeros(rows.shape, device=rows.device) if want_hidden else None
        at_target = torch.empty(len(hidden), device=rows.device)
        for start, part in _parts(weight, len(rows)):
            logits = times_transposed(rows, part).float()
            column = targets - start
            inside = (column >= 0) & (column < len(part))
            found = logits[: len(hidden)].gather(1, column.clamp(0, len(part) - 1)[:, None]).squeeze(1)
            at_target = torch.where(inside, found, at_target)
            higher = torch.maximum(highest, logits.amax(dim=-1, keepdim=True))
            shrink, highest = (highest - higher).exp_(), higher
            exponentials = logits.sub_(higher).exp_()
            total.mul_(shrink).add_(exponentials.sum(dim=-1, keepdim=True))
            if summed is not None:
                summed.mul_(shrink).add_(times_transposed(exponentials.to(weight.dtype), part.T))
        normaliser = (highest + total.log())[: len(hidden)]
        slopes = None
        if summed is not None:
            slopes = (weight[targets] - summed.div_(total)[: len(hidden)]).to(hidden.dtype)
        ctx.save_for_backward(slopes, *((hidden, weight, targets, normaliser) if want_weight else ()))
        return at_target - normaliser.squeeze(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        slopes, *rest = ctx.saved_tensors
        of_hidden = None if slopes is None else slopes * gradient[:, None].to(slopes.dtype)
        of_weight = None
        if rest:
            hidden, weight, targets, normaliser = rest
            of_weight = torch.empty_like(weight)
            for start, part in _parts(weight, len(hidden)):
                probabilities = (hidden @ part.T).float().sub_(normaliser).exp_()
                scaled = probabilities.mul_(-gradient[:, None]).to(hidden.dtype)
                of_weight[start : start + len(part)] = scaled.T @ hidden
            of_weight.index_add_(0, targets, hidden * gradient[:, None].to(hidden.dtype))
        return of_hidden, of_weight, None


def _parts(weight: Tensor, rows: int) -> Generator[tuple[int, Tensor]]:
    """(start, rows from there) of what is multiplied at a time, so that `_CHUNK_ELEMENTS` hold the logits of `rows` rows."""
    columns = 1 << max(1, _CHUNK_ELEMENTS // max(1, rows)).bit_length() - 1  # few sizes, as `gemm.fill` says
    for start in range(0, len(weight), columns):
        yield start, weight[start : start + columns]


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target token, in float32, differentiable in `hidden` and `weight`.

    Args:
        hidden: [n, hidden size], the states that predict the targets.
        weight: [vocabulary, hidden size].
        targets: [n] token ids.

    Returns: [n].
    """
    if hidden.is_cuda:
        return gpu_layers.token_logprobs(hidden, weight, targets)
    result: Any = _TokenLogProbs.apply(hidden, weight, targets)
    return result


def target_logprobs(
    model: nn.Module, sequences: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]
) -> tuple[Tensor, ...]:
    """Log-probabilities of the ids at `positions` of each sequence, each given all before it.

    Args:
        model: a causal language model, or a PEFT model around one.
        sequences: token ids; computed as one pack.
        positions: for each sequence, ascending positions from 1 up.

    Returns: for each sequence a float32 tensor as long as its positions; differentiable where gradients are on.
    """
    hidden = hidden_states(model, sequences)
    starts = [0]
    for sequence in sequences:
        starts.append(starts[-1] + len(sequence))
    flat = torch.tensor([start + p - 1 for (start, _), ps in zip(pairwise(starts), positions, strict=True) for p in ps])
    targets = torch.tensor([s[p] for s, ps in zip(sequences, positions, strict=True) for p in ps])
    picked = hidden.index_select(0, gpu_layers.sent(flat, hidden.device))
    logprobs = token_logprobs(picked, head_weight(model), gpu_layers.sent(targets, hidden.device))
    return logprobs.split([len(ps) for ps in positions])


def score(model: nn.Module, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[list[float]]:
    """Log-probabilities of sequence[start:] for each sequence, computed as one pack without gradients."""
    with torch.inference_mode():
        positions = [range(start, len(s)) for s, start in zip(sequences, starts, strict=True)]
        return [t.tolist() for t in target_logprobs(model, sequences, positions)]
