"""Chooses the files with rows among those of a folder or S3 prefix.

Files of a test or validation split are left out where others remain, as in a data set cloned from a hub; the split is read
from the names of files and folders, as the `datasets` library does. Of a folder that `datasets` wrote with `save_to_disk`, the
files that it names are chosen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from corral.data.sources.files import Say, kind_hint, parse_kind
from corral.errors import DataError

_METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
_NOTES = re.compile(r"(readme|licen[cs]e|notice)\.txt", re.IGNORECASE)
_SPLITS = {
    "train": "train|training",
    "validation": "validation|valid|dev|val",
    "test": "test|testing|testset|eval|evaluation|hold-?out|held-?out",
}
_SPLIT_WORDS = {split: re.compile(rf"(?<![^-._ 0-9])({words})(?![^-._ 0-9])", re.I) for split, words in _SPLITS.items()}


def select_row_files(names: list[str], where: str, say: Say, read: Callable[[str], bytes]) -> list[str]:
    """The file names below a folder that hold rows, sorted. Hidden files are ignored; others that are left out are reported.

    Args:
        names: of all files below the folder.
        where: the folder, for messages.
        say: reports what is left out.
        read: returns the content of one of the files.

    Raises DataError if there are none, or of several kinds, as the same rows in two kinds would count twice.
    """
    if "dataset_dict.json" in names or ("state.json" in names and any(name.endswith(".arrow") for name in names)):
        return _saved_to_disk(names, where, say, read)
    visible = sorted(name for name in names if not _is_hidden(name))
    kinds = {name: kind[0] for name in visible if _may_hold_rows(name) and (kind := parse_kind(name))}
    if others := [name for name in visible if name not in kinds]:
        if not kinds:
            raise DataError(
                f"the folder has no file that can be read: it holds {_list_some(others)}",
                where=where,
                hint=kind_hint(others),
            )
        say(f"{where}: left out, as they are no files of rows: {_list_some(others)}")
    elif not kinds:
        raise DataError("the folder is empty", where=where, hint="write files with rows into it")
    chosen = _choose_train_split(list(kinds), where, say)
    if len(distinct := sorted({kinds[name] for name in chosen})) > 1:
        raise DataError(
            f"the folder holds files of several kinds: {', '.join(distinct)}",
            where=where,
            hint=f"choose some with a glob: {where.rstrip('/')}/*{distinct[0]}",
        )
    return chosen


def _is_hidden(name: str) -> bool:
    """Whether a name, or a folder's above it, begins with a dot; a folder, or a file that holds no rows, with `_` as programs
    mark their own."""
    *folders, base = name.split("/")
    return (
        base.startswith(".")
        or any(f.startswith((".", "_")) for f in folders)
        or (base[0] == "_" and not parse_kind(base))
    )


def _may_hold_rows(name: str) -> bool:
    base = name.rpartition("/")[2]
    is_cache = base.startswith("cache-") and base.endswith(".arrow")  # what `datasets` keeps of a computation
    return base not in _METADATA and not _NOTES.fullmatch(base) and not is_cache


def _choose_train_split(names: list[str], where: str, say: Say) -> list[str]:
    """The names without those of the validation and test splits, if others remain."""
    by_split: dict[str, list[str]] = {}
    for name in names:
        by_split.setdefault(_find_split(name), []).append(name)
    if by_split.keys() <= {"validation", "test"}:
        return names
    for split in ("validation", "test"):
        if files := by_split.get(split):
            say(f"{where}: its {split} split is left out: {_list_some(files)} (a glob reads any file)")
    return [name for name in names if _find_split(name) in ("train", "")]


def _find_split(name: str) -> str:
    """The split that the name of a file, or else the nearest folder, tells; empty if none does."""
    for part in reversed(name.split("/")):
        for split, words in _SPLIT_WORDS.items():
            if words.search(part):
                return split
    return ""


def _saved_to_disk(names: list[str], where: str, say: Say, read: Callable[[str], bytes]) -> list[str]:
    """The Arrow files of a folder written by `save_to_disk`: those of the train split, if it has splits."""
    folder = ""
    try:
        if "dataset_dict.json" in names:
            splits: list[str] = json.loads(read("dataset_dict.json"))["splits"]
            if "train" not in splits:
                raise DataError(
                    f"the data set has no train split: it has {', '.join(splits)}",
                    where=where,
                    hint=f"name the folder of one of them: {where.rstrip('/')}/{splits[0] if splits else ''}",
                )
            if others := [split for split in splits if split != "train"]:
                say(f"{where}: only its train split is read, not {', '.join(others)}")
            folder = "train/"
        state: dict[str, Any] = json.loads(read(f"{folder}state.json"))
        files = [f"{folder}{entry['filename']}" for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"not a data set as `save_to_disk` writes it: {folder}state.json or dataset_dict.json cannot be read ({error!r})",
            where=where,
            hint="save it again",
        ) from None
    if missing := [name for name in files if name not in names]:
        raise DataError(f"the data set lacks its file {missing[0]}", where=where, hint="copy or save it again")
    return files


def _list_some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
