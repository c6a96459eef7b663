"""Finds files in an S3 bucket: one object, those below a prefix, or those that match a glob.

Files are streamed; parquet files are read from a temporary copy. Access is through s3fs (the extra `s3`), with the
credentials, region and endpoint that AWS's own tools would find.
"""

from __future__ import annotations

import glob
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

from corral.data.sources.files import Say, SourceFile, require_kind
from corral.data.sources.folders import select_row_files
from corral.errors import DataError, require

Select: TypeAlias = Callable[[list[str], str, Say, Callable[[str], bytes]], list[str]]
KindOf: TypeAlias = Callable[[str, str], tuple[str, str]]

_KEYS = "AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_BLOCK = 8 * 2**20


def find_s3_files(
    spec: str, say: Say, *, select: Select = select_row_files, kind_of: KindOf = require_kind
) -> list[SourceFile]:
    """The files of `s3://BUCKET/KEY`.

    Args:
        spec: the address.
        say: reports files below a prefix that are left out.
        select: chooses among the names below a prefix.
        kind_of: (kind, compression) of a name and its address; raises DataError if it cannot be read.

    Raises:
        DataError: there are none, access is refused, or the service cannot be reached.
        MissingExtraError: s3fs is not installed.
    """
    key = spec.removeprefix("s3://").rstrip("/")
    # A new instance, as an earlier one may have cached listings, or have been used before a fork.
    system = require("s3fs", "s3").S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    try:
        infos, prefix = _list_objects(system, key, spec, lambda names, read: select(names, spec, say, read))
        return [
            _make_file(system, name, name.removeprefix(f"{prefix}/"), info, kind_of) for name, info in infos.items()
        ]
    except Exception as error:
        translated = _translate(error, spec)
        if translated is None:
            raise
        raise translated from error


def is_s3_error(error: BaseException) -> bool:
    """Whether AWS's client libraries raised it. Their errors share no base class that is known without importing them."""
    return type(error).__module__.partition(".")[0] in ("botocore", "aiobotocore", "aiohttp")


def _list_objects(
    system: Any, key: str, spec: str, select: Callable[[list[str], Callable[[str], bytes]], list[str]]
) -> tuple[dict[str, Any], str]:
    """(what S3 says of each chosen object by its key, sorted; the prefix that their names are relative to)."""
    if glob.has_magic(key):
        infos: dict[str, Any] = {name: i for name, i in system.glob(key, detail=True).items() if i["type"] == "file"}
        prefix = "/".join(key.split("/")[: next(n for n, part in enumerate(key.split("/")) if glob.has_magic(part))])
        names = sorted(infos)
    elif system.isdir(key):
        infos = system.find(key, detail=True)
        prefix = key
        below = [name.removeprefix(f"{key}/") for name in infos]
        names = [f"{key}/{name}" for name in select(below, lambda name: system.cat_file(f"{key}/{name}"))]
    else:
        infos = {key: system.info(key)}
        prefix, _, _ = key.rpartition("/")
        names = [key]
    if not names:
        raise DataError("no object matches this glob", where=spec, hint="check `path` in data.sources")
    return {name: infos[name] for name in names}, prefix


def _make_file(system: Any, key: str, name: str, info: dict[str, Any], kind_of: KindOf) -> SourceFile:
    where = f"s3://{key}"
    kind, compression = kind_of(key, where)
    if not info["size"]:
        raise DataError("the object is empty", where=where, hint="write rows into it, or leave it out")
    digest = f"{info['ETag'].strip(chr(34))} {info['size']}"
    start = partial(system.open, key, "rb", block_size=_BLOCK, cache_type="readahead")
    return SourceFile(name, where, kind, compression, start, digest)


def _translate(error: Exception, spec: str) -> DataError | None:
    name = type(error).__name__
    if isinstance(error, FileNotFoundError):
        return DataError("there is no such bucket or object", where=spec, hint="check `path` in data.sources")
    if isinstance(error, PermissionError) or name in (
        "NoCredentialsError",
        "PartialCredentialsError",
        "ProfileNotFound",
    ):
        return DataError(
            f"access is refused: {str(error) or name}", where=spec, hint=f"set {_KEYS} to an account that may read it"
        )
    if isinstance(error, OSError) or is_s3_error(error):
        return DataError(
            f"the S3 service cannot be used: {error or name}",
            where=spec,
            hint="check the network, the bucket's region (AWS_REGION) and, for another service, AWS_ENDPOINT_URL",
        )
    return None
