from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from corral.data.sources import RawRow, read_rows
from corral.recipe import Source
from tests.data.conftest import Listener
from tests.data.sources.conftest import refusal, written


def read(path: Path) -> tuple[list[RawRow], list[str]]:
    """The rows of a folder, and what reading it reports."""
    listener = Listener()
    return list(read_rows(Source(path=str(path)), listener)), listener.messages


def names(folder: Path, *files: str) -> tuple[list[str], list[str]]:
    """Which of these files are read of a folder, and what is reported."""
    for name in files:
        written(folder / name, json.dumps({"name": name}))
    rows, messages = read(folder)
    return sorted(str((row.value or {})["name"]) for row in rows), messages


@pytest.mark.parametrize(
    "train",
    [
        "train.jsonl",
        "train-00000-of-00001.jsonl",
        "data/train/0.jsonl",
        "my_training.jsonl",
        "a-train/b.jsonl",
        "Train.jsonl",
        "instructions.jsonl",
    ],
)
@pytest.mark.parametrize(
    ("other", "split"),
    [
        ("test.jsonl", "test"),
        ("data/test-00000-of-00001.jsonl", "test"),
        ("my.eval.jsonl", "test"),
        ("testset.jsonl", "test"),
        ("held-out.jsonl", "test"),
        ("evaluation/0.jsonl", "test"),
        ("dev.jsonl", "validation"),
        ("valid/0.jsonl", "validation"),
        ("x_validation 2.jsonl", "validation"),
    ],
)
def test_other_splits_of_a_clone_are_left_out_and_reported(tmp_path: Path, train: str, other: str, split: str) -> None:
    read, messages = names(tmp_path, train, other, "extra.jsonl")
    assert read == sorted([train, "extra.jsonl"])
    assert messages == [f"{tmp_path}: its {split} split is left out: {other} (a glob reads any file)"]


@pytest.mark.parametrize(
    "files", [("test.jsonl", "dev.jsonl"), ("latest.jsonl", "retrain.jsonl", "devices.jsonl", "protest.jsonl")]
)
def test_files_of_held_out_splits_alone_or_of_none_are_read(tmp_path: Path, files: tuple[str, ...]) -> None:
    assert names(tmp_path, *files) == (sorted(files), [])


def test_a_file_or_glob_of_another_split_is_read(tmp_path: Path) -> None:
    names(tmp_path, "train.jsonl", "test.jsonl")
    assert [row.value for row in read(tmp_path / "test.jsonl")[0]] == [{"name": "test.jsonl"}]
    assert len(read(tmp_path / "*.jsonl")[0]) == 2


def test_metadata_and_notes_are_no_rows(tmp_path: Path) -> None:
    for name in ("dataset_info.json", "dataset_infos.json", "state.json", "sub/dataset_dict.json"):
        written(tmp_path / name, "{}")
    written(tmp_path / "rows.json", '[{"a": 1}]')
    assert [row.value for row in read(tmp_path)[0]] == [{"a": 1}]
    for name in ("README.txt", "LICENSE.txt", "one.txt", "licences.txt"):
        written(tmp_path / "texts" / name, name)
    rows, messages = read(tmp_path / "texts")
    assert [row.value for row in rows] == [{"text": "licences.txt"}, {"text": "one.txt"}]
    assert messages == [f"{tmp_path}/texts: left out, as they are no files of rows: LICENSE.txt, README.txt"]


def test_a_spreadsheet_is_refused_with_the_way_to_save_it(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.xlsx", b"PK\x03\x04")
    for error in (refusal(path), refusal(tmp_path), refusal(written(tmp_path / "b" / "rows.csv", b"PK\x03\x04"))):
        assert "CSV UTF-8" in str(error.hint)


ROWS = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(7)]


def test_a_data_set_saved_to_disk_is_read_from_the_files_that_it_names(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "saved", num_shards=2)
    written(tmp_path / "saved" / "cache-0123.arrow", b"junk")
    assert ([row.value for row in read(tmp_path / "saved")[0]], read(tmp_path / "saved")[1]) == (ROWS, [])
    (tmp_path / "saved" / "data-00001-of-00002.arrow").unlink()
    assert "lacks its file data-00001-of-00002.arrow" in refusal(tmp_path / "saved").what


def test_the_train_split_of_saved_splits_is_read_and_named(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "saved")
    rows, messages = read(tmp_path / "saved")
    assert [row.value for row in rows] == ROWS
    assert messages == [f"{tmp_path}/saved: only its train split is read, not test"]
    assert [row.value for row in read(tmp_path / "saved" / "test")[0]] == ROWS[:1]
    datasets.DatasetDict({"dev": data, "test": data}).save_to_disk(tmp_path / "other")
    error = refusal(tmp_path / "other")
    assert error.what == "the data set has no train split: it has dev, test"
    assert f"{tmp_path}/other/dev" in str(error.hint)


@pytest.mark.parametrize("state", ["", "{}", "[]", '{"_data_files": [{"name": "x"}]}'])
def test_a_saved_data_set_without_its_list_of_files_is_refused(tmp_path: Path, state: str) -> None:
    written(tmp_path / "state.json", state)
    written(tmp_path / "data-00000-of-00001.arrow", b"junk")
    assert "not a data set as `save_to_disk` writes it" in refusal(tmp_path).what
