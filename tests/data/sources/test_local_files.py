from __future__ import annotations

import gzip
import os
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.data.sources import hash_source, read_rows
from corral.errors import AssetError, DataError, MissingExtraError, RecipeError
from corral.recipe import Source, parse
from corral.storage import hashes
from tests.data.conftest import Listener
from tests.data.sources.conftest import refusal, rows_of, values_of, written


def packed(content: bytes, ending: str) -> bytes:
    if ending == ".gz":
        return gzip.compress(content)
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def parquet(text: str) -> bytes:
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"t": [text]}), sink)
    return sink.getvalue().to_pybytes()


def arrow(text: str) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"t": [text]})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


CONTENT = {
    ".jsonl": b'{"t": "one"}\n',
    ".json": b'[{"t": "one"}]',
    ".csv": b"t\none\n",
    ".tsv": b"t\none\n",
    ".txt": b"one",
    ".parquet": parquet("one"),
    ".arrow": arrow("one"),
}


@pytest.mark.parametrize("kind", CONTENT)
@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_each_kind_is_read_plain_and_compressed(tmp_path: Path, kind: str, ending: str) -> None:
    content = packed(CONTENT[kind], ending) if ending else CONTENT[kind]
    assert values_of(written(tmp_path / f"a{kind}{ending}", content)) == [
        {"text": "one"} if kind == ".txt" else {"t": "one"}
    ]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_compressed_file_cut_short_raises_an_error_with_the_rows_read(tmp_path: Path, ending: str) -> None:
    content = packed(b"".join(b'{"a": "%d %s"}\n' % (i, os.urandom(20).hex().encode()) for i in range(9000)), ending)
    error = refusal(written(tmp_path / f"a.jsonl{ending}", content[: len(content) // 2]))
    assert "damaged or cut short: " in error.what
    count = int(error.what.partition("ended after ")[2].partition(" rows")[0].replace(",", ""))
    assert 2000 < count < 5000  # zstd gives whole blocks
    assert error.where == str(tmp_path / f"a.jsonl{ending}")
    assert "damaged" in refusal(written(tmp_path / f"b.jsonl{ending}", b"no such thing")).what


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_concatenated_compressed_parts_are_one_file(tmp_path: Path, ending: str) -> None:
    path = written(tmp_path / f"a.jsonl{ending}", packed(b'{"a": 1}\n', ending) + packed(b'{"a": 2}\n', ending))
    assert values_of(path) == [{"a": 1}, {"a": 2}]


def test_the_files_of_a_folder_are_read_by_name_with_numbers_and_locations(tmp_path: Path) -> None:
    written(tmp_path / "b.jsonl", '\n{"a": 3}\n\n{"a": NaN}\n')
    written(tmp_path / "a" / "x.jsonl.gz", gzip.compress(b'{"a": 1}\n{"a": 2}\n'))
    for hidden in (".cache/y.jsonl", "_SUCCESS", ".c.jsonl"):
        written(tmp_path / hidden, "{}")
    rows = rows_of(tmp_path)
    assert [(row.index, row.value, row.location) for row in rows] == [
        (1, {"a": 1}, "a/x.jsonl.gz, line 1"),
        (2, {"a": 2}, "a/x.jsonl.gz, line 2"),
        (2, {"a": 3}, "b.jsonl, line 2"),
        (4, None, "b.jsonl, line 4"),
    ]
    assert rows[3].fault == "b.jsonl, line 4: NaN is not a JSON number"


def test_a_file_that_a_glob_matches_in_two_ways_is_read_once(tmp_path: Path) -> None:
    written(tmp_path / "a" / "b" / "c.jsonl", "{}\n{}")
    assert len(values_of(tmp_path / "**" / "**" / "*.jsonl")) == 2


def test_a_name_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    for name in (b"fragen-\xfc.jsonl", b"b.jsonl"):
        (Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))).write_text("{}")
    error = refusal(tmp_path)
    assert "not UTF-8 text: 'fragen-" in error.what
    assert error.hint == "rename it"


def test_a_file_of_rows_may_begin_with_an_underscore_and_a_folder_that_does_is_some_programs_own(
    tmp_path: Path,
) -> None:
    written(tmp_path / "_faq.jsonl", '{"a": 1}')
    written(tmp_path / "_delta_log" / "0.json", '{"a": 2}')
    assert values_of(tmp_path) == [{"a": 1}]


def test_a_glob_selects_matching_files_and_a_file_with_a_globs_name_is_itself(tmp_path: Path) -> None:
    for name in ("a-1.jsonl", "a-2.jsonl", "b-1.jsonl", "sub/a-3.jsonl"):
        written(tmp_path / name, f'{{"n": "{name}"}}')
    assert values_of(tmp_path / "a-*.jsonl") == [{"n": "a-1.jsonl"}, {"n": "a-2.jsonl"}]
    assert len(values_of(tmp_path / "**" / "a-?.jsonl")) == 3
    assert values_of(written(tmp_path / "a-[12].jsonl", "{}")) == [{}]
    assert "no file matches" in refusal(tmp_path / "c-*.jsonl").what
    assert "a-1.jsonl" in str(refusal(tmp_path / "c-*.jsonl").hint)
    assert "no folder" in str(refusal(tmp_path / "nowhere" / "*.jsonl").hint)


def test_other_files_in_a_folder_are_reported_and_several_kinds_are_refused(tmp_path: Path) -> None:
    listener = Listener()
    written(tmp_path / "README.md", "x")
    assert "no file that can be read: it holds README.md" in refusal(tmp_path).what
    written(tmp_path / "a.jsonl", "{}")
    assert len(list(read_rows(Source(path=str(tmp_path)), listener))) == 1
    assert listener.messages == [f"{tmp_path}: left out, as they are no files of rows: README.md"]
    written(tmp_path / "a.csv", "a\n1")
    error = refusal(tmp_path)
    assert "several kinds: .csv, .jsonl" in error.what
    assert f"{tmp_path}/*.csv" in str(error.hint)
    assert "'.md' is no kind" in refusal(tmp_path / "*").what


@pytest.mark.parametrize(
    ("kind", "blank", "what"),
    [
        (".jsonl", "", "the file is empty"),
        (".jsonl", "\n\n", "the file holds no rows"),
        (".json", " ", "the file holds no rows"),
        (".json", "[]", "the file holds no rows"),
        (".csv", "t\n", "the file holds no rows"),
        (".parquet", "", "the file is empty"),
    ],
)
def test_an_empty_file_among_others_is_reported_and_skipped(tmp_path: Path, kind: str, blank: str, what: str) -> None:
    listener = Listener()
    written(tmp_path / f"a{kind}", CONTENT[kind])
    written(tmp_path / f"c{kind}", CONTENT[kind])
    path = written(tmp_path / f"b{kind}", blank)
    rows = list(read_rows(Source(path=str(tmp_path)), listener))
    first = 2 if kind == ".csv" else 1  # in a spreadsheet, the header is row 1
    assert [(row.file, row.index, row.value) for row in rows] == [(f"{n}{kind}", first, {"t": "one"}) for n in "ac"]
    assert listener.messages == [f"{path}: {what}"]
    for name in "ac":
        (tmp_path / f"{name}{kind}").write_bytes(path.read_bytes())
    assert refusal(tmp_path).what in ("all 3 files are empty", "none of the 3 files holds a row")


@pytest.mark.parametrize("kind", CONTENT)
@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_compressed_file_without_the_extension_is_read(tmp_path: Path, kind: str, ending: str) -> None:
    path = written(tmp_path / f"a{kind}", packed(CONTENT[kind], ending))
    assert values_of(path) == values_of(written(tmp_path / f"b{kind}", CONTENT[kind]))


def test_a_file_compressed_twice_is_reported_as_such_and_not_as_utf_16(tmp_path: Path) -> None:
    twice = gzip.compress(gzip.compress(CONTENT[".jsonl"]))
    assert "packed twice" in refusal(written(tmp_path / "a.jsonl.gz", twice)).what


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", "", "the file is empty"),
        ("a.jsonl", "\n  \n\n", "holds no rows"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "holds no rows"),
        ("a.xlsx", b"PK", "'.xlsx' is no kind of file"),
        ("rows", b"{}", "'a name without extension' is no kind of file"),
        ("a.jsonl.bz2", b"BZh", "'.bz2' is no kind of file"),
    ],
)
def test_an_unusable_file_is_refused_with_what_where_and_hint(
    tmp_path: Path, name: str, content: str | bytes, says: str
) -> None:
    error = refusal(written(tmp_path / name, content))
    assert says in error.what
    assert error.where == str(tmp_path / name)


def test_a_missing_file_error_suggests_the_nearest_name(tmp_path: Path) -> None:
    written(tmp_path / "questions.jsonl", "{}")
    assert refusal(tmp_path / "question.jsonl").hint == "did you mean 'questions.jsonl'?"
    assert "there are questions.jsonl" in str(refusal(tmp_path / "zzz.jsonl").hint)
    assert "no folder" in str(refusal(tmp_path / "nowhere" / "a.jsonl").hint)
    assert "the folder is empty" in refusal((tmp_path / "new").mkdir() or tmp_path / "new").what


def test_the_hash_depends_on_names_below_the_source_and_content_not_on_the_path(tmp_path: Path) -> None:
    def of(path: Path) -> str:
        return hash_source(Source(path=str(path)))

    one, two = (written(tmp_path / name, "{}") for name in ("x/a.jsonl", "y/b.jsonl"))
    assert of(one) == of(two) == of(one.parent)
    assert of(written(tmp_path / "y" / "b.json", "{}")) != of(two), "another kind reads otherwise"
    folders = [tmp_path / "p", tmp_path / "q"]
    for folder in folders:
        written(folder / "a.jsonl", '{"a": 1}')
        written(folder / "b.jsonl", '{"a": 2}')
    assert of(folders[0]) == of(folders[1]) == of(folders[1] / "*.jsonl")
    (folders[0] / "b.jsonl").rename(folders[0] / "c.jsonl")
    assert of(folders[0]) != of(folders[1])
    before = of(two)
    two.write_text("[]")  # the same size, within the same tick of the clock
    assert of(two) != before


def test_s3_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(MissingExtraError) as caught:
        read_rows(Source(path="s3://bucket/a.jsonl"))
    assert "corral[s3]" in str(caught.value.hint)


def test_a_recipe_keeps_addresses_and_refuses_settings_that_do_not_fit_the_source() -> None:
    text = 'name = "x"\n[model]\nbase = "asset:a"\n[[train]]\n[[data.sources]]\npath = "{}"\n'
    paths = ["s3://bucket/rows/*.jsonl", "hub:owner/name@main", "asset:wikibooks-recipes", "rows/*.csv.gz"]
    read = [parse(text.format(path), where="x", base=Path("/data")).data.sources[0].path for path in paths]
    assert read == [*paths[:3], "/data/rows/*.csv.gz"]
    parse(text.format("hub:owner/name") + 'config = "main"\nsplit = "test"\n', where="x")
    parse(text.format("hub:owner/name") + 'data_dir = "a"\ndata_files = ["a/*.csv"]\n', where="x")
    parse(text.format("hub:owner/name") + 'data_files = "a/*.csv"\nencoding = "cp1252"\ndelimiter = "\\t"\n', where="x")
    for setting, what in (
        ('split = "test"', "choose from a data set on the hub"),
        ('data_dir = "a"', "name the subfolder or a glob in `path`"),
        ('data_files = "a"', "name the subfolder or a glob in `path`"),
        *((f'encoding = "{name}"', f"decodes no files in '{name}'") for name in ("windows", "hex", "idna", "punycode")),
        ('delimiter = ", "', "at most 1 character"),
        ("delimiter = '\"'", "cannot stand between cells"),
    ):
        with pytest.raises(RecipeError, match=what):
            parse(text.format("rows.csv") + f"{setting}\n", where="x")


def test_an_asset_that_is_unknown_or_holds_no_rows_is_refused() -> None:
    with pytest.raises(AssetError, match="no asset 'wikibook-recipes'"):
        list(read_rows(Source(path="asset:wikibook-recipes")))
    with pytest.raises(DataError, match="'smollm2-135m-instruct' is no data set") as caught:
        list(read_rows(Source(path="asset:smollm2-135m-instruct")))
    assert "wikibooks-recipes" in str(caught.value.hint)


def test_the_wikibooks_asset_has_a_row_for_each_recipe() -> None:
    rows = list(read_rows(Source(path="asset:wikibooks-recipes")))
    assert len(rows) == 3129
    assert [row.index for row in rows[:3]] == [1, 2, 3]
    assert all(row.value is not None and {"title", "ingredients", "steps"} <= row.value.keys() for row in rows)
    assert len(hash_source(Source(path="asset:wikibooks-recipes"))) == 64


@settings(deadline=None, max_examples=300)
@given(
    name=st.sampled_from([f"a{kind}{ending}" for kind in CONTENT for ending in ("", ".gz", ".zst")]),
    junk=st.binary(min_size=1, max_size=60),
    at=st.floats(0, 1),
    replace=st.booleans(),
)
def test_any_bytes_give_rows_faults_or_a_data_error_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, name: str, junk: bytes, at: float, replace: bool
) -> None:
    kind = f".{name.split('.')[1]}"
    content = CONTENT[kind]
    place = int(at * len(content))
    content = junk if replace else content[:place] + junk + content[place + len(junk) :]
    if not name.endswith(kind) and not replace:
        content = packed(content, f".{name.split('.')[2]}")
    path = written(tmp_path_factory.getbasetemp() / "any" / name, content)
    try:
        rows = rows_of(path)
    except DataError as error:
        refused, rows = error, []
    else:
        refused = None
    assert bool(rows) != bool(refused)
    assert refused is None or (refused.where == str(path) and refused.hint)
    assert all((row.value is None) == (row.fault is not None) == (row.reason is not None) for row in rows)


def test_the_hashes_of_a_folder_are_read_and_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORRAL_CACHE", str(tmp_path / "cache"))
    long_ago = time.time() - 3600
    for i in range(20):
        path = written(tmp_path / "rows" / f"{i % 2}" / f"{i}.jsonl", f'{{"a": {i}}}')
        os.utime(path, (long_ago, long_ago))
    calls: list[Path] = []
    monkeypatch.setattr(hashes, "write_json", lambda path, value: calls.append(path))
    hash_source(Source(path=str(tmp_path / "rows")))
    assert len(calls) == 2, "one for each folder, whatever the number of files"
