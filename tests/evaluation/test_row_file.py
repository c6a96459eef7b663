from __future__ import annotations

from pathlib import Path

from corral.evaluation.row_file import RowFile, RowProducer

ME = RowProducer("tuned", "abc")


def test_a_half_written_last_line_is_cut_off_and_written_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    RowFile(path).add(ME, "a", nll=1.0)
    complete = path.read_bytes()
    path.write_bytes(complete + b'{"variant": "tuned", "id": "b", "nl')
    reopened = RowFile(path)
    assert reopened.rows_of(ME).keys() == {"a"}
    reopened.add(ME, "b", nll=2.0)
    assert path.read_bytes().startswith(complete)
    assert RowFile(path).rows_of(ME).keys() == {"a", "b"}


def test_rows_of_other_settings_belong_to_the_variant_and_not_to_the_origin(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "rows.jsonl")
    file.add(RowProducer("tuned", "old"), "a", nll=1.0)
    assert file.rows_of(ME) == {}
    assert file.rows_of_variant("tuned").keys() == {"a"}


def test_reuse_copies_the_wanted_lines_byte_for_byte_and_none_twice(tmp_path: Path) -> None:
    old = RowFile(tmp_path / "old.jsonl")
    for producer in (ME, RowProducer("tuned", "other"), RowProducer("base", "x")):
        old.add(producer, "a", text="é 東京")
    for id_ in ("b", "not wanted"):
        old.add(ME, id_, text="old")
    old.path.write_bytes(old.path.read_bytes() + b'{"half')
    new = RowFile(tmp_path / "new" / "rows.jsonl")
    new.add(ME, "b", text="new")
    before = new.path.read_bytes()
    for _ in range(2):
        new.reuse_rows(old.path, {ME: {"a", "b"}})
    assert new.path.read_bytes() == before + old.path.read_bytes().splitlines(keepends=True)[0]
    assert RowFile(new.path).rows_of(ME).keys() == {"a", "b"}
    new.reuse_rows(tmp_path / "no such file", {ME: {"a"}})
