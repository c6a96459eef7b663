"""Passages keep to their section and limit, and nothing of a document is lost."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.retrieval.documents import Document, DocumentBuilder, table_text
from corral.retrieval.splitting import split_document


def count_tokens(text: str) -> int:
    """As many as words of at most four characters, and signs."""
    return len(re.findall(r"\w{1,4}|[^\w\s]", text))


def make(*blocks: tuple[str, str], kind: str = "text") -> Document:
    builder = DocumentBuilder()
    for heading, text in blocks:
        builder.heading(2, heading)
        builder.add(text, "table" if kind == "table" else "text")
    return builder.build("a.md", "0" * 64)


TEXTS = st.lists(
    st.tuples(
        st.sampled_from(["", "A", "B"]),
        st.lists(st.sampled_from([*"abc .!?\n。é🙂|-", "word ", "A sentence. ", "x" * 300]), max_size=60).map("".join),
    ),
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.integers(32, 80), st.integers(0, 16))
def test_passages_cover_the_text_in_order_within_the_limit(
    blocks: list[tuple[str, str]], limit: int, overlap: int
) -> None:
    document = make(*blocks)
    covered = 0
    for passage in split_document(document, count_tokens, tokens=(limit // 2, limit), overlap=overlap):
        assert document.text[passage.start :][: len(passage.text)] == passage.text
        assert count_tokens(passage.text) <= limit
        assert not document.text[covered : passage.start].strip()
        assert passage.start + len(passage.text) > covered
        covered = passage.start + len(passage.text)
    assert not document.text[covered:].strip()


def test_a_passage_never_crosses_a_heading_and_a_short_section_is_a_short_passage() -> None:
    passages = list(split_document(make(("A", "One."), ("B", "Two.")), count_tokens))
    assert [(passage.headings, passage.text) for passage in passages] == [(("A",), "One."), (("B",), "Two.")]


def test_passages_end_with_a_sentence_and_overlap_by_whole_ones() -> None:
    text = " ".join(f"Here is the sentence number {i}." for i in range(40))
    passages = list(split_document(make(("A", text)), count_tokens, tokens=(32, 64), overlap=20))
    assert len(passages) > 3
    assert all(passage.text.startswith("Here") and passage.text.endswith(".") for passage in passages)
    for before, after in itertools.pairwise(passages):
        assert after.start < before.start + len(before.text)


def test_a_long_table_is_split_by_rows_and_its_head_is_repeated() -> None:
    table = table_text([["kind", "days"], *[[f"row {i}", str(i)] for i in range(60)]])
    document = make(("A", table), kind="table")
    passages = list(split_document(document, count_tokens, tokens=(32, 64)))
    head = "| kind | days |\n| --- | --- |\n"
    assert len(passages) > 3
    assert all(passage.text.startswith(head) for passage in passages)
    assert all(count_tokens(passage.text) <= 64 for passage in passages)
    rows = [line for passage in passages for line in passage.text.removeprefix(head).split("\n")]
    assert rows == table.split("\n")[2:]
    assert document.text[passages[1].start :].startswith(passages[1].text.removeprefix(head))


def test_a_text_without_a_blank_is_read_only_a_few_times() -> None:
    text = "x" * 200_000
    counted = 0

    def count(part: str) -> int:
        nonlocal counted
        counted += len(part)
        return count_tokens(part)

    passages = list(split_document(make(("A", text)), count))
    assert "".join(passage.text for passage in passages) == text
    assert counted < 8 * len(text)


def test_numbers_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="passages of 64 to 32 tokens"):
        list(split_document(make(("A", "x")), count_tokens, tokens=(64, 32)))
