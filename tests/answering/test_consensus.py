"""Votes follow their definitions in any order of arrival, and an early stop does not change them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from corral.answering.consensus import Candidate, Consensus, Method, StopRule, lead_probability
from corral.metrics.rouge import Rouge


def votes(method: Method, *texts: str, stop: StopRule = "never") -> Consensus:
    return Consensus(method, len(texts), stop=stop, embed=letters)


def letters(texts: Sequence[str]) -> np.ndarray:
    """Counts of letters, as vectors of length 1: an embedding that needs no model."""
    counts = np.array([[text.lower().count(c) for c in "abcdefghijklmnopqrstuvwxyz"] for text in texts]) + 1e-3
    return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def chosen(method: Method, *texts: str, logprobs: Sequence[float | None] | None = None) -> int:
    given = logprobs or [None] * len(texts)
    return votes(method, *texts).vote([Candidate(t, p) for t, p in zip(texts, given, strict=True)]).winner


def test_rouge_l_takes_the_answer_that_is_most_like_the_others() -> None:
    texts = ("the cat sat on the mat", "a dog", "the cat sat on a mat", "the cat sat there")
    vote = votes("rouge-l", *texts).vote([Candidate(t) for t in texts])
    pairs = RougeScorer(["rougeL"], use_stemmer=True)
    for i, text in enumerate(texts):
        others = [pairs.score(other, text)["rougeL"].fmeasure for j, other in enumerate(texts) if j != i]
        assert vote.scores[i] == pytest.approx(sum(others) / 3)
    assert vote.winner == int(np.argmax([s for s in vote.scores if s is not None]))
    assert vote.cancelled == 0


def test_rouge_l_compares_words_of_scripts_that_rouge_score_drops() -> None:
    texts = ("кошка сидит", "собака лежит дома", "собака лежит тут")
    assert chosen("rouge-l", *texts) in (1, 2)
    latin_only = Consensus("rouge-l", 3, rouge=Rouge(unicode=False)).vote([Candidate(t) for t in texts])
    assert latin_only.scores == (0.0, 0.0, 0.0)


def test_cosine_takes_the_answer_whose_embedding_is_most_like_the_others() -> None:
    assert chosen("cosine", "zzz", "abc abd", "abc") == 2
    with pytest.raises(ValueError, match="embed"):
        Consensus("cosine")


def test_empty_answers_do_not_agree_with_each_other() -> None:
    texts = ("", "", " ", "abc", "abc abd")
    for method in ("cosine", "rouge-l"):
        vote = votes(method, *texts).vote([Candidate(t) for t in texts])
        assert vote.scores[:3] == (0.0, 0.0, 0.0)
        assert vote.winner == 3


def test_an_answer_without_log_probabilities_loses_ties() -> None:
    assert chosen("majority", "1", "it is 1", "", logprobs=[-2.0, -0.5, None]) == 1
    assert chosen("majority", "1", "it is 1", "1.0", logprobs=[None, -0.5, -3.0]) == 1
    assert chosen("majority", "1", "it is 1", "1.0") == 0


def test_a_majority_counts_results_and_drops_what_has_none() -> None:
    texts = ("who knows", "6 * 3 = 18", "Answer: 18.0", "I say 17", "Answer: 17")
    vote = votes("majority", *texts[:4]).vote([Candidate(t) for t in texts[:4]])
    assert vote.winner == 1
    assert vote.results == (None, "18", "18", "17")
    assert vote.scores == (0.0, 2 / 3, 2 / 3, 1 / 3)
    assert chosen("majority", *texts, logprobs=[-1, -2, -2, -3, -0.5]) == 4, "the tie goes to the likeliest answer"
    assert chosen("majority", *texts) == 1, "and without log-probabilities to the first"
    assert chosen("majority", "who", "knows") == 0


def test_the_hybrid_counts_numbers_if_most_answers_have_one_else_compares_words() -> None:
    numbers = (
        "He pays 5 dollars",
        "She pays 7 dollars now",
        "Then she pays 7 dollars",
        "she pays 7 dollars",
        "nothing",
    )
    vote = votes("rouge-l+math", *numbers).vote([Candidate(t) for t in numbers])
    assert vote.results == ("5", "7", "7", "7", None)
    assert vote.winner == 3, "of those with the winning number, the one most like the others that have it"
    words = ("red green", "red blue 5", "red blue", "blue red", "yellow 7")
    vote = votes("rouge-l+math", *words).vote([Candidate(t) for t in words])
    assert set(vote.results) == {None}
    assert vote.winner == chosen("rouge-l", *words)


@pytest.mark.parametrize("method", ["rouge-l", "cosine", "majority", "rouge-l+math"])
@settings(max_examples=30)
@given(texts=st.lists(st.text("ab 12", max_size=12), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_no_order_of_arrival_changes_the_vote(method: Method, texts: list[str], seed: int) -> None:
    consensus = votes(method, *texts)
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    ballot = consensus.new_ballot(len(texts))
    for index in order:
        ballot.add(index, Candidate(texts[index], -float(index % 3)))
    assert ballot.vote() == consensus.vote([Candidate(t, -float(i % 3)) for i, t in enumerate(texts)])


# Few words, so that many answers are alike and early stops are frequent.
ANSWERS = st.lists(
    st.lists(st.sampled_from(["a", "b", "c", "1", "2"]), max_size=4).map(" ".join), min_size=2, max_size=7
)


@pytest.mark.parametrize("method", ["rouge-l", "cosine", "majority", "rouge-l+math"])
@settings(max_examples=100)
@given(texts=ANSWERS)
def test_a_lossless_stop_does_not_change_the_answer(method: Method, texts: list[str]) -> None:
    consensus = votes(method, *texts, stop="lossless")
    whole = consensus.vote([Candidate(t) for t in texts])
    ballot = consensus.new_ballot()
    for index, text in enumerate(texts):
        ballot.add(index, Candidate(text))
        if ballot.is_decided:
            break
    early = ballot.vote()
    if early.cancelled:
        if method == "majority" or (method == "rouge-l+math" and early.results[early.winner] is not None):
            assert early.results[early.winner] == whole.results[whole.winner]
        else:
            encoded = consensus.rouge.encode([texts[early.winner], texts[whole.winner]])
            assert encoded[0] == encoded[1]
    else:
        assert early == whole


def test_the_bound_behind_the_lossless_stop_holds_for_every_short_text() -> None:
    """2d/(1 + d) is a metric, hence c − b ≤ 4a/(1 + 3a) for distances a, b, c of three texts: all of up to 3 words of 2."""
    texts = [" ".join(words) for n in range(1, 4) for words in itertools.product("ab", repeat=n)]
    distance = 1 - Rouge(unicode=True).pairwise_rouge_l(texts)
    assert len(texts) == 14
    for i, j, k in itertools.product(range(len(texts)), repeat=3):
        a, b, c = distance[i, j], distance[j, k], distance[i, k]
        assert c - b <= 4 * a / (1 + 3 * a) + 1e-12


def test_when_a_vote_is_decided() -> None:
    def is_decided_after(method: Method, stop: StopRule, *texts: str, n: int = 5) -> bool:
        ballot = Consensus(method, n, stop=stop, embed=letters).new_ballot()
        for index, text in enumerate(texts):
            ballot.add(index, Candidate(text))
        return ballot.is_decided

    assert is_decided_after("majority", "lossless", "1", "1", "1"), "three of five agree"
    assert not is_decided_after("majority", "lossless", "1", "1", "2")
    assert not is_decided_after("majority", "never", "1", "1", "1", "1")
    assert is_decided_after("majority", "adaptive", *["1"] * 4, n=20)
    assert not is_decided_after("majority", "adaptive", *["1"] * 3, n=20)
    assert not is_decided_after("majority", "lossless", *["1"] * 4, n=20)
    assert is_decided_after("rouge-l", "lossless", "a b", "A b.", "a b", "a b!")
    assert not is_decided_after("rouge-l", "lossless", "a b", "a b", "a b")
    assert not is_decided_after("rouge-l", "lossless", "", "", "", "")
    assert is_decided_after("cosine", "lossless", *["The cat runs."] * 4)
    assert not is_decided_after("cosine", "lossless", *["The cat runs."] * 3, "the cats run")
    assert not is_decided_after("cosine", "lossless", "", "", "", "")
    assert is_decided_after("rouge-l+math", "lossless", "1", "it is 1", "1 it is")
    assert not is_decided_after("rouge-l+math", "lossless", "a", "a", "a", "1")


def test_the_certainty_of_a_lead_is_that_of_the_beta_distribution() -> None:
    assert lead_probability(0, 0) == 0.5
    assert lead_probability(3, 0) == pytest.approx(1 - 0.5**4)
    draws = np.random.default_rng(0).beta(8, 4, 200_000)
    assert lead_probability(7, 3) == pytest.approx(float((draws > 0.5).mean()), abs=0.005)


def test_a_vote_without_answers_is_refused() -> None:
    with pytest.raises(ValueError, match="no answer"):
        Consensus("rouge-l").new_ballot().vote()
