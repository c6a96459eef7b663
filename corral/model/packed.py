"""Several sequences in one forward pass, isolated from each other, with the head only where it is asked for.

A pack is sequences laid end to end in one row. Attention runs within each sequence alone and positions start anew, so
the result for a sequence is what it would be by itself (to rounding); no padding is computed, and no square over the
whole pack. The head runs in chunks over the wanted positions: no [tokens, vocabulary] tensor exists.

This module knows nothing about losses, optimizers, templates or rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from corral.model.gemm import times_transposed

ATTENTION = "corral_packed"
_CHUNK_ELEMENTS = 2**24  # logits held at once: 64 MiB in float32


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    lengths: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within each of `lengths`; without `lengths`, transformers' own. Shapes as transformers has them."""
    if lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if query.is_cuda:
        return _varlen_attention(query, key, value, scaling, lengths), None
    parts = [
        F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True)
        for q, k, v in zip(*(t.split(list(lengths), dim=2) for t in (query, key, value)), strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, lengths: Sequence[int]
) -> Tensor:
    """The same through torch's variable-length kernel, on a GPU. Returns [1, tokens, heads, head size]."""
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor([0, *lengths], device=query.device).cumsum(0).to(torch.int32)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    q, k, v = (t[0].transpose(0, 1).contiguous() for t in (query, key, value))
    longest = max(lengths)
    out = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=(-1, 0))
    return out.unsqueeze(0)  # pyright: ignore[reportAttributeAccessIssue]


AttentionInterface.register(ATTENTION, _packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def hidden_states(model: nn.Module, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Last hidden states of the sequences, end to end: [total tokens, hidden size].

    Args:
        model: a causal language model, or a PEFT model around one.
        sequences: token ids; none may be empty.
    """
    causal = _causal_model(model)
    if causal.config._attn_implementation != ATTENTION:  # pyright: ignore[reportPrivateUsage]
        causal.set_attn_implementation(ATTENTION)
    lengths = [len(s) for s in sequences]
    device = causal.device
    ids = torch.tensor([i for s in sequences for i in s], device=device).unsqueeze(0)
    positions = torch.cat([torch.arange(n) for n in lengths]).to(device).unsqueeze(0)
    backbone: Any = causal.base_model
    # The 4-d mask is not read: it only keeps transformers from building a [tokens, tokens] one.
    ignored = torch.zeros(1, 1, 1, 1, device=device)
    output = backbone(
        input_ids=ids, attention_mask=ignored, position_ids=positions, use_cache=False, lengths=tuple(lengths)
    )
    return output.last_hidden_state[0]


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
    formed in the forward pass, where the probabilities are at hand, and backward costs a multiplication.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        rows = max(1, _CHUNK_ELEMENTS // weight.shape[0])
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        logprobs = torch.empty(len(hidden), device=hidden.device, dtype=torch.float32)
        slopes = torch.empty_like(hidden) if want_hidden else None
        for h, t, out, at in zip(
            hidden.split(rows), targets.split(rows), logprobs.split(rows), range(0, len(hidden), rows), strict=False
        ):
            logits = times_transposed(h, weight).float()
            highest = logits.amax(dim=-1, keepdim=True)
            at_target = logits.gather(1, t[:, None])
            # One pass of exponentials serves the norm and the gradient.
            exponentials = logits.sub_(highest).exp_()
            total = exponentials.sum(dim=-1, keepdim=True)
            out.copy_((at_target - highest - total.log()).squeeze(1))
            if slopes is not None:
                mean_row = times_transposed(exponentials.to(weight.dtype), weight.T).div_(total)
                torch.sub(weight[t], mean_row, out=slopes[at : at + rows])
        ctx.save_for_backward(slopes, *((hidden, weight, targets) if want_weight else ()))
        ctx.rows = rows
        return logprobs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        slopes, *rest = ctx.saved_tensors
        of_hidden = None if slopes is None else slopes * gradient[:, None].to(slopes.dtype)
        of_weight = None
        if rest:
            hidden, weight, targets = rest
            of_weight = torch.zeros_like(weight)
            for h, t, g in zip(*(x.split(ctx.rows) for x in (hidden, targets, gradient)), strict=True):
                probabilities = (h @ weight.T).float().softmax(dim=-1)
                scaled = probabilities.mul_(-g[:, None])
                scaled[torch.arange(len(t), device=t.device), t] += g
                of_weight.addmm_(scaled.to(h.dtype).T, h)
        return of_hidden, of_weight, None


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target token, in float32, differentiable in `hidden` and `weight`.

    Args:
        hidden: [n, hidden size], the states that predict the targets.
        weight: [vocabulary, hidden size].
        targets: [n] token ids.

    Returns: [n].
    """
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
    picked = hidden.index_select(0, flat.to(hidden.device))
    logprobs = token_logprobs(picked, head_weight(model), targets.to(hidden.device))
    return logprobs.split([len(ps) for ps in positions])


def score(model: nn.Module, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> list[list[float]]:
    """Log-probabilities of sequence[start:] for each sequence, computed as one pack without gradients."""
    with torch.inference_mode():
        positions = [range(start, len(s)) for s, start in zip(sequences, starts, strict=True)]
        return [t.tolist() for t in target_logprobs(model, sequences, positions)]
