"""Named data sets: what the table of rows does not say of them."""

from __future__ import annotations

from typing import Any

import pytest

from corral.data.formats import FORMATS
from corral.data.formats.public_datasets import PUBLIC_DATASETS, find_by_hub_path
from corral.messages import Conversation
from tests.data.formats.rows import GOOD, TURNS, reason

PAIR = GOOD["ultrafeedback-binarized"][2]
WORSE = [TURNS[0], {"role": "assistant", "content": "The moon."}]


@pytest.mark.parametrize("name", PUBLIC_DATASETS)
def test_the_row_tested_has_the_columns_of_the_entry(name: str) -> None:
    assert set(GOOD[name][0]) >= set(PUBLIC_DATASETS[name].columns)


def test_no_two_entries_share_a_hub_id() -> None:
    ids = [hub.casefold() for entry in PUBLIC_DATASETS.values() for hub in entry.hub_ids]
    assert len(ids) == len(set(ids)) == 22
    assert all(
        find_by_hub_path(f"hub:{hub}@0123abc") == name
        for name, entry in PUBLIC_DATASETS.items()
        for hub in entry.hub_ids
    )
    assert find_by_hub_path("hub:someone/else") is None
    assert find_by_hub_path("openai/gsm8k") is None


@pytest.mark.parametrize(
    "row",
    [
        # HuggingFaceH4/ultrafeedback_binarized: the card's dataset_info.
        {
            "prompt": "Which is larger?",
            "prompt_id": "a1",
            "chosen": TURNS,
            "rejected": WORSE,
            "messages": TURNS,
            "score_chosen": 8.5,
            "score_rejected": 7.0,
        },
        # argilla/ultrafeedback-binarized-preferences-cleaned: its data viewer.
        {
            "source": "evol_instruct",
            "prompt": "Which is larger?",
            "chosen": TURNS,
            "chosen-rating": 5.0,
            "chosen-model": "a",
            "rejected": WORSE,
            "rejected-rating": 3.0,
            "rejected-model": "b",
        },
    ],
)
def test_ultrafeedback_is_read_as_each_of_its_publishers_writes_it(row: dict[str, Any]) -> None:
    assert FORMATS["ultrafeedback-binarized"](row) == PAIR


def test_only_calculator_marks_are_removed_from_gsm8k() -> None:
    row = {"question": "?", "answer": "5 < 6 and 2*3=<<2*3=6>>6, 6/2=<<6/2=3.0>>3 << no\n#### 3"}
    record = FORMATS["gsm8k"](row)
    assert isinstance(record, Conversation)
    assert record.messages[1].content == "5 < 6 and 2*3=6, 6/2=3 << no\n#### 3"
    assert reason(FORMATS["gsm8k"], {"question": "?", "answer": "<<1=1>>"}) == "answer is empty"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"context": None}, "context is null: expected an object"),
        ({"context": {"title": ["Ada"]}}, "no `context.sentences`: context has 'title'"),
        ({"context": {"title": ["Ada"], "sentences": []}}, "context has 1 titles and 0 passages"),
        ({"context": {"title": ["Ada"], "sentences": ["x"]}}, "context.sentences[0] is text: expected a list"),
        ({"context": {"title": ["Ada"], "sentences": [[None]]}}, "context.sentences[0] is null: expected text"),
        ({"supporting_facts": {"title": []}}, "context has none of the passages that supporting_facts names"),
        ({"supporting_facts": {"title": "Ada"}}, "supporting_facts.title is text: expected a list"),
    ],
)
def test_a_hotpot_row_without_its_passages_is_refused(changes: dict[str, Any], expected: str) -> None:
    assert reason(FORMATS["hotpot_qa"], GOOD["hotpot_qa"][0] | changes) == expected


def test_a_commonsense_row_of_the_test_split_has_no_answer() -> None:
    assert reason(FORMATS["commonsense_qa"], GOOD["commonsense_qa"][0] | {"answerKey": ""}) == "answerKey is empty"
