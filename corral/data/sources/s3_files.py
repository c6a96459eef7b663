"""Finds files in an S3 bucket: one object, those below a prefix, or those that match a glob.

Files are streamed; parquet files are read from a temporary copy. Access is through s3fs (the extra `s3`), with the
credentials, region and endpoint that AWS's own tools would find.
"""

from __future__ import annotations

import glob
from functools import partial
from typing import Any

from corral.data.sources.files import Say, SourceFile, require_kind
from corral.data.sources.folders import select_row_files
from corral.errors import DataError, require

_KEYS = "AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_BLOCK = 8 * 2**20


def find_s3_files(spec: str, say: Say) -> list[SourceFile]:
    """The files of `s3://BUCKET/KEY`. `say` reports files below a prefix that are left out.

    Raises:
        DataError: there are none, access is refused, or the service cannot be reached.
        MissingExtraError: s3fs is not installed.
    """
    key = spec.removeprefix("s3://").rstrip("/")
    # A new instance, as an earlier one may have cached listings, or have been used before a fork.
    system = require("s3fs", "s3").S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    try:
        return _list_objects(system, key, spec, say)
    except Exception as error:
        translated = _translate(error, spec)
        if translated is None:
            raise
        raise translated from error


def is_s3_error(error: BaseException) -> bool:
    """Whether AWS's client libraries raised it. Their errors share no base class that is known without importing them."""
    return type(error).__module__.partition(".")[0] in ("botocore", "aiobotocore", "aiohttp")


def _list_objects(system: Any, key: str, spec: str, say: Say) -> list[SourceFile]:
    if glob.has_magic(key):
        infos: dict[str, Any] = {name: i for name, i in system.glob(key, detail=True).items() if i["type"] == "file"}
        prefix = "/".join(key.split("/")[: next(n for n, part in enumerate(key.split("/")) if glob.has_magic(part))])
        names = sorted(infos)
    elif system.isdir(key):
        infos = system.find(key, detail=True)
        prefix = key
        below = [name.removeprefix(f"{key}/") for name in infos]
        chosen = select_row_files(below, spec, say, lambda name: system.cat_file(f"{key}/{name}"))
        names = [f"{key}/{name}" for name in chosen]
    else:
        infos = {key: system.info(key)}
        prefix, _, _ = key.rpartition("/")
        names = [key]
    if not names:
        raise DataError("no object matches this glob", where=spec, hint="check `path` in data.sources")
    return [_make_file(system, name, name.removeprefix(f"{prefix}/"), infos[name]) for name in names]


def _make_file(system: Any, key: str, name: str, info: dict[str, Any]) -> SourceFile:
    where = f"s3://{key}"
    kind, compression = require_kind(key, where)
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
