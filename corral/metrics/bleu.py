"""BLEU (Papineni et al., 2002) as per-text counts that can be summed and resampled.

sacrebleu counts; the step from sums to the score is here in numpy, because a bootstrap repeats it ten thousand times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from corral.metrics.rouge import unspaced_scripts

Floats: TypeAlias = NDArray[np.float64]
BLEU_ORDERS = 4


def bleu_tokenizer(references: Sequence[str]) -> str:
    """The name of sacrebleu's tokenizer for these texts: `13a`, as usual, splits at spaces.

    Where a script has none, a sentence would be one token: so it is, if half of the texts have such a script, `zh` for Chinese
    characters, and `char` if there are Japanese, Thai, Lao, Khmer or Burmese ones.
    """
    scripts = [unspaced_scripts(text) for text in references]
    unspaced = {script for of_text in scripts for script in of_text}
    return (
        "13a"
        if 2 * sum(map(bool, scripts)) < len(references) or not unspaced
        else "zh"
        if unspaced == {"Han"}
        else "char"
    )


def bleu_statistics(references: Sequence[str], candidates: Sequence[str], tokenizer: str = "13a") -> Floats:
    """[n, 10] counts, a row per text: tokens of candidate and reference, matched 1- to 4-grams, all 1- to 4-grams.

    Counted by sacrebleu (one reference each). `bleu` of the column sums is the corpus score.
    """
    from sacrebleu.metrics.bleu import BLEU

    # Effective order changes only the sentence score, which is not used, and silences sacrebleu's warning about it.
    metric = BLEU(effective_order=True, tokenize=tokenizer)
    rows = np.zeros((len(candidates), 2 + 2 * BLEU_ORDERS))
    for row, reference, candidate in zip(rows, references, candidates, strict=True):
        counted = metric.sentence_score(candidate, [reference])
        row[:] = (counted.sys_len, counted.ref_len, *counted.counts, *counted.totals)
    return rows


def bleu(sums: Floats) -> Floats:
    """Corpus BLEU in [0, 100] from summed statistics: [..., 10] → [...].

    sacrebleu's defaults: 4-grams, exponential smoothing of orders without a match (NIST's mteval-v13a), brevity
    penalty; 0 where nothing matches or there are no 4-grams at all.
    """
    length, reference_length = sums[..., 0], sums[..., 1]
    matched, total = sums[..., 2 : 2 + BLEU_ORDERS], sums[..., 2 + BLEU_ORDERS :]
    unmatched = matched == 0
    halvings = np.cumsum(unmatched, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = 100 * np.where(unmatched, 0.5**halvings, matched) / total
        brevity = np.exp(np.minimum(0.0, 1 - reference_length / length))
        score = brevity * np.exp(np.log(precision).mean(axis=-1))
    return np.where(~unmatched.all(axis=-1) & (total > 0).all(axis=-1), score, 0.0)


def bleu_signature(tokenizer: str = "13a") -> str:
    """sacrebleu's signature of this BLEU, for comparison with other people's scores."""
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(tokenize=tokenizer)
    metric.corpus_score(["a"], [["a"]])  # the signature contains the number of references, which is known after scoring
    return str(metric.get_signature())
