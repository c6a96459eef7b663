"""corral's ROUGE against rouge-score 0.1.2: every F is the same float."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import tokenize
from rouge_score.rouge_scorer import RougeScorer

from corral.metrics.rouge import Rouge, ascii_words

SAMPLE = """
the a was wa gas run runs running runner relational flies dying news skies fully agreed feed hoping hopping generalizations
oscillators 12 12ab 2024 café naïve don't e-mail a_b İstanbul ΣΊΣΥΦΟΣ 東京 नमस्ते \u212a ﬁne x² 😀 -- .
"""
WORDS = [*SAMPLE.split(), "", "\n", "\t"]
TYPES = ["rouge1", "rouge2", "rougeL"]


def theirs(scorer: RougeScorer, reference: str, candidate: str) -> tuple[float, ...]:
    return tuple(score.fmeasure for score in scorer.score(reference, candidate).values())


@pytest.fixture(scope="module", params=[True, False], ids=["stemmed", "plain"])
def both(request: pytest.FixtureRequest) -> tuple[Rouge, RougeScorer]:
    return Rouge(stemmer=request.param), RougeScorer(TYPES, use_stemmer=request.param)


def test_scores_equal_rouge_score_on_random_texts_of_repeated_and_odd_words(both: tuple[Rouge, RougeScorer]) -> None:
    ours, scorer = both
    rng = random.Random(7)
    for _ in range(1_500):
        reference, candidate = (" ".join(rng.choices(WORDS, k=rng.randrange(40))) for _ in range(2))
        assert ours.score(reference, candidate) == theirs(scorer, reference, candidate), (reference, candidate)


TEXTS = st.one_of(
    st.text(max_size=80),
    st.text(alphabet=st.characters(codec=None, exclude_categories=()), max_size=40),
    st.text(alphabet="abcdeABs 0-\n", max_size=80),
    st.lists(st.sampled_from(WORDS), max_size=30).map(" ".join),
)


@settings(max_examples=400, deadline=None)
@given(reference=TEXTS, candidate=TEXTS)
@pytest.mark.parametrize("stemmer", [True, False])
def test_scores_equal_rouge_score_on_any_text(stemmer: bool, reference: str, candidate: str) -> None:
    expected = theirs(RougeScorer(TYPES, use_stemmer=stemmer), reference, candidate)
    assert Rouge(stemmer=stemmer).score(reference, candidate) == expected


@settings(max_examples=400, deadline=None)
@given(TEXTS)
def test_words_are_those_of_rouge_score(text: str) -> None:
    assert ascii_words(text) == tokenize.tokenize(text, None)


def test_pairwise_agreement_is_rouge_scores_rouge_l_between_every_two_texts() -> None:
    rng = random.Random(3)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    texts = [" ".join(rng.choices(WORDS, k=k)) for k in (30, 20, 0, 1, 25)]
    matrix = Rouge().pairwise_rouge_l(texts)
    for i, a in enumerate(texts):
        for j, b in enumerate(texts):
            assert matrix[i, j] == scorer.score(a, b)["rougeL"].fmeasure
