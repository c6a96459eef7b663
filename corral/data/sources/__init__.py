"""Reads the raw rows of a recipe's source, one at a time: local files, folders and globs, S3, the hub, or an asset.

A row that cannot be read becomes a row with a fault, and reading continues; a file that cannot be read is an error. Memory
does not depend on the size of a source. What a row means is decided in `formats`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from corral import assets
from corral.data.sources.csv_files import read_csv
from corral.data.sources.files import BrokenFileError, Say, SourceFile
from corral.data.sources.harm_ratings import read_rated_answers, read_rated_pairs
from corral.data.sources.hub_datasets import find_hub_files
from corral.data.sources.json_files import read_json, read_json_values, read_jsonl
from corral.data.sources.local_files import find_local_files, hash_local_files, make_local_file
from corral.data.sources.parquet_and_arrow import read_parquet_or_arrow
from corral.data.sources.raw_row import RawRow
from corral.data.sources.s3_files import find_s3_files, is_s3_error
from corral.data.sources.text_files import read_txt
from corral.errors import DataError
from corral.formatting import count_of
from corral.progress import Progress
from corral.recipe import Source

__all__ = ["RawRow", "hash_source", "read_rows"]

_Reader: TypeAlias = Callable[[SourceFile, Say], Iterator[RawRow]]

_READERS: dict[str, _Reader] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet_or_arrow,
    ".arrow": read_parquet_or_arrow,
    ".txt": read_txt,
}
_READ_ASSET: dict[str, Callable[[Sequence[Path]], Iterator[RawRow]]] = {
    "wikibooks-recipes": lambda files: _read_cookbook(files[0]),
    "harm-rated-answers": read_rated_answers,
    "harm-rated-pairs": read_rated_pairs,
}
"""For each asset with rows the function that reads them from its files."""


def read_rows(source: Source, progress: Progress | None = None) -> Iterator[RawRow]:
    """The rows of a source: files by name, rows in the order of the file.

    The call itself fetches what must be fetched. `progress` reports the licence of a new asset, the commit of a data set on
    the hub, files in a folder that are left out, and files without rows.

    Raises:
        DataError: at once if a file is missing or of an unknown kind, all are empty, or a service refuses access; while
            reading if a file is not text, is damaged or a Git LFS pointer, or none holds a row.
        AssetError: the asset cannot be fetched.
        MissingExtraError: S3 needs a package that is not installed.
        StorageError: what is fetched cannot be written.
    """
    progress = progress or Progress()
    if source.path.startswith("asset:"):
        return _read_asset(source.path.removeprefix("asset:"), progress)
    return _read_files(_find_files(source, progress), progress)


def hash_source(source: Source, progress: Progress | None = None) -> str:
    """sha256 of what the rows of a source depend on: the names of its files below the source, and their content.

    For content it takes the bytes of local files, the commit of a data set on the hub, the ETag of objects in S3, and the
    name of an asset and the hash of its wheel. A data set on the hub is downloaded. Raises as `read_rows` does.
    """
    if source.path.startswith("asset:"):
        asset = assets.find_asset(source.path.removeprefix("asset:"))
        return hashlib.sha256(f"{asset.name} {asset.wheel_sha256}".encode()).hexdigest()
    files = _find_files(source, progress or Progress())
    is_single = len(files) == 1
    hashes = hash_local_files([file.path for file in files if file.path and not file.digest])
    lines = [
        f"{file.kind}{file.compression}{'' if is_single else f' {file.name}'}\t{file.digest or hashes[file.where]}\n"
        for file in files
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _find_files(source: Source, progress: Progress) -> list[SourceFile]:
    if source.path.startswith("hub:"):
        files = find_hub_files(source, progress.say)
    elif source.path.startswith("s3://"):
        files = find_s3_files(source.path, progress.say)
    else:
        files = find_local_files(source.path, progress.say)
    return [replace(file, encoding=source.encoding, delimiter=source.delimiter or file.delimiter) for file in files]


def _read_files(files: list[SourceFile], progress: Progress) -> Iterator[RawRow]:
    """The rows of files, one after another. Raises DataError if none of them holds a row."""
    found_any = False
    for file in files:
        is_empty = True
        for row in _read_file(file, _READERS[file.kind], progress):
            is_empty = False
            yield row if len(files) == 1 else row.in_file(file.name)
        if is_empty and len(files) > 1:
            progress.say(f"{file.where}: the file holds no rows")
        found_any |= not is_empty
    if not found_any:
        what = "the file holds no rows" if len(files) == 1 else f"none of the {len(files)} files holds a row"
        raise DataError(what, where=files[0].where, hint="write rows into it, or leave it out")


def _read_file(file: SourceFile, reader: _Reader, progress: Progress) -> Iterator[RawRow]:
    """The rows of a file. Raises DataError if it cannot be read to its end, and says after how many rows."""
    count = 0
    try:
        for row in reader(file, progress.say):
            yield row
            count += 1
    except BrokenFileError as error:
        what, hint = str(error), "mend the file there, or fetch or write it again"
    except Exception as error:
        if not (isinstance(error, OSError) or is_s3_error(error)):
            raise
        what, hint = f"the file is damaged or cut short: {error}", "fetch or write it again"
    else:
        return
    raise DataError(f"{what} (reading ended after {count_of(count, 'row')})", where=file.where, hint=hint)


def _read_asset(name: str, progress: Progress) -> Iterator[RawRow]:
    asset = assets.find_asset(name)
    if name not in _READ_ASSET:
        problem = "no data set" if asset.kind != "data" else "data that is not read as rows"
        raise DataError(
            f"asset {name!r} is {problem}", where="data.sources", hint=f"assets with rows: {', '.join(_READ_ASSET)}"
        )
    fetched = assets.fetch(name, progress=progress.say)
    if fetched.fetched:
        progress.say(fetched.licence_text)
    return _READ_ASSET[name](fetched.files)


def _read_cookbook(path: Path) -> Iterator[RawRow]:
    return read_json_values(make_local_file(path.name, path, ".json"), lambda _: None)
