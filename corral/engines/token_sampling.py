"""From logits to ids: greedy, temperature, top-k and top-p for a whole batch, each row in its own way.

Knows nothing about models, caches or requests. Randomness comes from outside, one number for each row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from corral.engines.base import Sampling

_NUCLEUS = 256  # tokens sorted for top-p at first: sorting all 49,152 of 100 rows takes 18 times as long


def sample(logits: Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float]) -> Tensor:
    """Draw one id for each row: temperature, then top-k, then top-p (nucleus sampling, Holtzman et al. 2020).

    Args:
        logits: [rows, vocabulary], float32, finite or −inf, not all −inf.
        samplings: one for each row.
        uniforms: for each row, a number over 0 and at most 1: how far up the cumulated probabilities to go. One number a
            step, whatever else is in the batch, is what lets a seed give the same ids in every batch.

    Returns: [rows] ids.
    """
    ids = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    numbers = logits.new_tensor(
        [[s.temperature or 1.0, s.top_k, s.top_p, u] for s, u in zip(samplings, uniforms, strict=True)]
    )
    kinds = [_greedy if s.temperature == 0 else _whole if s.top_k == 0 and s.top_p == 1 else _cut for s in samplings]
    for kind in (_greedy, _whole, _cut):
        rows = [i for i, of_row in enumerate(kinds) if of_row is kind]
        if len(rows) == len(logits):
            return kind(logits, numbers)
        if rows:
            ids[rows] = kind(logits[rows], numbers[rows])
    return ids


def _greedy(logits: Tensor, numbers: Tensor) -> Tensor:
    return logits.argmax(-1)


def _whole(logits: Tensor, numbers: Tensor) -> Tensor:
    """Draw from all tokens."""
    temperature, _, _, uniform = numbers.unbind(1)
    return _pick((logits / temperature[:, None]).softmax(-1), uniform)


def _cut(logits: Tensor, numbers: Tensor) -> Tensor:
    """Draw from the top-k and top-p tokens."""
    return _cut_sorted((logits / numbers[:, :1]).softmax(-1), numbers, _NUCLEUS)


def _cut_sorted(probabilities: Tensor, numbers: Tensor, width: int) -> Tensor:
    """The same with the `width` best tokens sorted; with all of them for rows where those do not reach top-p."""
    _, top_k, top_p, uniform = numbers.unbind(1)
    vocabulary = probabilities.shape[1]
    width = min(vocabulary, max(width, int(top_k.max())))
    best, ids = probabilities.topk(width, dim=-1)
    limited = (top_k > 0)[:, None]
    ranks = torch.arange(width, device=best.device)
    best = torch.where(limited & (ranks >= top_k[:, None]), 0, best)
    best = torch.where(limited, best / best.sum(-1, keepdim=True), best)
    # A token stays while those before it have not reached top-p: the smallest set that does, never an empty one.
    kept = torch.where(best.cumsum(-1) - best < top_p[:, None], best, 0)
    # A sum in parallel may waver by a rounding; what was cut must not be drawn for that.
    at = torch.minimum(_pick(kept, uniform), kept.count_nonzero(-1) - 1)
    drawn = ids.gather(1, at[:, None]).squeeze(1)
    wide = (best.sum(-1) < top_p) & (top_k == 0)
    if width < vocabulary and wide.any():
        drawn[wide] = _cut_sorted(probabilities[wide], numbers[wide], vocabulary)
    return drawn


def _pick(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first column of [rows, columns] at which the cumulated weights reach the share `uniform` of their sum."""
    cumulated = weights.cumsum(-1)
    target = (uniform * cumulated[:, -1])[:, None]
    return torch.searchsorted(cumulated, target).squeeze(1)
