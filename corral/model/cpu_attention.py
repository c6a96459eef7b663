"""Causal attention within each sequence of a pack, forwards and backwards, from oneDNN's products on a CPU.

torch's own attention on a CPU multiplies small blocks by MKL. Here a block is all query heads that share a key head, times
128 positions, so that products are large enough for oneDNN, and the scores of a block stay in the processor's cache. Only
keys that a block may see are multiplied; a sequence's last block is filled up to one of few sizes (`gemm.fill`). Backward
forms the scores again, as flash attention does (Dao et al. 2022, arXiv 2205.14135); nothing of the square is kept.

Knows nothing about models, rotary positions or adapters.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from corral.model import cpu_gemm
from corral.model.cpu_gemm import times_transposed

_POSITIONS = 128  # few enough to skip most of what is masked, enough for fast products


def packed_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, lengths: Sequence[int]) -> Tensor:
    """Attention within each of `lengths`, differentiable, for tensors as transformers has them.

    Args:
        query: [1, heads, tokens, head size]; key and value with as many heads or a part of them.
        scale: of the scores.
        lengths: see `attend`.

    Returns: [1, tokens, heads, head size].
    """
    result: Any = _PackedAttention.apply(query, key, value, scale, tuple(lengths))
    return result


def attend(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]) -> Tensor:
    """softmax(Q Kᵀ, causal within each sequence) V; not differentiable, see `attend_backward`.

    Args:
        query: [key heads, tokens, group, head size], contiguous and scaled; `group` query heads share a key head.
        key, value: [key heads, tokens, head size], contiguous.
        lengths: of the sequences that lie end to end; they sum to `tokens`.

    Returns: as `query`.
    """
    out = torch.empty_like(query)
    for start, length in _spans(lengths):
        q, k, v = (_sequence(t, start, length) for t in (query, key, value))
        found = torch.empty_like(q)
        for q1, k1, v1, out1 in zip(*(t.unbind() for t in (q, k, v, found)), strict=True):
            for first, last in _blocks(len(q1)):
                shares = _shares(q1[first:last], k1[:last])
                out1[first:last] = times_transposed(shares, v1[:last].T).view_as(q1[first:last])
        out[:, start : start + length] = found[:, :length]
    return out


def attend_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by query, key and value of `attend`, given that by its result (contiguous); shapes as there."""
    of_query, of_key, of_value = (torch.empty_like(t) for t in (query, key, value))
    for start, length in _spans(lengths):
        q, k, v, g = (_sequence(t, start, length) for t in (query, key, value, gradient))
        of_q = torch.empty_like(q)
        # Summed over blocks in the shape that the products give, [key heads, head size, positions].
        of_k, of_v = (torch.zeros(t.transpose(1, 2).shape, dtype=t.dtype) for t in (k, v))
        for q1, k1, v1, g1, of_q1, of_k1, of_v1 in zip(
            *(t.unbind() for t in (q, k, v, g, of_q, of_k, of_v)), strict=True
        ):
            for first, last in _blocks(len(q1)):
                rows, of_rows = q1[first:last], g1[first:last].flatten(0, 1)
                shares = _shares(rows, k1[:last])
                of_shares = times_transposed(of_rows, v1[:last])
                of_scores = torch.ops.aten._softmax_backward_data(of_shares, shares, -1, shares.dtype)
                of_q1[first:last] = times_transposed(of_scores, k1[:last].T).view_as(rows)
                of_k1[:, :last].add_(times_transposed(rows.flatten(0, 1).T, of_scores.T))
                of_v1[:, :last].add_(times_transposed(of_rows.T, shares.T))
        here = slice(start, start + length)
        of_query[:, here] = of_q[:, :length]
        of_key[:, here], of_value[:, here] = (t[:, :, :length].transpose(1, 2) for t in (of_k, of_v))
    return of_query, of_key, of_value


def _spans(lengths: Sequence[int]) -> Generator[tuple[int, int]]:
    """(start, length) of each sequence."""
    start = 0
    for length in lengths:
        yield start, length
        start += length


def _sequence(tensor: Tensor, start: int, length: int) -> Tensor:
    """One sequence's part of [key heads, tokens, …], filled up with zeros: as keys they come later than all others and are
    seen by none, as queries they get no gradient."""
    part = tensor.narrow(1, start, length)
    fill = cpu_gemm.fill(length, 32)
    return F.pad(part, (*(0, 0) * (tensor.dim() - 2), 0, fill)) if fill else part


def _blocks(length: int) -> Generator[tuple[int, int]]:
    """(first, last) position of the queries of each block; the last one takes a small rest along."""
    firsts = range(0, max(1, length - _POSITIONS // 2), _POSITIONS)
    yield from pairwise((*firsts, length))


def _shares(query: Tensor, key: Tensor) -> Tensor:
    """The softmax of a block, [positions · group, keys]: its last positions' queries see all keys but later ones."""
    positions, group, _ = query.shape
    scores = times_transposed(query.flatten(0, 1), key)
    scores.view(positions, group, -1)[:, :, -positions:].add_(_later(positions))
    return scores.softmax(-1)


@cache
def _later(positions: int) -> Tensor:
    """−∞ where a key comes after the query, else 0, for all of a group alike: [positions, 1, positions]."""
    return torch.full((positions, positions), -torch.inf).triu_(1).unsqueeze(1)


def by_token(heads: Tensor) -> Tensor:
    """[key heads, tokens, group, head size] → [tokens, heads, head size], contiguous."""
    return heads.transpose(0, 1).flatten(1, 2).contiguous()


def by_head(tokens: Tensor, like: Tensor) -> Tensor:
    """The opposite of `by_token`: [tokens, …] → the shape of `like`, contiguous."""
    key_heads, length, group, size = like.shape
    return tokens.view(length, key_heads, group, size).transpose(0, 1).contiguous()


class _PackedAttention(torch.autograd.Function):
    """See `packed_attention`."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, lengths: tuple[int, ...]) -> Tensor:
        heads = key.shape[1]
        q = query.mul(scale).view(heads, -1, *query.shape[2:]).transpose(1, 2).contiguous()
        k, v = key[0].contiguous(), value[0].contiguous()
        ctx.save_for_backward(q, k, v)
        ctx.scale, ctx.lengths = scale, lengths
        return by_token(attend(q, k, v, lengths))[None]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v = ctx.saved_tensors
        gradient = by_head(gradients[0][0], q)
        of_q, of_k, of_v = attend_backward(gradient, q, k, v, ctx.lengths)
        of_query = of_q.mul_(ctx.scale).transpose(1, 2).flatten(0, 1)
        return of_query[None], of_k[None], of_v[None], None, None
