"""Logits → ids for a batch whose rows have different settings.

The order is vLLM's for what changes single logits (bias; repetition, frequency and presence penalties; stop ids that come too
early), then transformers' for what truncates: temperature, top-k, top-p, min-p. vLLM applies min-p before top-p, which then
refers to the tokens that are left and may cut off more. The caller gives the random numbers, one for each row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from corral.engines.base import OPTIONAL_SAMPLING, Sampling

_SORTED_AT_FIRST = 256  # tokens, for top-p: sorting all 49,152 of 100 rows takes 18 times as long


_MIN_TEMPERATURE = 1e-6  # lower ones would divide by what float32 rounds to 0


class LogitChanges:
    """What the Sampling of one choice changes in single logits, in view of its prompt and its ids so far.

    Args:
        vocabulary: logits have so many columns; there may be stop ids beyond.
        device: of the logits.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int], vocabulary: int, device: torch.device) -> None:
        self._sampling = sampling
        self._sampled = 0
        self._device = device
        self._bias_ids = torch.tensor([id_ for id_, _ in sampling.logit_bias], dtype=torch.long, device=device)
        self._bias = torch.tensor([bias for _, bias in sampling.logit_bias], dtype=torch.float32, device=device)
        stop_ids = [id_ for id_ in sampling.stop_ids if id_ < vocabulary]
        self._stop_ids = torch.tensor(stop_ids, dtype=torch.long, device=device)
        penalised = list(dict.fromkeys(prompt)) if sampling.repetition_penalty != 1 else []
        self._columns = {id_: column for column, id_ in enumerate(penalised)}
        self._ids = torch.tensor(penalised, dtype=torch.long, device=device)
        """That penalties apply to."""
        self._counts = torch.zeros(len(penalised), dtype=torch.float32, device=device)
        """How often each of them stands in the answer so far."""

    @staticmethod
    def needed(sampling: Sampling) -> bool:
        """Whether a Sampling changes any logit."""
        names = ("logit_bias", "repetition_penalty", "frequency_penalty", "presence_penalty", "min_tokens")
        return any(getattr(sampling, name) != OPTIONAL_SAMPLING[name] for name in names)

    def apply(self, logits: Tensor) -> None:
        """Change the [vocabulary] logits of the next id, in place."""
        s = self._sampling
        if s.logit_bias:
            logits.index_add_(0, self._bias_ids, self._bias)
        if len(self._ids):
            old, penalty = logits[self._ids], s.repetition_penalty
            new = torch.where(old < 0, old * penalty, old / penalty)
            present = self._counts.clamp(max=1)
            logits[self._ids] = new - s.frequency_penalty * self._counts - s.presence_penalty * present
        if self._sampled < s.min_tokens:
            logits[self._stop_ids] = -torch.inf

    def add(self, id_: int) -> None:
        """Note the next id of the answer."""
        self._sampled += 1
        column = self._columns.setdefault(id_, len(self._columns))
        if column == len(self._ids):
            self._ids = torch.cat((self._ids, torch.tensor([id_], device=self._device)))
            self._counts = torch.cat((self._counts, torch.ones(1, dtype=torch.float32, device=self._device)))
        else:
            self._counts[column] += 1


def changed(logits: Tensor, changes: Sequence[LogitChanges | None]) -> Tensor:
    """[rows, vocabulary] logits with the changes of each row; the given ones stay as they are."""
    if any(changes):
        logits = logits.clone()
        for row, change in zip(logits, changes, strict=True):
            if change is not None:
                change.apply(row)
    return logits


def sample(logits: Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float]) -> Tensor:
    """Sample one id for each row: temperature, then top-k, then top-p (nucleus sampling, Holtzman et al. 2020), then min-p
    (Nguyen et al. 2024, arXiv 2407.01082).

    Args:
        logits: [rows, vocabulary], float32, finite or −inf, not all −inf.
        samplings: one for each row.
        uniforms: for each row, a random number over 0 and at most 1: the first id is taken at which the cumulated
            probabilities reach it. One number for each row and step makes a seed give the same ids in every batch.

    Returns: [rows] ids.
    """
    ids = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    numbers = logits.new_tensor(
        [
            # A top-p of 1 must cut nothing, also where a sum is rounded up to it.
            [max(s.temperature, _MIN_TEMPERATURE), s.top_k, s.top_p if s.top_p < 1 else torch.inf, s.min_p, u]
            for s, u in zip(samplings, uniforms, strict=True)
        ]
    )
    methods = [
        _greedy if s.temperature == 0 else _full if (s.top_k, s.top_p, s.min_p) == (0, 1, 0) else _truncated
        for s in samplings
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
    return _search(_probabilities(logits, numbers), numbers[:, -1])


def _truncated(logits: Tensor, numbers: Tensor) -> Tensor:
    """Sample from the top-k, top-p and min-p tokens."""
    return _truncated_sorted(_probabilities(logits, numbers), numbers, _SORTED_AT_FIRST)


def _probabilities(logits: Tensor, numbers: Tensor) -> Tensor:
    # Without the maximum no quotient overflows, however low the temperature.
    return ((logits - logits.amax(-1, keepdim=True)) / numbers[:, :1]).softmax(-1)


def _truncated_sorted(probabilities: Tensor, numbers: Tensor, width: int) -> Tensor:
    """Sort the `width` most likely tokens; all of them in rows where those do not reach top-p or min-p."""
    _, top_k, top_p, min_p, uniform = numbers.unbind(1)
    vocabulary = probabilities.shape[1]
    width = min(vocabulary, max(width, int(top_k.max())))
    best, ids = probabilities.topk(width, dim=-1)
    least = min_p * best[:, 0]
    wide = (top_k == 0) & (best.sum(-1) < top_p) & (best[:, -1] >= least)
    limited = (top_k > 0)[:, None]
    ranks = torch.arange(width, device=best.device)
    best = torch.where(limited & (ranks >= top_k[:, None]), 0, best)
    shares = torch.where(limited, best / best.sum(-1, keepdim=True), best)
    # A token is kept while those before it have not reached top-p: the smallest set that does, and never an empty one.
    kept = torch.where((shares.cumsum(-1) - shares < top_p[:, None]) & (best >= least[:, None]), shares, 0)
    # The rounding of a parallel sum may vary; it must not lead to a token that was cut off.
    column = torch.minimum(_search(kept, uniform), kept.count_nonzero(-1) - 1)
    sampled = ids.gather(1, column[:, None]).squeeze(1)
    if width < vocabulary and wide.any():
        sampled[wide] = _truncated_sorted(probabilities[wide], numbers[wide], vocabulary)
    return sampled


def _search(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first column of [rows, columns] at which the cumulated weights reach the share `uniform` of their sum."""
    cumulated = weights.cumsum(-1)
    target = (uniform * cumulated[:, -1])[:, None]
    return torch.searchsorted(cumulated, target).squeeze(1)
