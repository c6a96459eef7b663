from __future__ import annotations

import itertools
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.metrics import rouge
from corral.metrics.rouge import Rouge, ascii_words, has_hidden_words, rouge_signature, unicode_words


def test_rouge_counts_repeated_words_as_often_as_both_texts_have_them() -> None:
    scores = Rouge().score("a a a b", "a a c")
    # two of 3 and of 4 single words, one of 2 and of 3 pairs, a common subsequence of two
    assert scores == pytest.approx((4 / 7, 2 / 5, 4 / 7))


def test_rouge_l_keeps_the_order_that_rouge_1_ignores() -> None:
    scores = Rouge().score("first second third fourth", "fourth third second first")
    assert scores == (1.0, 0.0, 0.25)


def test_the_stemmer_joins_forms_of_a_word_and_leaves_short_words_alone() -> None:
    assert Rouge(stemmer=True).score("running", "runs").rouge1 == 1.0
    assert Rouge(stemmer=False).score("running", "runs").rouge1 == 0.0
    assert Rouge(stemmer=True).score("was", "wa").rouge1 == 0.0


@pytest.mark.parametrize(
    ("reference", "candidate"), [("", ""), ("word", ""), ("", "word"), ("!?", "!?"), ("東京", "東京")]
)
def test_a_side_without_words_scores_zero(reference: str, candidate: str) -> None:
    assert Rouge().score(reference, candidate) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Привет, мир!", ["привет", "мир"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
        ("مرحبا بالعالم", ["مرحبا", "بالعالم"]),
        ("안녕 세상", ["안녕", "세상"]),
        ("我喜欢吃", ["我", "喜", "欢", "吃"]),
        ("ラーメン2杯", ["ラ", "ー", "メ", "ン", "2", "杯"]),
        ("ไก่", ["ไ", "ก่"]),
        ("STRASSE Straße ﬁne", ["strasse", "strasse", "fine"]),
        ("caf\u00e9 cafe\u0301", ["café", "café"]),
        ("don't a_b １２ 😀", ["don", "t", "a", "b", "12"]),
    ],
)
def test_unicode_words_are_words_of_any_script_and_characters_where_there_are_no_spaces(
    text: str, words: list[str]
) -> None:
    assert unicode_words(text) == words


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(max_codepoint=127), max_size=60))
def test_on_ascii_text_unicode_words_are_ascii_words(text: str) -> None:
    assert unicode_words(text) == ascii_words(text)


def test_unicode_rouge_scores_what_ascii_rouge_cannot_see() -> None:
    assert Rouge(unicode=True).score("我喜欢吃饭", "我喜欢喝水").rouge1 == pytest.approx(0.6)
    assert Rouge(unicode=True).score("любовь", "любви").rouge1 == 0.0


def test_the_english_stemmer_leaves_words_with_other_letters_alone() -> None:
    rouge = Rouge(stemmer=True, unicode=True)
    assert rouge.score("cafés", "café").rouge1 == 0.0
    assert rouge.score("houses", "house").rouge1 == 1.0


def test_score_pairs_equals_score_row_by_row_and_refuses_lists_of_different_length() -> None:
    rouge = Rouge()
    references, candidates = ["a b c", "", "one two"], ["a c", "x", "one two"]
    expected = [rouge.score(*pair) for pair in zip(references, candidates, strict=True)]
    assert rouge.score_pairs(references, candidates).tolist() == [list(scores) for scores in expected]
    assert rouge.score_pairs([], []).shape == (0, 3)
    with pytest.raises(ValueError):
        rouge.score_pairs(references, candidates[:2])


def test_scores_do_not_change_when_the_vocabulary_is_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    texts = [" ".join(f"w{rng.randrange(900)}" for _ in range(30)) for _ in range(40)]
    unlimited = Rouge()
    expected = [unlimited.score(a, b) for a in texts for b in texts[:5]]
    monkeypatch.setattr(rouge, "VOCABULARY_LIMIT", 20)
    limited = Rouge()
    assert [limited.score(a, b) for a in texts for b in texts[:5]] == expected
    # Numbers start from 0 again, so nothing of the old vocabulary is kept.
    assert max(limited.encode(["words never seen"])[0]) < 3


def test_one_rouge_serves_several_threads() -> None:
    rng = random.Random(0)
    pairs = [tuple(" ".join(f"w{rng.randrange(500)}" for _ in range(40)) for _ in range(2)) for _ in range(400)]
    alone = Rouge()
    expected = [alone.score(*pair) for pair in pairs]
    shared = Rouge()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda pair: shared.score(*pair), pairs)) == expected


def test_pairwise_rouge_l_is_symmetric_and_one_with_itself() -> None:
    matrix = Rouge().pairwise_rouge_l(["the cat sat", "", "the cat ran off", "a dog"])
    assert np.array_equal(matrix, matrix.T)
    assert np.diag(matrix).tolist() == [1.0, 0.0, 1.0, 1.0]
    assert matrix[0, 2] == pytest.approx(4 / 7)
    assert Rouge().pairwise_rouge_l([]).shape == (0, 0)


def test_pairwise_rouge_l_is_that_of_each_pair_also_of_texts_cut_to_their_first_words() -> None:
    texts = [" ".join(random.Random(seed).choices("abcd", k=40 + seed)) for seed in range(5)] + ["", "a"]
    rouge = Rouge()
    for words in (None, 20):
        matrix = rouge.pairwise_rouge_l(texts, words)
        cut = [" ".join(text.split()[:words]) for text in texts]
        for i, j in itertools.combinations(range(len(texts)), 2):
            assert matrix[i, j] == matrix[j, i] == rouge.score(cut[i], cut[j]).rougeL


def test_the_signature_says_how_many_rows_were_split_otherwise_than_by_rouge_score() -> None:
    assert rouge_signature(0, 40).endswith("words:ascii")
    assert rouge_signature(40, 40).endswith("words:unicode")
    assert rouge_signature(3, 40).endswith("words:ascii, unicode in 3 of 40 rows")


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("plain words, 2 of them", False),
        ("a café for the naïve", False),
        ("", False),
        ("🙂 !?", False),
        ("я ем", True),
        ("東京 2020", True),
        ("the angle α", True),
    ],
)
def test_words_without_a_latin_letter_or_digit_are_those_that_rouge_score_does_not_see(text: str, hidden: bool) -> None:
    assert has_hidden_words(text) == hidden
    # Words of any script are taken where some would be hidden, and only there: elsewhere the scores are rouge-score's.
    either, usual = Rouge(unicode=None), Rouge(unicode=hidden)
    for candidate in (text, "a cafe", "東京", "naïve"):
        assert either.score(text, candidate) == usual.score(text, candidate)
