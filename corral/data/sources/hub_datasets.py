"""Finds the files of one split of a data set on the hub, at one commit, and downloads them into the hub library's cache.

The `datasets` library says which files make up a configuration and a split. Corral's own readers read them, so that a
broken row is a fault with its location, memory stays flat, and a second run needs no network. The commit and files of each
name are stored for offline use.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, astuple, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from corral.data.sources.files import Say, SourceFile, require_kind
from corral.data.sources.local_files import make_local_file
from corral.errors import CorralError, DataError, StorageError
from corral.model.hub import HUB_ID, HubProblem, explain_hub_error, unreachable_hub
from corral.recipe import Source
from corral.storage import cache_root, storage_errors, write_json

_PARQUET_BRANCH = "refs/convert/parquet"
_TIMEOUT = 60
# Settings of a configuration that do not change its rows, or that corral follows.
_SUPPORTED_SETTINGS = frozenset(
    {"name", "version", "data_dir", "data_files", "description", "features", "sep", "delimiter"}
    | {"chunksize", "batch_size", "block_size", "use_threads"}
)


@dataclass(frozen=True, slots=True)
class _PinnedSplit:
    """The files of a split at a commit, and the delimiter of tables. The fields are keys of the file that stores it."""

    commit: str
    files: tuple[str, ...]
    sep: str


def find_hub_files(source: Source, say: Say) -> list[SourceFile]:
    """The files of `hub:OWNER/NAME[@REVISION]`, downloaded if need be. `say` reports the commit.

    Raises:
        DataError: there is no such data set, revision, configuration or split; it is gated or private; the hub cannot be
            reached; or the files are of an unknown kind.
        StorageError: the hub library's cache cannot be written.
    """
    match = HUB_ID.fullmatch(source.path.removeprefix("hub:"))
    if match is None:
        raise DataError(f"{source.path!r} is not a hub id", hint="write hub:OWNER/NAME or hub:OWNER/NAME@REVISION")
    repo = match["repo"]
    split = _resolve_split(
        _Choice(repo, match["revision"], source.config, source.split, source.data_dir, source.data_files)
    )
    say(f"{source.path}: {source.split} at revision {split.commit}")
    delimiter = None if split.sep == "," else split.sep  # a comma is also what a card without `sep` says
    files: list[SourceFile] = []
    for name in split.files:
        where = f"hub:{repo}@{split.commit}/{name}"
        kind, compression = require_kind(name, where)
        file = make_local_file(name, _download(repo, split.commit, name), kind, compression)
        # Address and commit determine the content: no need to hash it.
        files.append(replace(file, where=where, digest=where, delimiter=delimiter))
    return files


@dataclass(frozen=True, slots=True)
class _Choice:
    """What a source names on the hub."""

    repo: str
    revision: str | None
    config: str | None
    split: str
    data_dir: str | None
    data_files: str | tuple[str, ...] | None


@cache  # a run reads a source more than once, and must see the same commit
def _resolve_split(choice: _Choice) -> _PinnedSplit:
    from huggingface_hub import constants

    key = hashlib.sha256(json.dumps([constants.ENDPOINT, *astuple(choice)]).encode()).hexdigest()[:32]
    pinned_file = cache_root() / "identities" / f"hub-{key}.json"
    try:
        if constants.HF_HUB_OFFLINE:
            raise _data_error(unreachable_hub(choice.repo, "data set"))
        resolved = _query_hub(choice)
    except _UnreachableError:
        with suppress(OSError, ValueError, KeyError, TypeError):
            pinned = json.loads(pinned_file.read_text("utf-8"))
            return _PinnedSplit(pinned["commit"], tuple(pinned["files"]), pinned["sep"])
        raise
    with suppress(StorageError):  # it only helps where there is no network
        write_json(pinned_file, asdict(resolved))
    return resolved


def _query_hub(choice: _Choice) -> _PinnedSplit:
    """The split according to the hub and the data set's card."""
    import datasets
    from huggingface_hub import HfApi

    repo, revision, config, split = choice.repo, choice.revision, choice.config, choice.split
    with _translated(
        lambda error: (
            _missing_file_error(error, repo) or _hub_error(error, repo, revision) or _builder_error(error, repo, config)
        )
    ):
        commit = HfApi().dataset_info(repo, revision=revision, timeout=_TIMEOUT).sha or ""
        if revision == _PARQUET_BRANCH and choice.data_files is None:
            pattern = {split: f"{config or '*'}/{split}/*.parquet"}
            builder = datasets.load_dataset_builder(repo, revision=commit, data_files=pattern)
        else:
            files: Any = list(choice.data_files) if isinstance(choice.data_files, tuple) else choice.data_files
            builder = datasets.load_dataset_builder(
                repo, config, revision=commit, data_dir=choice.data_dir, data_files=files
            )
    settings: Any = builder.config
    _check_settings(settings, repo)
    splits: dict[str, list[str]] = {str(name): list(files) for name, files in (settings.data_files or {}).items()}
    if split not in splits:
        raise DataError(
            f"hub:{repo} has no split {split!r}",
            where=_page(repo),
            hint=f"set `split` of this source to one of: {', '.join(splits)}",
        )
    names = tuple(address.partition(f"@{commit}/")[2] for address in splits[split])
    if revision == _PARQUET_BRANCH and len(configs := sorted({name.partition("/")[0] for name in names})) > 1:
        raise _config_error(repo, None, ", ".join(configs))
    return _PinnedSplit(commit, names, getattr(settings, "sep", ","))


def _check_settings(settings: Any, repo: str) -> None:
    """Raises DataError if the card sets reading options that corral does not support, rather than ignore them."""
    defaults = type(settings)()
    names = [field.name for field in fields(settings) if field.name not in _SUPPORTED_SETTINGS]
    unsupported = [name for name in names if getattr(settings, name) != getattr(defaults, name)]
    if unsupported:
        raise DataError(
            f"the card of hub:{repo} sets reading options that corral does not support ({', '.join(unsupported)})",
            where=_page(repo),
            hint=f"name hub:{repo}@{_PARQUET_BRANCH}, the hub's own conversion, or save the rows as .jsonl",
        )


def _download(repo: str, commit: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    with _translated(lambda error: _hub_error(error, repo, commit)):
        return Path(hf_hub_download(repo, name, repo_type="dataset", revision=commit))


@contextmanager
def _translated(translate: Callable[[Exception], DataError | None]) -> Generator[None]:
    """Raise what `translate` returns for an error. An OSError for which it returns None concerns the library's cache."""
    from huggingface_hub import constants

    with storage_errors(Path(constants.HF_HUB_CACHE)):
        try:
            yield
        except Exception as error:
            if (translated := translate(error)) is None:
                raise
            raise translated from error


class _UnreachableError(DataError):
    """The hub cannot be reached, or offline mode forbids it."""


def _hub_error(error: Exception, repo: str, revision: str | None) -> DataError | None:
    """The DataError for an error of the hub; None if the error is not the hub's."""
    problem = explain_hub_error(error, repo, revision, "data set")
    return None if problem is None else _data_error(problem)


def _data_error(problem: HubProblem) -> DataError:
    error = _UnreachableError if problem.is_unreachable else DataError
    return error(problem.what, where=problem.where, hint=problem.hint)


def _missing_file_error(error: Exception, repo: str) -> DataError | None:
    """The DataError if `datasets` did not find what `data_dir` or `data_files` name. Causes of its error hide that."""
    match = re.search(
        r"(?:Unable to find|The directory at) '?hf://datasets/[^/]*/[^/@]*(?:@[^/]*)?/([^\s']*)", str(error)
    )
    if match is None or not isinstance(error, FileNotFoundError):
        return None
    return DataError(
        f"hub:{repo} has no data file {match[1]!r}", where=_page(repo), hint="check `data_dir` and `data_files`"
    )


def _builder_error(error: Exception, repo: str, config: str | None) -> DataError | None:
    """The DataError for what `datasets` found wrong with the repository, if anything."""
    from datasets.exceptions import DatasetsError

    message = str(error)
    if isinstance(error, CorralError):
        return None
    if isinstance(error, ValueError) and ("BuilderConfig" in message or "Config name is missing" in message):
        return _config_error(
            repo, config, ", ".join(re.findall(r"'([^']+)'", message.partition("[")[2].partition("]")[0]))
        )
    if "scripts are no longer supported" in message:
        return DataError(
            f"hub:{repo} is a Python script, which corral does not run",
            where=_page(repo),
            hint=f"name hub:{repo}@{_PARQUET_BRANCH}, the hub's own conversion to parquet",
        )
    if isinstance(error, (DatasetsError, FileNotFoundError, ValueError)):
        return DataError(
            f"hub:{repo} holds no data files that can be read: {message.splitlines()[0] if message else type(error).__name__}",
            where=_page(repo),
            hint="look at its files, or save the rows as .jsonl",
        )
    return None


def _config_error(repo: str, config: str | None, names: str) -> DataError:
    what = f"no configuration {config!r}" if config else "several configurations, and the source names none"
    return DataError(
        f"hub:{repo} has {what}", where=_page(repo), hint=f"set `config` of this source to one of: {names}"
    )


def _page(repo: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/datasets/{repo}"
