"""Causal attention within each sequence of a pack on a CPU, forwards and backwards, through oneDNN.

torch's own attention on a CPU multiplies small blocks by MKL. Here a block is 128 positions of all query heads that share a
key head: large enough for fast products, small enough for its scores to stay in the processor's cache. Keys that no query of a
block may see are skipped. The backward pass computes the scores again, as flash attention does (Dao et al. 2022, arXiv
2205.14135), so no [tokens, tokens] tensor is kept.

A sequence may begin with tokens of earlier ones: their keys and values are put before its own, and blocks that hold no query
of its own are skipped.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from corral.model.compute.cpu_matmul import padding_rows, times_transposed

_BLOCK = 128


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens that a sequence has of its own in a pack.

    Args:
        start, length: which tokens of the pack they are.
        prefix: [n], those tokens of the pack, all of earlier sequences, that come before them in their sequence; None if
            they are the whole sequence.
    """

    start: int
    length: int
    prefix: Tensor | None = None

    @property
    def own(self) -> slice:
        """The tokens in the pack."""
        return slice(self.start, self.start + self.length)

    @property
    def shared(self) -> int:
        """Tokens of the prefix."""
        return 0 if self.prefix is None else len(self.prefix)


def spans(lengths: Sequence[int], prefixes: Sequence[Tensor | None]) -> tuple[Span, ...]:
    """Of sequences whose own tokens lie end to end."""
    ends = accumulate(lengths)
    return tuple(Span(end - n, n, prefix) for end, n, prefix in zip(ends, lengths, prefixes, strict=True))


def packed_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, sequences: Sequence[Span]) -> Tensor:
    """Attention within each of the sequences, differentiable, for tensors as transformers has them.

    Args:
        query: [1, heads, tokens, head size]; key and value with as many heads or fewer.
        scale: of the scores.
        sequences: see `attend`.

    Returns: [1, tokens, heads, head size].
    """
    result: Any = _PackedAttention.apply(query, key, value, scale, tuple(sequences))
    return result


def attend(query: Tensor, key: Tensor, value: Tensor, sequences: Sequence[Span]) -> Tensor:
    """softmax(Q Kᵀ, causal within each sequence) V. Its gradients come from `attend_backward`.

    Args:
        query: [key heads, tokens, group, head size], contiguous and scaled; `group` query heads share a key head.
        key, value: [key heads, tokens, head size], contiguous.
        sequences: in the order of their tokens, of which they have all.

    Returns: as `query`.
    """
    out = torch.empty_like(query)
    for span in sequences:
        q, k, v = (_padded(_sequence(t, span)) for t in (query, key, value))
        attended = torch.empty_like(q)
        for q1, k1, v1, attended1 in zip(*(t.unbind() for t in (q, k, v, attended)), strict=True):
            for first, last in _blocks(len(q1), span.shared):
                weights = _attention_weights(q1[first:last], k1[:last])
                attended1[first:last] = times_transposed(weights, v1[:last].T).view_as(q1[first:last])
        out[:, span.own] = attended[:, span.shared :][:, : span.length]
    return out


def attend_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, sequences: Sequence[Span]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the query, key and value of `attend`, given that of its result (contiguous); shapes as there."""
    grad_query, grad_key, grad_value = (torch.empty_like(t) for t in (query, key, value))
    for span in sequences:
        q, k, v = (_padded(_sequence(t, span)) for t in (query, key, value))
        # Of the prefix's own queries the result was not kept.
        g = _padded(F.pad(gradient[:, span.own], (0, 0, 0, 0, span.shared, 0)))
        grad_q = torch.empty_like(q)
        # Summed over blocks as the products come, [key heads, head size, positions].
        grad_k, grad_v = (torch.zeros(t.transpose(1, 2).shape, dtype=t.dtype) for t in (k, v))
        for q1, k1, v1, g1, grad_q1, grad_k1, grad_v1 in zip(
            *(t.unbind() for t in (q, k, v, g, grad_q, grad_k, grad_v)), strict=True
        ):
            for first, last in _blocks(len(q1), span.shared):
                rows, grad_rows = q1[first:last], g1[first:last].flatten(0, 1)
                weights = _attention_weights(rows, k1[:last])
                grad_weights = times_transposed(grad_rows, v1[:last])
                grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
                grad_q1[first:last] = times_transposed(grad_scores, k1[:last].T).view_as(rows)
                grad_k1[:, :last].add_(times_transposed(rows.flatten(0, 1).T, grad_scores.T))
                grad_v1[:, :last].add_(times_transposed(grad_rows.T, weights.T))
        of_span = slice(span.shared, span.shared + span.length)
        grad_query[:, span.own] = grad_q[:, of_span]
        for total, part in ((grad_key, grad_k.transpose(1, 2)), (grad_value, grad_v.transpose(1, 2))):
            total[:, span.own] = part[:, of_span]
            if span.prefix is not None:
                total.index_add_(1, span.prefix, part[:, : span.shared])
    return grad_query, grad_key, grad_value


def _sequence(tensor: Tensor, span: Span) -> Tensor:
    """A sequence's part of [key heads, tokens, …], with its prefix."""
    own = tensor[:, span.own]
    return own if span.prefix is None else torch.cat((tensor.index_select(1, span.prefix), own), dim=1)


def _padded(tensor: Tensor) -> Tensor:
    """[key heads, tokens, …] with zeros up to one of few lengths.

    Padding keys come last, so no query sees them; padding queries get no gradient.
    """
    padding = padding_rows(tensor.shape[1], 32)
    return F.pad(tensor, (*(0, 0) * (tensor.dim() - 2), 0, padding)) if padding else tensor


def _blocks(length: int, start: int) -> Generator[tuple[int, int]]:
    """(first, end) position of the queries of each block that has any from `start` on; fewer than half a block at the end
    join the last block."""
    firsts = range(0, max(1, length - _BLOCK // 2), _BLOCK)
    yield from ((first, end) for first, end in pairwise((*firsts, length)) if end > start)


def _attention_weights(query: Tensor, key: Tensor) -> Tensor:
    """The softmax of a block's scores, [positions · group, keys]; its queries are at the last positions of `key`."""
    positions, group, _ = query.shape
    scores = times_transposed(query.flatten(0, 1), key)
    scores.view(positions, group, -1)[:, :, -positions:].add_(_causal_mask(positions))
    return scores.softmax(-1)


@cache
def _causal_mask(positions: int) -> Tensor:
    """−∞ where a key comes after the query, else 0: [positions, 1 (for the group), positions]."""
    return torch.full((positions, positions), -torch.inf).triu_(1).unsqueeze(1)


def by_token(heads: Tensor) -> Tensor:
    """[key heads, tokens, group, head size] → [tokens, heads, head size], contiguous."""
    return heads.transpose(0, 1).flatten(1, 2).contiguous()


def by_head(tokens: Tensor, like: Tensor) -> Tensor:
    """The inverse of `by_token`: [tokens, …] → the shape of `like`, contiguous."""
    key_heads, length, group, size = like.shape
    return tokens.view(length, key_heads, group, size).transpose(0, 1).contiguous()


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, sequences: tuple[Span, ...]
    ) -> Tensor:
        heads = key.shape[1]
        q = query.mul(scale).view(heads, -1, *query.shape[2:]).transpose(1, 2).contiguous()
        k, v = key[0].contiguous(), value[0].contiguous()
        ctx.save_for_backward(q, k, v)
        ctx.scale, ctx.sequences = scale, sequences
        return by_token(attend(q, k, v, sequences))[None]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v = ctx.saved_tensors
        gradient = by_head(gradients[0][0], q)
        grad_q, grad_k, grad_v = attend_backward(gradient, q, k, v, ctx.sequences)
        grad_query = grad_q.mul_(ctx.scale).transpose(1, 2).flatten(0, 1)
        return grad_query[None], grad_k[None], grad_v[None], None, None
