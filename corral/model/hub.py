"""Downloads a model from the Hugging Face hub into the hub library's cache, and explains hub errors.

Only safetensors, config, tokenizer and licence files are downloaded; their content is not checked here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from corral.errors import ModelError
from corral.storage import storage_errors

HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
"""`OWNER/NAME` or `OWNER/NAME@REVISION`."""

_WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "LICEN[SC]E*", "NOTICE*", "USE_POLICY*"]
# Of the folders in a repository only templates are wanted: `additional_chat_templates/NAME.jinja`.
_NOT_WANTED = [f"*/{pattern}" for pattern in _WANTED if pattern != "*.jinja"]


def download(spec: str, *, say: Callable[[str], None]) -> Path:
    """Downloads `hub:OWNER/NAME[@REVISION]` and returns its folder, which is named after the commit.

    Args:
        spec: the model, with the `hub:` prefix. The default revision is the main branch.
        say: called with a message before the download.

    Raises:
        ModelError: if the model or revision does not exist, is gated or private, or the hub is not reachable. The hint says
            what to do.
        StorageError: if the hub library's cache cannot be written.
    """
    match = HUB_ID.fullmatch(spec.removeprefix("hub:"))
    if match is None:
        raise ModelError(f"{spec!r} is not a hub id", hint="write hub:OWNER/NAME or hub:OWNER/NAME@REVISION")
    from huggingface_hub import constants, errors, snapshot_download

    repo, revision = match["repo"], match["revision"]
    say(f"fetching {spec}")
    try:
        folder = snapshot_download(repo, revision=revision, allow_patterns=_WANTED, ignore_patterns=_NOT_WANTED)
    except Exception as error:
        problem = explain_hub_error(error, repo, revision, "model")
        if problem is None and isinstance(error, errors.EntryNotFoundError):
            where, hint = f"{constants.ENDPOINT}/{repo}", "choose a repository with safetensors"
            raise ModelError(f"hub:{repo} holds no file of a model", where=where, hint=hint) from error
        if problem is None:
            with storage_errors(Path(constants.HF_HUB_CACHE)):
                raise
        raise ModelError(problem.what, where=problem.where, hint=problem.hint) from error
    return Path(folder)


class HubProblem(NamedTuple):
    """A hub error as the parts of a CorralError."""

    what: str
    where: str
    hint: str
    is_unreachable: bool = False


def explain_hub_error(
    error: Exception, repo: str, revision: str | None, kind: Literal["model", "data set"]
) -> HubProblem | None:
    """Explains an error of a hub request. None if the error has another cause, such as a full disk."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{'' if kind == 'model' else 'datasets/'}{repo}"
    terms = "licence" if kind == "model" else "terms"
    token = "make a token there, then set HF_TOKEN or run `hf auth login`"
    # For an HTTP status other than 401, the hub library raises a "not in the local cache" error with the status as its cause.
    causes = list(_causes(error))
    statuses = (getattr(getattr(cause, "response", None), "status_code", None) for cause in causes)
    status: int | None = next((status for status in statuses if status is not None), None)

    def caused_by(*types: type[BaseException]) -> bool:
        return any(isinstance(cause, types) for cause in causes)

    if caused_by(errors.GatedRepoError) or status == 403:
        what = f"hub:{repo} is gated: its {terms} must be accepted first (HTTP {status})"
        return HubProblem(what, page, f"sign in at {page}, accept the {terms}, {token}")
    if caused_by(errors.RevisionNotFoundError):
        return HubProblem(f"hub:{repo} has no revision {revision!r}", page, "leave @REVISION out, or correct it")
    if caused_by(errors.RepositoryNotFoundError) or status == 401:
        what = f"the hub knows no {kind} {repo!r}, or it is private (HTTP {status})"
        return HubProblem(what, page, f"check the spelling; for a private or gated {kind}, {token}")
    if caused_by(errors.HFValidationError):
        return HubProblem(f"{repo!r} is not a hub id: {error}", page, "write hub:OWNER/NAME")
    # `datasets` requests optional files, so status 404 is normal there.
    if status is not None and status >= 400 and (status != 404 or kind == "model"):
        return HubProblem(f"the hub answered HTTP {status} for {repo}", page, "try again later")
    # The class of HTTPError depends on the HTTP client that this version of huggingface_hub uses.
    http_error: type[Exception] = vars(errors)["HTTPError"]
    if caused_by(
        errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, http_error, ConnectionError, TimeoutError
    ):
        return unreachable_hub(repo, kind)
    return None


def unreachable_hub(repo: str, kind: Literal["model", "data set"]) -> HubProblem:
    """The problem for a hub that cannot be reached, or that offline mode forbids to contact."""
    from huggingface_hub import constants

    instead = "use an asset: or a local folder" if kind == "model" else "name a local file or folder"
    return HubProblem(
        f"hub:{repo} is not in the local cache, and the hub cannot be reached",
        constants.ENDPOINT,
        f"check the network and HF_ENDPOINT (HF_HUB_OFFLINE must not be set), or {instead}",
        is_unreachable=True,
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
