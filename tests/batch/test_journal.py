"""The journal and the output it becomes: whole lines, once each, in order, and nobody else's."""

from __future__ import annotations

import json
import resource
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from corral.batch.journal import Journal, Totals, open_journal, record_path
from corral.errors import InputError, StorageError
from tests.batch.work import read

MADE_OF = {"prompts": "a" * 64, "answer": {"max_tokens": 8, "consensus": {"method": "none"}}, "seed": 1}


@contextmanager
def journal(out: Path, **changes: Any) -> Generator[Journal]:
    with open_journal(out, MADE_OF | changes) as found:
        assert isinstance(found, Journal)
        yield found


def row(index: int) -> dict[str, Any]:
    return {"index": index, "answer": f"ü\u2028{index}", "prompt_tokens": 3, "tokens": 2}


def test_rows_that_came_in_any_order_are_written_in_theirs(tmp_path: Path) -> None:
    out = tmp_path / "new" / "a.jsonl"
    with journal(out) as found:
        for index in (2, 0, 1):
            found.add(row(index))
        assert not out.exists()
        figures = found.finish(3)
    assert [json.loads(line) for line in out.read_bytes().split(b"\n")[:-1]] == [row(0), row(1), row(2)]
    assert figures == Totals(3, 0, 9, 6, [])
    assert sorted(path.name for path in out.parent.iterdir()) == ["a.jsonl", "a.jsonl.record.json"]


def test_what_was_kept_is_there_again_and_a_half_written_line_is_not(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    with journal(out) as found:
        found.add(row(1))
        found.add(row(4))
    partial = tmp_path / "a.jsonl.partial"
    whole = partial.read_bytes()
    for rest in (b'{"index": 2, "ans', b'{"index": 2}', b"\0" * 30 + b"\n", b"\xff\n{}\n", b"[2]\n"):
        partial.write_bytes(whole + rest)
        with journal(out) as found:
            assert [index for index in range(6) if index in found] == [1, 4]
            assert found.count == 2
        assert partial.read_bytes() == whole


@pytest.mark.parametrize("head", [b"", b'{"made_of": {"pro', b"\0\0\0\n"])
def test_a_journal_that_was_hardly_begun_is_begun_again(head: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.partial").write_bytes(head)
    with journal(tmp_path / "a.jsonl") as found:
        found.add(row(0))
        found.finish(1)
    assert read(tmp_path / "a.jsonl")[0]["index"] == 0


OTHERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "other prompts": ({"prompts": "b" * 64}, ["other prompts"]),
    "another seed": ({"seed": 2}, ["seed = 1 there, 2 here"]),
    "another setting": (
        {"answer": {"max_tokens": 9, "consensus": {"method": "rouge-l"}}},
        ["answer.max_tokens = 8 there, 9 here", 'answer.consensus.method = "none" there, "rouge-l" here'],
    ),
}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("case", OTHERS)
def test_what_was_made_of_something_else_is_refused_and_left_alone(case: str, finished: bool, tmp_path: Path) -> None:
    changes, expected = OTHERS[case]
    out = tmp_path / "a.jsonl"
    with journal(out) as found:
        found.add(row(0))
        if finished:
            found.finish(1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError) as refused, open_journal(out, MADE_OF | changes):
        pass
    for part in expected:
        assert part in refused.value.what
    assert refused.value.where == str(out if finished else tmp_path / "a.jsonl.partial")
    assert "--out" in str(refused.value.hint)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_is_finished_is_not_done_again(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    with journal(out) as found:
        found.add(row(0))
        figures = found.finish(1)
    with open_journal(out, MADE_OF) as again:
        assert again == figures
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.record.json"]


def test_a_file_of_somebody_else_or_one_that_was_edited_is_not_written_over(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    out.write_text("mine\n")
    with pytest.raises(InputError, match="no output of corral"), open_journal(out, MADE_OF):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    out.unlink()
    with journal(out) as found:
        found.add(row(0))
        found.finish(1)
    out.write_text(out.read_text() + "more\n")
    with pytest.raises(InputError, match="changed after"), open_journal(out, MADE_OF):
        pass
    assert out.read_text().endswith("more\n")


def test_two_do_not_write_one_output(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    with journal(out) as found:
        with pytest.raises(InputError, match="another process"), open_journal(out, MADE_OF):
            pass
        found.add(row(0))
        found.finish(1)
    assert out.exists()


def test_where_every_row_is_bad_nothing_is_written_and_the_first_are_named(tmp_path: Path) -> None:
    with journal(tmp_path / "a.jsonl") as found:
        for index in range(9):
            found.add({"index": index, "error": f"fault {index}"})
        with pytest.raises(InputError, match="all 9 rows are bad") as refused:
            found.finish(9)
    assert "row 4: fault 4" in refused.value.what
    assert "fault 5" not in refused.value.what
    assert not list(tmp_path.iterdir())
    assert not record_path(tmp_path / "a.jsonl").exists()


def test_a_disk_that_refuses_a_row_or_the_output_is_one_error_and_loses_nothing(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with journal(out) as found:
        found.add(row(0))
        size = found.path.stat().st_size
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, before[1]))
            with pytest.raises(StorageError) as full:
                found.add(row(1))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert full.value.where == str(found.path)
    with journal(out) as found:
        assert [0 in found, 1 in found] == [True, False]
        found.add(row(1))
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
            with pytest.raises(StorageError):
                found.finish(2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl.partial"]
    with journal(out) as found:
        assert found.finish(2).rows == 2
