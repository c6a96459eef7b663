"""Logits → ids: greedy, temperature, top-k and top-p sampling of a batch whose rows have different settings.

The caller gives the random numbers, one for each row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from corral.engines.base import Sampling

_SORTED_AT_FIRST = 256  # tokens, for top-p: sorting all 49,152 of 100 rows takes 18 times as long


def sample(logits: Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float]) -> Tensor:
    """Sample one id for each row: temperature, then top-k, then top-p (nucleus sampling, Holtzman et al. 2020).

    Args:
        logits: [rows, vocabulary], float32, finite or −inf, not all −inf.
        samplings: one for each row.
        uniforms: for each row, a random number over 0 and at most 1: the first id is taken at which the cumulated
            probabilities reach it. One number for each row and step makes a seed give the same ids in every batch.

    Returns: [rows] ids.
    """
    ids = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    numbers = logits.new_tensor(
        [[s.temperature or 1.0, s.top_k, s.top_p, u] for s, u in zip(samplings, uniforms, strict=True)]
    )
    methods = [
        _greedy if s.temperature == 0 else _full if s.top_k == 0 and s.top_p == 1 else _truncated for s in samplings
    ]
    for method in (_greedy, _full, _truncated):
        rows = [i for i, row_method in enumerate(methods) if row_method is method]
        if len(rows) == len(logits):
            return method(logits, numbers)
        if rows:
            ids[rows] = method(logits[rows], numbers[rows])
    return ids


def _greedy(logits: Tensor, numbers: Tensor) -> Tensor:
    return logits.argmax(-1)


def _full(logits: Tensor, numbers: Tensor) -> Tensor:
    """Sample from all tokens."""
    temperature, _, _, uniform = numbers.unbind(1)
    return _search((logits / temperature[:, None]).softmax(-1), uniform)


def _truncated(logits: Tensor, numbers: Tensor) -> Tensor:
    """Sample from the top-k and top-p tokens."""
    return _truncated_sorted((logits / numbers[:, :1]).softmax(-1), numbers, _SORTED_AT_FIRST)


def _truncated_sorted(probabilities: Tensor, numbers: Tensor, width: int) -> Tensor:
    """Sort the `width` most likely tokens; all of them in rows where those do not reach top-p."""
    _, top_k, top_p, uniform = numbers.unbind(1)
    vocabulary = probabilities.shape[1]
    width = min(vocabulary, max(width, int(top_k.max())))
    best, ids = probabilities.topk(width, dim=-1)
    limited = (top_k > 0)[:, None]
    ranks = torch.arange(width, device=best.device)
    best = torch.where(limited & (ranks >= top_k[:, None]), 0, best)
    best = torch.where(limited, best / best.sum(-1, keepdim=True), best)
    # A token is kept while those before it have not reached top-p: the smallest set that does, and never an empty one.
    kept = torch.where(best.cumsum(-1) - best < top_p[:, None], best, 0)
    # The rounding of a parallel sum may vary; it must not lead to a token that was cut off.
    column = torch.minimum(_search(kept, uniform), kept.count_nonzero(-1) - 1)
    sampled = ids.gather(1, column[:, None]).squeeze(1)
    wide = (best.sum(-1) < top_p) & (top_k == 0)
    if width < vocabulary and wide.any():
        sampled[wide] = _truncated_sorted(probabilities[wide], numbers[wide], vocabulary)
    return sampled


def _search(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first column of [rows, columns] at which the cumulated weights reach the share `uniform` of their sum."""
    cumulated = weights.cumsum(-1)
    target = (uniform * cumulated[:, -1])[:, None]
    return torch.searchsorted(cumulated, target).squeeze(1)
