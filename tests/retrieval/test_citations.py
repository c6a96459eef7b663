from __future__ import annotations

import pytest

from corral.retrieval.citations import check_citations
from corral.retrieval.passages import Passage

PASSAGES = [
    Passage("rules.md", "Rules", ("Fees",), "The fee is 40 euros.\nIt is  due on the “first day” of a month.", 0),
    Passage("rules.md", "Rules", ("Leave",), "Employees have 30 days of leave — unless they agree otherwise.", 90),
]


def numbers(answer: str) -> list[tuple[int, bool]]:
    return [(citation.number, citation.shown) for citation in check_citations(answer, PASSAGES).citations]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The fee is due [1].", [(1, True)]),
        ("Both apply [1][2], see also [ 2 ].", [(1, True), (2, True), (2, True)]),
        ("Both apply [1, 2; 9].", [(1, True), (2, True), (9, False)]),
        ("Nothing [0] and [3].", [(0, False), (3, False)]),
        ("As of [2024], see (1), [x], [1-2] and [].", []),
    ],
)
def test_numbers_in_brackets_are_citations_and_only_shown_passages_count(
    answer: str, expected: list[tuple[int, bool]]
) -> None:
    assert numbers(answer) == expected


@pytest.mark.parametrize(
    ("answer", "stands"),
    [
        ('"The fee is 40 euros" [1].', [True]),
        ('"The fee is 40 euros" [2].', [False]),
        ('"The fee is 50 euros" [1].', [False]),
        ("It says: “the FEE is 40   euros. It is due” [2][1].", [True]),
        ('As [1] says, "it is due on the first day", and no more.', [True]),  # quotes within it do not count
        ("As [1] says, «the fee is … due on the» day.", [True]),
        ('"due on the … the fee is" [1]', [False]),  # in another order
        ('"30 days of leave - unless they agree" [2]; "the fee is 40 euros" [1]', [True, True]),
        ('"one two" [1]', []),  # a term rather than a quotation
    ],
)
def test_a_quotation_must_stand_in_a_passage_that_it_cites(answer: str, stands: list[bool]) -> None:
    assert [quotation.stands for quotation in check_citations(answer, PASSAGES).quotations] == stands


def test_a_citation_in_another_line_is_not_of_the_quotation() -> None:
    (quotation,) = check_citations('"The fee is 40 euros"\nThat is all [1].', PASSAGES).quotations
    assert quotation.cites == ()


def test_an_answer_holds_if_it_cites_and_nothing_it_cites_is_wrong() -> None:
    right, wrong, none = (
        check_citations(answer, PASSAGES)
        for answer in ('"The fee is 40 euros" [1]. [1]', "So it is [1] [7].", "So it is.")
    )
    assert (right.hold, wrong.hold, none.hold) == (True, False, False)
    assert wrong.cited == (1,)
    assert right.to_json() == {
        "citations": 2,
        "shown": 2,
        "quotations": 1,
        "stand": 1,
        "cited": [1],
        "hold": True,
    }


@pytest.mark.parametrize(
    "text", ["[" * 300_000, "[1, " * 100_000, '"' * 300_000, '"a b c [1' * 50_000, "“a b c " * 50_000]
)
def test_hostile_answers_are_checked_to_their_end(text: str) -> None:
    checked = check_citations(f"{text}\nThe fee [1].", PASSAGES)
    assert checked.citations[-1].shown
