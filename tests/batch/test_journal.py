"""The journal of a batch and the output that is written from it."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from corral.batch.journal import Journal, Totals, open_journal, record_path
from corral.errors import InputError, StorageError
from tests.batch.work import read_rows
from tests.conftest import file_size_limit

IDENTITY = {"prompts": "a" * 64, "answer": {"max_tokens": 8, "consensus": {"method": "none"}}, "seed": 1}


@contextmanager
def journal(out: Path, **changes: Any) -> Generator[Journal]:
    with open_journal(out, IDENTITY | changes) as opened:
        assert isinstance(opened, Journal)
        yield opened


def row(index: int) -> dict[str, Any]:
    return {"index": index, "answer": f"ü\u2028{index}", "prompt_tokens": 3, "tokens": 2}


def test_the_seconds_of_all_calls_are_kept_with_the_rows(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    with journal(out) as opened:
        assert opened.seconds == 0
        opened.add(row(0), 4.0)
    with journal(out) as opened:
        assert opened.seconds == 4.0
        opened.add(row(1), 7.5)
        assert opened.finish(2).seconds == 7.5
    with open_journal(out, IDENTITY) as totals:
        assert isinstance(totals, Totals)
        assert totals.seconds == 7.5


def test_rows_that_finished_in_any_order_are_written_in_order(tmp_path: Path) -> None:
    out = tmp_path / "new" / "a.jsonl"
    with journal(out) as opened:
        for index in (2, 0, 1):
            opened.add(row(index))
        assert not out.exists()
        figures = opened.finish(3)
    assert [json.loads(line) for line in out.read_bytes().split(b"\n")[:-1]] == [row(0), row(1), row(2)]
    assert figures == Totals(3, 0, 9, 6, [])
    assert sorted(path.name for path in out.parent.iterdir()) == ["a.jsonl", "a.jsonl.record.json"]


def test_a_journal_that_is_opened_again_has_its_rows_but_for_one_that_was_half_written(tmp_path: Path) -> None:
    killed = tmp_path / "killed" / "a.jsonl"
    killed.parent.mkdir()
    with journal(tmp_path / "a.jsonl") as opened:
        opened.add(row(1))
        opened.add(row(4))
        for suffix in ("", "-wal"):
            shutil.copy(f"{opened.path}{suffix}", f"{killed}.partial{suffix}")
    with journal(tmp_path / "a.jsonl") as opened:
        assert [index for index in range(6) if index in opened] == [1, 4]
        assert opened.count == 2
    log = Path(f"{killed}.partial-wal")
    log.write_bytes(log.read_bytes()[:-100])
    with journal(killed) as opened:
        assert [index for index in range(6) if index in opened] == [1]
        assert opened.count == 1


def test_another_device_or_version_of_corral_goes_on_with_a_journal_and_keeps_its_output(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    with journal(out, corral="1.0", device="cpu") as opened:
        opened.add(row(0))
    with journal(out, corral="2.0", device="cuda") as opened:
        assert opened.count == 1
        opened.finish(1)
    with open_journal(out, IDENTITY | {"corral": "3.0"}) as totals:
        assert isinstance(totals, Totals)


def test_an_empty_journal_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.partial").touch()
    with journal(tmp_path / "a.jsonl") as opened:
        opened.add(row(0))
        opened.finish(1)
    assert read_rows(tmp_path / "a.jsonl")[0]["index"] == 0


def create_other_database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE other (id)")


OTHER_FILES: dict[str, Callable[[Path], object]] = {
    "JSON lines, as older versions wrote": lambda path: path.write_text('{"made_of": {}}\n{"index": 0}\n'),
    "zeros": lambda path: path.write_bytes(bytes(5000)),
    "another database": create_other_database,
}


@pytest.mark.parametrize("case", OTHER_FILES)
def test_a_file_that_is_not_a_journal_is_refused_and_left_alone(case: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.partial"
    OTHER_FILES[case](path)
    before = path.read_bytes()
    with (
        pytest.raises(InputError, match="not a journal of this version") as refused,
        open_journal(tmp_path / "a.jsonl", IDENTITY),
    ):
        pass
    assert refused.value.where == str(path)
    assert "remove the file" in str(refused.value.hint)
    assert path.read_bytes() == before


OTHER_BATCHES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "other prompts": ({"prompts": "b" * 64}, ["other prompts"]),
    "another seed": ({"seed": 2}, ["seed = 1 there, 2 here"]),
    "another setting": (
        {"answer": {"max_tokens": 9, "consensus": {"method": "rouge-l"}}},
        ["answer.max_tokens = 8 there, 9 here", 'answer.consensus.method = "none" there, "rouge-l" here'],
    ),
}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("case", OTHER_BATCHES)
def test_a_journal_or_output_of_another_batch_is_refused_and_left_alone(
    case: str, finished: bool, tmp_path: Path
) -> None:
    changes, expected = OTHER_BATCHES[case]
    out = tmp_path / "a.jsonl"
    with journal(out) as opened:
        opened.add(row(0))
        if finished:
            opened.finish(1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError) as refused, open_journal(out, IDENTITY | changes):
        pass
    for part in expected:
        assert part in refused.value.what
    assert refused.value.where == str(out if finished else tmp_path / "a.jsonl.partial")
    assert "--out" in str(refused.value.hint)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_finished_output_is_not_written_again(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    with journal(out) as opened:
        opened.add(row(0))
        figures = opened.finish(1)
    with open_journal(out, IDENTITY) as again:
        assert again == figures
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.record.json"]


def test_an_output_that_corral_did_not_write_or_that_was_edited_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    out.write_text("mine\n")
    with pytest.raises(InputError, match="not an output of corral"), open_journal(out, IDENTITY):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    out.unlink()
    with journal(out) as opened:
        opened.add(row(0))
        opened.finish(1)
    out.write_text(out.read_text() + "more\n")
    with pytest.raises(InputError, match="changed after"), open_journal(out, IDENTITY):
        pass
    assert out.read_text().endswith("more\n")


def test_an_output_that_is_being_written_cannot_be_opened_again(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    with journal(out) as opened:
        with pytest.raises(InputError, match="another process"), open_journal(out, IDENTITY):
            pass
        opened.add(row(0))
        opened.finish(1)
    assert out.exists()


def test_if_every_row_is_bad_nothing_is_written_and_the_first_faults_are_named(tmp_path: Path) -> None:
    with journal(tmp_path / "a.jsonl") as opened:
        for index in range(9):
            opened.add({"index": index, "error": f"fault {index}"})
        with pytest.raises(InputError, match="all 9 rows are bad") as refused:
            opened.finish(9)
    assert "row 4: fault 4" in refused.value.what
    assert "fault 5" not in refused.value.what
    assert not list(tmp_path.iterdir())
    assert not record_path(tmp_path / "a.jsonl").exists()


def test_a_disk_that_refuses_a_row_or_the_output_is_a_storage_error_and_loses_nothing(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    with journal(out) as opened:
        opened.add(row(0))
        size = Path(f"{opened.path}-wal").stat().st_size
        with file_size_limit(size + 10), pytest.raises(StorageError) as full:
            opened.add(row(1))
    assert full.value.where == str(opened.path)
    with journal(out) as opened:
        assert [0 in opened, 1 in opened] == [True, False]
        opened.add(row(1))
        with file_size_limit(100), pytest.raises(StorageError):
            opened.finish(2)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl.partial"]
    with journal(out) as opened:
        assert opened.finish(2).rows == 2
