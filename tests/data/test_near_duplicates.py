from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.data.near_duplicates import RESEMBLANCE, band_hashes, group_near_duplicates, resemblance, shingles
from corral.data.row_store import split_list_column
from corral.data.word_hashes import word_columns
from corral.messages import Conversation, Text
from tests.data.conftest import prose_words, word_hashes


def groups_of(texts: list[str]) -> list[int]:
    found = word_columns(Text(text) for text in texts)
    words, bounds = split_list_column(found["words"])
    words = words.to_numpy()
    rows = [words[a:b] for a, b in pairwise(bounds)]
    equal = np.array([texts.index(text) for text in texts])
    return group_near_duplicates(band_hashes(words, bounds), equal, lambda row: rows[row]).tolist()


@given(st.lists(st.sampled_from("abc"), max_size=30), st.lists(st.sampled_from("abc"), max_size=30))
def test_resemblance_is_the_jaccard_index_of_the_shingle_sets(one: list[str], other: list[str]) -> None:
    def by_definition(text: list[str]) -> set[tuple[str, ...]]:
        n = min(5, len(text))
        return {tuple(text[i : i + n]) for i in range(len(text) - n + 1)} if text else set()

    a, b = by_definition(one), by_definition(other)
    expected = len(a & b) / (len(a | b) or 1)
    assert resemblance(word_hashes(" ".join(one)), word_hashes(" ".join(other))) == pytest.approx(expected)
    assert len(shingles(word_hashes(" ".join(one)))) == len(a)


def test_similar_rows_are_one_group_and_others_are_not() -> None:
    first = prose_words(0)
    changed = [*first[:-2], "other", "end"]
    half = [*first[:30], *prose_words(1, 30)]
    texts = [" ".join(t) for t in (prose_words(2), first, changed, half, prose_words(3), first)]
    texts.append(texts[0].upper() + "!")
    assert resemblance(word_hashes(texts[1]), word_hashes(texts[2])) > 0.9
    assert resemblance(word_hashes(texts[1]), word_hashes(texts[3])) < 0.5
    assert groups_of(texts) == [0, 1, 1, 3, 4, 1, 0]


def test_nearly_all_pairs_well_above_the_threshold_are_found_and_none_below() -> None:
    texts: list[str] = []
    for seed in range(200):
        text = prose_words(seed, 100)
        texts += [" ".join(text), " ".join([*text[:96], "x", "y", "z", str(seed)])]
    found = groups_of(texts)
    assert sum(found[2 * i] == found[2 * i + 1] == 2 * i for i in range(200)) >= 195
    assert all(found[2 * i] == 2 * i for i in range(200))


def test_short_rows_are_compared_as_a_whole_and_rows_without_words_are_never_alike() -> None:
    assert groups_of(["yes", "Yes.", "no", "...", "!!!", "yes no"]) == [0, 0, 2, 3, 4, 5]


def test_near_copies_are_found_among_hundreds_of_rows_of_one_template() -> None:
    """Rows of one template share words with all others; the copy of one of them resembles it more than they do."""
    form = prose_words(1, 60)
    rows = [
        " ".join([*form[:20], *prose_words(i, 12), *form[20:40], *prose_words(-i, 12), *form[40:]]) for i in range(600)
    ]
    copies = [f"{rows[i]} indeed" for i in range(0, 600, 7)]
    assert groups_of([*rows, *copies])[600:] == list(range(0, 600, 7))


def test_near_duplicates_resemble_the_row_that_is_kept() -> None:
    """A chain of rows, each like the one before it, whose ends have nothing in common."""
    text = prose_words(4, 400)
    chain = [" ".join(text[5 * i : 5 * i + 100]) for i in range(40)]
    rows = [Conversation.from_turns(("user", "q"), ("assistant", answer)) for answer in chain]
    found = word_columns(rows)
    words, bounds = split_list_column(found["words"])
    words = words.to_numpy()
    of = [words[a:b] for a, b in pairwise(bounds)]
    signatures = band_hashes(words, bounds)
    groups = group_near_duplicates(signatures, np.arange(len(rows)), lambda row: of[row])
    kept = sorted(set(groups.tolist()))
    assert 2 < len(kept) < len(rows)
    assert all(groups[row] == row for row in kept)
    assert all(resemblance(of[row], of[groups[row]]) >= RESEMBLANCE for row in range(len(rows)))
