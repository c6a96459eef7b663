"""A data set on the hub → the files of one split at one commit, in the hub library's cache, or the reason why not.

The `datasets` library says which files make up a configuration and a split; they are downloaded once and read by corral's
own readers, so that a broken row is a fault with its place, memory stays flat, and a second run needs no network. What a
name stood for is remembered, so that it can be used offline. This module knows nothing about what is in the files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from corral.data.sources.files import SourceFile, require_kind
from corral.data.sources.local_files import make_local_file
from corral.errors import CorralError, DataError, StorageError
from corral.model.hub import HUB_ID
from corral.recipe import Source
from corral.storage import cache_root, storage_errors, write_json

_PARQUET_BRANCH = "refs/convert/parquet"
_TIMEOUT = 60
# Settings of a configuration that do not change what its rows are, or that are followed.
_FOLLOWED = frozenset(
    {"name", "version", "data_dir", "data_files", "description", "features", "sep", "delimiter"}
    | {"chunksize", "batch_size", "block_size", "use_threads"}
)


@dataclass(frozen=True, slots=True)
class _Found:
    """What a source stands for: files in a repository at a commit, and what is between the cells of a table."""

    commit: str
    files: tuple[str, ...]
    sep: str


def find_hub_files(source: Source, say: Callable[[str], None]) -> list[SourceFile]:
    """The files of `hub:OWNER/NAME[@REVISION]`, downloaded if need be. `say` is told the commit.

    Raises:
        DataError: no such data set, revision, configuration or split; gated or private; not reachable; its files are of
            no kind that can be read. It says what to do.
        StorageError: the hub library's cache cannot be written.
    """
    match = HUB_ID.fullmatch(source.path.removeprefix("hub:"))
    if match is None:
        raise DataError(f"{source.path!r} is not a hub id", hint="write hub:OWNER/NAME or hub:OWNER/NAME@REVISION")
    repo = match["repo"]
    found = _resolve(repo, match["revision"], source.config, source.split)
    say(f"{source.path}: {source.split} at revision {found.commit}")
    files: list[SourceFile] = []
    for name in found.files:
        where = f"hub:{repo}@{found.commit}/{name}"
        kind, packed = require_kind(name, where)
        path = _download(repo, found.commit, name)
        files.append(_at_commit(make_local_file(name, path, ".tsv" if found.sep == "\t" else kind, packed), where))
    return files


def _at_commit(file: SourceFile, where: str) -> SourceFile:
    # Address and commit say what is in it: no need to read it.
    return replace(file, where=where, digest=lambda: where)


@cache  # a run reads a source more than once, and must see one commit
def _resolve(repo: str, revision: str | None, config: str | None, split: str) -> _Found:
    from huggingface_hub import constants

    key = hashlib.sha256(json.dumps([constants.ENDPOINT, repo, revision, config, split]).encode()).hexdigest()[:32]
    memory = cache_root() / "identities" / f"hub-{key}.json"
    try:
        if constants.HF_HUB_OFFLINE:
            raise _unreachable(repo)
        found = _ask(repo, revision, config, split)
    except _UnreachableError:
        with suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads(memory.read_text("utf-8"))
            return _Found(known["commit"], tuple(known["files"]), known["sep"])
        raise
    with suppress(StorageError):  # it only helps where there is no network
        write_json(memory, asdict(found))
    return found


def _ask(repo: str, revision: str | None, config: str | None, split: str) -> _Found:
    """What the hub and the data set's card say."""
    import datasets
    from huggingface_hub import HfApi

    with _in_words(lambda error: _hub_error(error, repo, revision) or _builder_error(error, repo, config)):
        commit = HfApi().dataset_info(repo, revision=revision, timeout=_TIMEOUT).sha or ""
        if revision == _PARQUET_BRANCH:
            pattern = {split: f"{config or '*'}/{split}/*.parquet"}
            builder = datasets.load_dataset_builder(repo, revision=commit, data_files=pattern)
        else:
            builder = datasets.load_dataset_builder(repo, config, revision=commit)
    settings: Any = builder.config
    _refuse_settings(settings, repo)
    splits: dict[str, list[str]] = {str(name): list(files) for name, files in (settings.data_files or {}).items()}
    if split not in splits:
        raise DataError(
            f"hub:{repo} has no split {split!r}",
            where=_page(repo),
            hint=f"set `split` of this source to one of: {', '.join(splits)}",
        )
    names = tuple(address.partition(f"@{commit}/")[2] for address in splits[split])
    if revision == _PARQUET_BRANCH and len(found := sorted({name.partition("/")[0] for name in names})) > 1:
        raise _no_config(repo, None, ", ".join(found))
    return _Found(commit, names, getattr(settings, "sep", ","))


def _refuse_settings(settings: Any, repo: str) -> None:
    """Raises DataError if the card asks for a way of reading that corral does not have, rather than read it otherwise."""
    usual = type(settings)()
    names = [field.name for field in fields(settings) if field.name not in _FOLLOWED]
    other = [name for name in names if getattr(settings, name) != getattr(usual, name)]
    if getattr(settings, "sep", ",") not in (",", "\t"):
        other.append("sep")
    if other:
        raise DataError(
            f"the card of hub:{repo} sets how its files are to be read ({', '.join(other)}), which corral does not follow",
            where=_page(repo),
            hint=f"name hub:{repo}@{_PARQUET_BRANCH}, the hub's own conversion, or save the rows as .jsonl",
        )


def _download(repo: str, commit: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    with _in_words(lambda error: _hub_error(error, repo, commit)):
        return Path(hf_hub_download(repo, name, repo_type="dataset", revision=commit))


@contextmanager
def _in_words(translate: Callable[[Exception], DataError | None]) -> Generator[None]:
    """Raises what `translate` makes of an error inside; an OSError of which it makes nothing is about the library's cache."""
    from huggingface_hub import constants

    with storage_errors(Path(constants.HF_HUB_CACHE)):
        try:
            yield
        except Exception as error:
            if (translated := translate(error)) is None:
                raise
            raise translated from error


class _UnreachableError(DataError):
    """The hub cannot be reached, or must not be."""


def _unreachable(repo: str) -> _UnreachableError:
    from huggingface_hub import constants

    return _UnreachableError(
        f"hub:{repo} is not in the local cache, and the hub cannot be reached",
        where=constants.ENDPOINT,
        hint="check the network and HF_ENDPOINT (HF_HUB_OFFLINE must not be set), or name a local file or folder",
    )


def _hub_error(error: Exception, repo: str, revision: str | None) -> DataError | None:
    """What went wrong at the hub, in words; None if it is not the hub's doing."""
    from huggingface_hub import errors

    page = _page(repo)
    token = "make a token there, then set HF_TOKEN or run `hf auth login`"
    chain = list(_chain(error))
    status = next((s for s in map(_status, chain) if s is not None), None)

    def is_(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    if is_(errors.GatedRepoError) or status == 403:
        return DataError(
            f"hub:{repo} is gated: its terms must be accepted first (HTTP {status})",
            where=page,
            hint=f"sign in at {page}, accept the terms, {token}",
        )
    if is_(errors.RevisionNotFoundError):
        return DataError(
            f"hub:{repo} has no revision {revision!r}", where=page, hint="leave @REVISION out, or correct it"
        )
    if is_(errors.RepositoryNotFoundError) or status == 401:
        return DataError(
            f"the hub knows no data set {repo!r}, or it is private (HTTP {status})",
            where=page,
            hint=f"check the spelling; for a private or gated data set, {token}",
        )
    if is_(errors.HFValidationError):
        return DataError(f"{repo!r} is not a hub id", hint="write hub:OWNER/NAME")
    if status is not None and status >= 400 and status != 404:
        return DataError(f"the hub answered HTTP {status} for {repo}", where=page, hint="try again later")
    http_error: type[Exception] = vars(errors)["HTTPError"]
    if is_(errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, http_error, ConnectionError, TimeoutError):
        return _unreachable(repo)
    return None


def _builder_error(error: Exception, repo: str, config: str | None) -> DataError | None:
    """What `datasets` found wrong with the repository, in words."""
    from datasets.exceptions import DatasetsError

    said = str(error)
    if isinstance(error, CorralError):
        return None
    if isinstance(error, ValueError) and ("BuilderConfig" in said or "Config name is missing" in said):
        return _no_config(repo, config, ", ".join(re.findall(r"'([^']+)'", said.partition("[")[2].partition("]")[0])))
    if "scripts are no longer supported" in said:
        return DataError(
            f"hub:{repo} is a Python script, which corral does not run",
            where=_page(repo),
            hint=f"name hub:{repo}@{_PARQUET_BRANCH}, the hub's own conversion to parquet",
        )
    if isinstance(error, (DatasetsError, FileNotFoundError, ValueError)):
        return DataError(
            f"hub:{repo} holds no data files that can be read: {said.splitlines()[0] if said else type(error).__name__}",
            where=_page(repo),
            hint="look at its files, or save the rows as .jsonl",
        )
    return None


def _no_config(repo: str, config: str | None, names: str) -> DataError:
    what = f"no configuration {config!r}" if config else "several configurations, and the source names none"
    return DataError(
        f"hub:{repo} has {what}", where=_page(repo), hint=f"set `config` of this source to one of: {names}"
    )


def _page(repo: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/datasets/{repo}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)
