"""chrF (Popović 2015, "chrF: character n-gram F-score for automatic MT evaluation") as per-text counts that can be summed.

sacrebleu extracts the n-grams; the step from sums to the score is here in numpy, because a bootstrap repeats it ten thousand
times. It needs no words, so it is the same for all scripts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
CHRF_ORDERS = 6
_BETA_SQUARED = 4.0  # recall weighs twice as much as precision


def chrf_statistics(references: Sequence[Sequence[str]], candidates: Sequence[str]) -> Floats:
    """[n, 18] counts of n candidates: for 1- to 6-grams of characters those of the candidate, of the reference, and matched.

    Of several references of a candidate, the one with the best score counts, as in sacrebleu. `chrf` of the column sums is the
    corpus score.
    """
    rows = np.zeros((len(candidates), 3 * CHRF_ORDERS))
    for row, of_row, candidate in zip(rows, references, candidates, strict=True):
        grams = _character_ngrams(candidate)
        counts = np.array([_count_matches(grams, _character_ngrams(reference)) for reference in of_row])
        row[:] = counts[int(chrf(counts).argmax())]
    return rows


def chrf(sums: Floats) -> Floats:
    """Corpus chrF in [0, 100] from summed statistics: [..., 18] → [...].

    sacrebleu's defaults: precision and recall are averaged over the orders of which both texts have n-grams, and β = 2.
    """
    given, expected, matched = (sums[..., i::3] for i in range(3))
    counted = (given > 0) & (expected > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        orders = counted.sum(axis=-1)
        precision = np.where(counted, matched / given, 0.0).sum(axis=-1) / orders
        recall = np.where(counted, matched / expected, 0.0).sum(axis=-1) / orders
        score = 100 * (1 + _BETA_SQUARED) * precision * recall / (_BETA_SQUARED * precision + recall)
    return np.where((orders > 0) & (precision + recall > 0), score, 0.0)


def chrf_signature() -> str:
    """sacrebleu's signature of this chrF, for comparison with other people's scores; of one reference."""
    from sacrebleu.metrics.chrf import CHRF

    metric = CHRF()
    metric.corpus_score(["a"], [["a"]])  # the signature contains the number of references, which is known after scoring
    return str(metric.get_signature())


def _character_ngrams(text: str) -> list[Counter[str]]:
    from sacrebleu.metrics.helpers import extract_all_char_ngrams

    return extract_all_char_ngrams(text, CHRF_ORDERS, include_whitespace=False)


def _count_matches(grams: Sequence[Counter[str]], expected: Sequence[Counter[str]]) -> list[int]:
    counts: list[int] = []
    for ours, theirs in zip(grams, expected, strict=True):
        # As in sacrebleu, where the reference is too short for an order, those of the candidate do not count.
        counts += [ours.total() if theirs else 0, theirs.total(), (ours & theirs).total()]
    return counts
