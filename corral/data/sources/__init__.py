"""A source in the recipe → raw rows, one at a time: files, folders and globs on this machine, in S3, on the hub, or an asset.

A row that cannot be read becomes a row with a fault, and reading goes on; a file that cannot be read is an error. Memory
does not depend on the size of a source. The kinds of files are `.jsonl` and `.txt` (lines), `.json` (json_list), `.csv` and
`.tsv` (table) and `.parquet` (parquet); where they lie is local, s3 and hub.

This package does not know what a row means: that is `formats`.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator

from corral import assets
from corral.data.sources.csv_files import read_csv
from corral.data.sources.files import SourceFile
from corral.data.sources.hub_datasets import find_hub_files
from corral.data.sources.json_files import read_json, read_json_values
from corral.data.sources.jsonl_and_text import read_jsonl, read_txt
from corral.data.sources.local_files import find_local_files, make_local_file
from corral.data.sources.parquet_files import read_parquet
from corral.data.sources.raw_row import RawRow
from corral.data.sources.s3_files import find_s3_files, is_s3_error
from corral.errors import DataError
from corral.progress import Progress
from corral.recipe import Source

__all__ = ["RawRow", "hash_source", "read_rows"]

_READERS: dict[str, Callable[[SourceFile], Iterator[RawRow]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".txt": read_txt,
}
_ASSET_ROWS: dict[str, Callable[[SourceFile], Iterator[RawRow]]] = {"wikibooks-recipes": read_json_values}


def read_rows(source: Source, progress: Progress | None = None) -> Iterator[RawRow]:
    """The rows of a source, in its order: files by name, rows as they stand in them.

    What must be fetched is fetched by this call; `progress` is told the licence of a fresh asset, the commit of a data set
    on the hub, what in a folder is no rows, and which of several files hold none.

    Raises:
        DataError: now: a file is missing or of an unknown kind, all are empty, or a service refuses it. While reading: a
            file is no text, or damaged, or there is no row in any of them.
        AssetError: the asset cannot be had.
        MissingExtraError: S3 needs a package that is not installed.
        StorageError: what is fetched cannot be written.
    """
    progress = progress or Progress()
    if source.path.startswith("asset:"):
        return _asset(source.path.removeprefix("asset:"), progress)
    return _rows(_files(source, progress), progress)


def hash_source(source: Source, progress: Progress | None = None) -> str:
    """What the rows of a source depend on, as a sha256: not where files lie, but their names below the source and content.

    Content is that of files here, the commit of a data set on the hub, the ETag of objects in S3, an asset's wheel. A
    data set on the hub is downloaded. Raises: as `read`.
    """
    if source.path.startswith("asset:"):
        return assets.find_asset(source.path.removeprefix("asset:")).wheel_sha256
    files = _files(source, progress or Progress())
    alone = len(files) == 1
    lines = [f"{file.kind}{file.compression}{'' if alone else f' {file.name}'}\t{file.digest()}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _files(source: Source, progress: Progress) -> list[SourceFile]:
    if source.path.startswith("hub:"):
        return find_hub_files(source, progress.say)
    if source.path.startswith("s3://"):
        return find_s3_files(source.path, progress.say)
    return find_local_files(source.path, progress.say)


def _rows(files: list[SourceFile], progress: Progress) -> Iterator[RawRow]:
    """The rows of files, one after another. Raises: DataError (none of them holds a row)."""
    before = 0
    for file in files:
        last = 0
        for row in _file_rows(file, _READERS[file.kind]):
            last = row.index
            yield row if len(files) == 1 else row.in_file(file.name, before)
        if not last and len(files) > 1:
            progress.say(f"{file.where}: the file holds no rows")
        before += last
    if not before:
        what = "the file holds no rows" if len(files) == 1 else f"none of the {len(files)} files holds a row"
        raise DataError(what, where=files[0].where, hint="write rows into it, or leave it out")


def _file_rows(file: SourceFile, reader: Callable[[SourceFile], Iterator[RawRow]]) -> Iterator[RawRow]:
    """The rows of a file. Raises: DataError (it is damaged or cut short; it says after how many rows)."""
    count = 0
    try:
        for row in reader(file):
            yield row
            count += 1
    except Exception as error:
        if not (isinstance(error, (OSError, EOFError, zlib.error)) or is_s3_error(error)):
            raise
        raise DataError(
            f"the file is damaged or cut short: reading ended after {count:,} rows: {error}",
            where=file.where,
            hint="fetch or write it again",
        ) from error


def _asset(name: str, progress: Progress) -> Iterator[RawRow]:
    asset = assets.find_asset(name)
    if asset.kind != "data" or name not in _ASSET_ROWS:
        kind = "no data set" if asset.kind != "data" else "data that is not read as rows"
        raise DataError(
            f"asset {name!r} is {kind}", where="data.sources", hint=f"assets with rows: {', '.join(_ASSET_ROWS)}"
        )
    fetched = assets.fetch(name, progress=progress.say)
    if fetched.fetched:
        progress.say(fetched.licence_text)
    path = fetched.files[0]
    return _file_rows(make_local_file(path.name, path, ".json"), _ASSET_ROWS[name])
