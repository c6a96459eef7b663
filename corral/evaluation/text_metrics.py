"""Metrics of answers beside their references: ROUGE, BLEU, chrF, exact match, token F1 and BERTScore, each as a measure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from corral.evaluation.bert_score import BertScorer
from corral.evaluation.statistics import Measure
from corral.metrics.bleu import bleu, bleu_signature, bleu_statistics, bleu_tokenizer
from corral.metrics.chrf import chrf, chrf_signature, chrf_statistics
from corral.metrics.rouge import Rouge, RougeScores, has_hidden_words, rouge_signature, unicode_words
from corral.metrics.squad import exact_match, token_f1
from corral.recipe.evaluate import DEFAULT_ANSWER_METRICS, BertScore


@dataclass(frozen=True, slots=True)
class TextScores:
    """One metric of n answers.

    Attributes:
        places: of the m ≤ n answers that it can be computed for, ascending; the measure has a unit for each.
        signature: how it was computed, where there are several ways.
        missing: why the others have no score.
    """

    places: Sequence[int]
    measure: Measure
    signature: str = ""
    missing: str = ""


class TextMetrics:
    """Computes metrics of answers. One object for all variants, as it keeps ROUGE's vocabulary and BERTScore's model.

    Args:
        names: of the run's own rows, of `ANSWER_METRICS`; tasks always have the default ones.
        bert_score: `[evaluate.bertscore]`.
    """

    def __init__(self, names: Collection[str] = DEFAULT_ANSWER_METRICS, bert_score: BertScore | None = None) -> None:
        self.names = names
        self._rouge = Rouge(unicode=None)
        self._bert_scorer = BertScorer(bert_score or BertScore())

    def score(
        self, references: Sequence[Sequence[str]], answers: Sequence[str], names: Collection[str]
    ) -> dict[str, TextScores]:
        """The metrics of n > 0 answers, each beside one or more references, of which the best counts; there is no BLEU beside
        several.

        Raises: MissingExtraError, InputError, AssetError (BERTScore cannot be computed).
        """
        everywhere = range(len(answers))
        scores: dict[str, TextScores] = {}
        if any(name in RougeScores._fields for name in names):
            scores |= self._score_rouge(references, answers)
        if "bleu" in names and all(len(of_row) == 1 for of_row in references):
            firsts = [of_row[0] for of_row in references]
            tokenizer = bleu_tokenizer(firsts)
            measure = Measure.corpus(bleu_statistics(firsts, answers, tokenizer), bleu)
            scores["bleu"] = TextScores(everywhere, measure, bleu_signature(tokenizer))
        if "chrf" in names:
            scores["chrf"] = TextScores(
                everywhere, Measure.corpus(chrf_statistics(references, answers), chrf), chrf_signature()
            )
        pairs = list(zip(references, answers, strict=True))
        if "exact_match" in names:
            hits = [any(exact_match(other, answer) for other in of_row) for of_row, answer in pairs]
            scores["exact_match"] = TextScores(everywhere, Measure.rate(hits))
        if "token_f1" in names:
            best = [max(token_f1(other, answer) for other in of_row) for of_row, answer in pairs]
            scores["token_f1"] = TextScores(everywhere, Measure.mean(np.array(best)))
        if "bertscore" in names:
            values = self._bert_scorer.score(references, answers)
            scores["bertscore"] = TextScores(everywhere, Measure.mean(values), self._bert_scorer.signature)
        return {name: found for name, found in scores.items() if name in names}

    def _score_rouge(self, references: Sequence[Sequence[str]], answers: Sequence[str]) -> dict[str, TextScores]:
        # Where a reference has no words, in any script, every answer would score 0.
        in_words = [i for i, of_row in enumerate(references) if any(map(unicode_words, of_row))]
        scores = [
            self._rouge.score_pairs(references[i], [answers[i]] * len(references[i])).max(axis=0) for i in in_words
        ]
        table = np.array(scores, dtype=np.float64).reshape(-1, len(RougeScores._fields))
        hidden = sum(any(map(has_hidden_words, references[i])) for i in in_words)
        signature = rouge_signature(hidden, len(in_words))
        return {
            name: TextScores(in_words, Measure.mean(table[:, index]), signature, "the reference has no words")
            for index, name in enumerate(RougeScores._fields)
        }
