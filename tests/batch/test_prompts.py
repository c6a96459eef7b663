"""Rows read as prompts, and why some cannot be."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from corral.batch.prompts import Prompt, PromptFile
from corral.errors import DataError
from corral.messages import Conversation
from corral.progress import Progress

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hi?"}
ASSISTANT = {"role": "assistant", "content": "Hello."}


def prompts(path: Path, *rows: Any) -> list[Prompt]:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return list(PromptFile(str(path), Progress()))


def test_a_row_has_a_prompt_or_messages(tmp_path: Path) -> None:
    every = prompts(
        tmp_path / "p.jsonl",
        {"prompt": "Hi?"},
        "",
        {"messages": [SYSTEM, USER, ASSISTANT, USER], "prompt": None},
        {"prompt": '[{"role": "user", "content": "Hi?"}]', "topic": 3},
    )
    assert [prompt.index for prompt in every] == [0, 1, 2]
    assert [prompt.conversation for prompt in every] == [
        Conversation.from_turns(("user", "Hi?")),
        Conversation.from_turns(("system", "Be brief."), ("user", "Hi?"), ("assistant", "Hello."), ("user", "Hi?")),
        Conversation.from_turns(("user", '[{"role": "user", "content": "Hi?"}]')),
    ]
    assert not any(prompt.fault or prompt.id_field for prompt in every)


@pytest.mark.parametrize("value", ["a", "", "ü東", 0, 7, -1.5, True, None])
def test_any_scalar_is_an_id_and_is_kept(value: Any, tmp_path: Path) -> None:
    (only,) = prompts(tmp_path / "p.jsonl", {"prompt": "Hi?", "id": value})
    assert only.id_field == {"id": value}
    assert only.error_row("no") == {"index": 0, "id": value, "error": "no"}


BAD: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "not valid JSON"),
    "no object": ("[1]", "a list"),
    "a number that is none": ('{"prompt": "a", "id": NaN}', "NaN"),
    "nothing asked": ({"text": "Hi?"}, "no `prompt`"),
    "an empty prompt": ({"prompt": " "}, "prompt is empty"),
    "no text": ({"prompt": 3}, "prompt is a number"),
    "a prompt and messages": ({"prompt": "Hi?", "messages": [USER]}, "both"),
    "no messages": ({"messages": []}, "empty list"),
    "an unknown role": ({"messages": [{"role": "narrator", "content": "x"}]}, "narrator"),
    "the assistant last": ({"messages": [USER, ASSISTANT]}, "last must be from the user"),
    "two in a row": ({"messages": [USER, USER]}, "both from the user"),
    "the system last": ({"messages": [USER, SYSTEM]}, "last must be from the user"),
    "an id that is a list": ({"prompt": "Hi?", "id": [1]}, "id is a list"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_row_without_a_usable_prompt_has_a_fault_that_names_its_line(case: str, tmp_path: Path) -> None:
    row, reason = BAD[case]
    first, bad, last = prompts(tmp_path / "p.jsonl", {"prompt": "a"}, row, {"prompt": "b"})
    assert bad.conversation is None
    assert bad.fault is not None
    assert reason in bad.fault
    assert "line 2" in bad.fault
    assert first.fault is last.fault is None
    assert (first.index, last.index) == (0, 2)


def test_the_id_of_a_bad_row_is_kept(tmp_path: Path) -> None:
    (only,) = prompts(tmp_path / "p.jsonl", {"prompt": "", "id": 9})
    assert only.id_field == {"id": 9}


def test_a_survey_counts_rows_and_names_each_unknown_key_once(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "topic": 1, "id": 0}, *[{"prompt": ""}] * 5, "x", {"prompt": "b", "topic": 2, "level": 3}]
    prompts(tmp_path / "p.jsonl", *rows)
    survey = PromptFile(str(tmp_path / "p.jsonl"), Progress()).survey()
    assert (survey.rows, survey.bad, list(survey.unknown_keys)) == (8, 6, ["topic", "level"])
    assert survey.faults == [f"line {number}: prompt is empty" for number in range(2, 7)]


def test_compressed_files_and_tables_are_read(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "p.jsonl.gz", "wt") as file:
        file.write('{"prompt": "Hi?"}\n')
    (tmp_path / "p.csv").write_text("id,prompt\n1,Hi?\n")
    for name in ("p.jsonl.gz", "p.csv"):
        (only,) = PromptFile(str(tmp_path / name), Progress())
        assert only.conversation == Conversation.from_turns(("user", "Hi?"))


def test_a_file_that_is_cut_short_is_an_error_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "Hi?"}\n' * 50_000)[:-50])
    with pytest.raises(DataError, match="damaged or cut short"):
        PromptFile(str(path), Progress()).survey()
