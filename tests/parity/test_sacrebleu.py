"""corral's BLEU, chrF and their paired significance against sacrebleu's."""

from __future__ import annotations

import random

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.significance import PairedTest

from corral.evaluation import statistics
from corral.evaluation.statistics import Measure
from corral.metrics.bleu import bleu, bleu_signature, bleu_statistics, bleu_tokenizer
from corral.metrics.chrf import chrf, chrf_signature, chrf_statistics

SAMPLE = "mix the flour, sugar and 2.5 eggs; bake (at 180 °C) for half an hour until it's golden. Süß 東京"
WORDS = SAMPLE.split()
Corpus = tuple[list[str], list[str]]


def corpus(rows: int, kept: float, seed: int, reference_seed: int = 0) -> Corpus:
    """References, and candidates in which each word is kept with some probability, else replaced or dropped."""
    words, noise = random.Random(reference_seed), random.Random(seed)
    references = [words.choices(WORDS, k=words.randrange(8, 25)) for _ in range(rows)]
    candidates = [
        [w if noise.random() < kept else noise.choice(WORDS) for w in row if noise.random() < 0.95]
        for row in references
    ]
    return [" ".join(row) for row in references], [" ".join(row) for row in candidates]


@pytest.mark.parametrize(("rows", "kept"), [(1, 0.9), (5, 0.3), (5, 0.0), (50, 0.7), (50, 1.0)])
def test_bleu_of_the_summed_statistics_is_sacrebleus_corpus_bleu(rows: int, kept: float) -> None:
    references, candidates = corpus(rows, kept, seed=rows)
    counted = bleu_statistics(references, candidates)
    expected = sacrebleu.corpus_bleu(candidates, [references])
    sums = counted.sum(axis=0)
    assert sums.tolist() == [expected.sys_len, expected.ref_len, *expected.counts, *expected.totals]
    assert float(bleu(sums)) == pytest.approx(expected.score, rel=1e-12)


@pytest.mark.parametrize("tokenizer", ["zh", "char"])
def test_bleu_with_a_tokenizer_for_scripts_without_spaces_is_sacrebleus(tokenizer: str) -> None:
    references, candidates = (
        ["我喜欢吃饭。今天 3 点", "他在東京にいる"],
        ["我喜欢吃面。今天 4 点", "他在東京都にいます"],
    )
    counted = bleu_statistics(references, candidates, tokenizer).sum(axis=0)
    expected = sacrebleu.corpus_bleu(candidates, [references], tokenize=tokenizer).score
    assert float(bleu(counted)) == pytest.approx(expected, rel=1e-12)
    assert f"tok:{tokenizer}" in bleu_signature(tokenizer)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(*[st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join)] * 2), min_size=1, max_size=4))
def test_bleu_equals_sacrebleu_on_short_empty_and_unmatched_texts(pairs: list[tuple[str, str]]) -> None:
    references, candidates = [a for a, _ in pairs], [b for _, b in pairs]
    expected = sacrebleu.corpus_bleu(candidates, [references]).score
    assert float(bleu(bleu_statistics(references, candidates).sum(axis=0))) == pytest.approx(expected, rel=1e-12)


def test_bleu_scores_many_sums_at_once() -> None:
    a, b = (bleu_statistics(*corpus(6, kept, seed=1)).sum(axis=0) for kept in (0.4, 0.8))
    nothing = np.zeros(10)
    assert bleu(np.stack([a, nothing, b])).tolist() == [float(bleu(a)), 0.0, float(bleu(b))]


def test_the_signature_is_the_one_sacrebleu_prints_for_such_a_score() -> None:
    references, candidates = corpus(5, 0.5, seed=1)
    metric = BLEU()
    metric.corpus_score(candidates, [references])
    assert bleu_signature() == str(metric.get_signature())


def test_counting_segments_makes_sacrebleu_print_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    bleu_statistics(["a b c ."] * 120, ["a b c ."] * 120)
    assert not caplog.records


@pytest.mark.parametrize("kept", [0.72, 0.76, 0.9])
def test_p_of_a_bleu_difference_agrees_with_sacrebleus_approximate_randomisation(kept: float) -> None:
    references, one = corpus(60, 0.7, seed=1)
    _, other = corpus(60, kept, seed=2)
    test = PairedTest([("one", one), ("other", other)], {"BLEU": BLEU()}, [references], test_type="ar", n_samples=5_000)
    expected = test()[1]["BLEU"][1]
    a, b = (Measure.corpus(bleu_statistics(references, texts), bleu) for texts in (other, one))
    result = statistics.compare(a, b, seed=0)
    # 5,000 and 10,000 trials: four standard errors of the difference of two such proportions.
    tolerance = 4 * np.sqrt(max(expected.p_value * (1 - expected.p_value), 1e-4) * (1 / 5_000 + 1 / 10_000))
    assert result.p == pytest.approx(expected.p_value, abs=tolerance)


def test_the_interval_of_bleu_agrees_with_sacrebleus_bootstrap() -> None:
    references, candidates = corpus(60, 0.7, seed=1)
    score = BLEU().corpus_score(candidates, [references], n_bootstrap=2_000)
    result = statistics.estimate(Measure.corpus(bleu_statistics(references, candidates), bleu), seed=0)
    assert result.low is not None
    assert result.high is not None
    assert result.mean == pytest.approx(score.score, rel=1e-12)
    assert (result.high - result.low) / 2 == pytest.approx(score._ci, rel=0.1)


def test_a_few_references_in_a_script_without_spaces_do_not_change_the_tokens_of_the_others() -> None:
    english = ["a red hat", "a blue hat", "a hat"]
    assert bleu_tokenizer([*english, "红帽子"]) == "13a"
    assert bleu_tokenizer([*english, *["红帽子"] * 3]) == "zh"
    assert bleu_tokenizer(["赤い帽子"]) == "char"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(*[st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join)] * 3), min_size=1, max_size=4))
def test_chrf_equals_sacrebleu_with_one_and_two_references_and_on_empty_texts(rows: list[tuple[str, str, str]]) -> None:
    firsts, seconds, candidates = ([row[i] for row in rows] for i in range(3))
    one = sacrebleu.corpus_chrf(candidates, [firsts]).score
    assert float(chrf(chrf_statistics([[first] for first in firsts], candidates).sum(axis=0))) == pytest.approx(one)
    two = sacrebleu.corpus_chrf(candidates, [firsts, seconds]).score
    counted = chrf_statistics(list(zip(firsts, seconds, strict=True)), candidates)
    assert float(chrf(counted.sum(axis=0))) == pytest.approx(two)


def test_the_signature_of_chrf_is_sacrebleus() -> None:
    references, candidates = corpus(5, 0.5, seed=1)
    metric = CHRF()
    metric.corpus_score(candidates, [references])
    assert chrf_signature() == str(metric.get_signature())
