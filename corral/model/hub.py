"""A model on a model hub → a folder in the hub library's cache, or the reason why not, in words.

Takes safetensors, config, tokenizer and licence files only. This module knows nothing about what is in them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from corral.errors import ModelError
from corral.storage import storage_errors

HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
"""`OWNER/NAME` or `OWNER/NAME@REVISION`."""

_WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "LICEN[SC]E*", "NOTICE*", "USE_POLICY*"]


def download(spec: str, *, offline: bool, say: Callable[[str], None]) -> Path:
    """The folder of `hub:OWNER/NAME[@REVISION]`; its name is the commit.

    Args:
        spec: with the `hub:` prefix; without a revision the main branch is meant.
        offline: only look into the hub library's cache.
        say: told in words what takes time.

    Raises:
        ModelError: no such model or revision, gated, private, or not reachable; it says what to do.
        StorageError: the hub library's cache cannot be written.
    """
    match = HUB_ID.fullmatch(spec.removeprefix("hub:"))
    if match is None:
        raise ModelError(f"{spec!r} is not a hub id", hint="write hub:OWNER/NAME or hub:OWNER/NAME@REVISION")
    from huggingface_hub import constants, snapshot_download

    repo, revision = match["repo"], match["revision"]
    say(f"fetching {spec}")
    try:
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=_WANTED, ignore_patterns=["*/*"], local_files_only=offline
        )
    except Exception as error:
        translated = _hub_error(error, repo, revision)
        if translated is None:
            with storage_errors(Path(constants.HF_HUB_CACHE)):
                raise
        raise translated from error
    return Path(folder)


def _hub_error(error: Exception, repo: str, revision: str | None) -> ModelError | None:
    """What went wrong at the model hub, in words; None if it is not the hub's doing (a full disk, say)."""
    from huggingface_hub import constants, errors

    endpoint = constants.ENDPOINT
    page = f"{endpoint}/{repo}"
    token = "make a token there, then set HF_TOKEN or run `hf auth login`"
    # A refusal other than 401 comes wrapped in "not in the local cache".
    status = next((s for s in map(_status, (error, error.__cause__)) if s is not None), None)
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return ModelError(
            f"hub:{repo} is gated: its licence must be accepted first (HTTP {status})",
            where=page,
            hint=f"sign in at {page}, accept the licence, {token}",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelError(
            f"hub:{repo} has no revision {revision!r}", where=page, hint="leave @REVISION out, or correct it"
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return ModelError(
            f"the hub knows no model {repo!r}, or it is private (HTTP {status})",
            where=page,
            hint=f"check the spelling; for a private or gated model, {token}",
        )
    if isinstance(error, errors.HFValidationError):
        return ModelError(f"{repo!r} is not a hub id: {error}", hint="write hub:OWNER/NAME")
    if status is not None:
        return ModelError(f"the model hub answered HTTP {status} for {repo}", where=page, hint="try again later")
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)) or _is_network(error):
        return ModelError(
            f"hub:{repo} is not in the local cache, and the model hub cannot be reached",
            where=endpoint,
            hint="check the network and HF_ENDPOINT (HF_HUB_OFFLINE must not be set), or use an asset: or a local folder",
        )
    if isinstance(error, errors.EntryNotFoundError):
        return ModelError(
            f"hub:{repo} holds no file of a model", where=page, hint="choose a repository with safetensors"
        )
    return None


def _status(error: BaseException | None) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_network(error: Exception) -> bool:
    """Whether an HTTP client raised it: its base class varies with the client that huggingface_hub was built on."""
    from huggingface_hub import errors

    http_error: type[Exception] = vars(errors)["HTTPError"]
    return isinstance(error, (http_error, ConnectionError, TimeoutError))
