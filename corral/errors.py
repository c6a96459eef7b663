"""The exception tree, with the command line's exit codes.

    CorralError                    1   a bug of corral, or a failure of the machine
    ├── InputError                 2   the user's input cannot be used
    │   ├── RecipeError                a key, type, value or combination in a recipe is wrong
    │   ├── AssetError                 a packaged model or data set cannot be fetched, or is damaged
    │   ├── ModelError                 a model folder, hub id or GGUF file cannot be loaded
    │   ├── TemplateError              a chat template cannot be rendered, masked or trusted
    │   ├── DataError                  a source cannot be read, or leaves nothing to train on
    │   ├── CheckpointError            there is no checkpoint to resume from
    │   └── RunError                   a run directory is in use, or holds other files
    ├── StorageError               2   the disk is full, or a path cannot be written
    ├── DatabaseError              2   a server's database cannot be opened, reached or written
    ├── MissingExtraError          3   an optional dependency is not installed
    ├── GateError                  4   a stage ran, and its output must not be promoted
    │   └── ContractError              two models or engines that must agree do not
    ├── OutOfMemoryError           1   the machine or the GPU has no memory left
    ├── TrainingError              1   training cannot go on (loss is not a number …)
    │   └── PeerError                  another process of the same run has ended
    └── EngineError                1   an engine failed
        ├── RequestError           2   this engine cannot serve the request
        ├── EngineUnavailableError     the engine cannot compute now, but may later
        └── EngineClosedError          the engine was shut down, or its process died

Every error says what is wrong (naming the value), `where` it was found, and in `hint` the next step; the command line prints
these three and no traceback.
"""

from __future__ import annotations

import importlib
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

_OUT_OF_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "alloc_failed",
)


class CorralError(Exception):
    """Base of all errors that corral raises on purpose.

    Args:
        what: what is wrong, naming the value that caused it.
        where: the file, key, row or address where it was found.
        hint: what the user can do next.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.hint:
            lines.append(f"  next:  {self.hint}")
        return "\n".join(lines)


class InputError(CorralError):
    """The user's input cannot be used."""

    exit_code = 2


class RecipeError(InputError):
    """A key, type, value or combination in a recipe is wrong."""


class AssetError(InputError):
    """A packaged model or data set cannot be fetched, or is damaged."""


class ModelError(InputError):
    """A model folder, hub id or GGUF file cannot be loaded."""


class TemplateError(InputError):
    """A chat template cannot be rendered, masked or trusted."""


class DataError(InputError):
    """A source cannot be read, or leaves nothing to train on."""


class CheckpointError(InputError):
    """There is no checkpoint to resume from."""


class RunError(InputError):
    """A run directory is in use, or holds other files."""


class StorageError(CorralError):
    """The disk is full, or a path cannot be written."""

    exit_code = 2


class DatabaseError(CorralError):
    """A server's database cannot be opened, reached or written."""

    exit_code = 2


class MissingExtraError(CorralError):
    """An optional dependency is not installed."""

    exit_code = 3


class GateError(CorralError):
    """A stage ran, and its output must not be promoted."""

    exit_code = 4


class ContractError(GateError):
    """Two models or engines that must agree do not."""


class OutOfMemoryError(CorralError):
    """The machine or the GPU has no memory left."""


class TrainingError(CorralError):
    """Training cannot go on."""


class PeerError(TrainingError):
    """Another process of the same run has ended."""


class EngineError(CorralError):
    """An engine failed.

    Args:
        what, where, hint: see CorralError.
        status: the HTTP status of an endpoint's response, if there was one.
        retry_seconds: how long the endpoint asks to wait before a retry, if it says so.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        hint: str | None = None,
        status: int | None = None,
        retry_seconds: float | None = None,
    ) -> None:
        super().__init__(what, where=where, hint=hint)
        self.status = status
        self.retry_seconds = retry_seconds


class RequestError(EngineError):
    """This engine cannot serve the request."""

    exit_code = 2


class EngineUnavailableError(EngineError):
    """The engine cannot compute now, but may later."""


class EngineClosedError(EngineError):
    """The engine was shut down, or its process died."""


def first_error(errors: BaseExceptionGroup[CorralError]) -> CorralError:
    """The first error of a group, for tasks that all fail in the same way: a user needs to read only one."""
    error = errors.exceptions[0]
    return first_error(error) if isinstance(error, BaseExceptionGroup) else error


def out_of_memory_reason(error: BaseException) -> str | None:
    """What Python, torch or CUDA said if they had no memory left; None for any other error."""
    reason = str(error).strip().partition("\n")[0]
    if isinstance(error, MemoryError):
        return reason or "no memory is left"
    if not isinstance(error, RuntimeError | OSError):
        return None
    return reason if any(words in str(error).lower() for words in _OUT_OF_MEMORY) else None


@contextmanager
def out_of_memory_errors(doing: str, *, where: str, hint: str) -> Generator[None]:
    """Turn the many ways to run out of memory into an OutOfMemoryError with a hint about what would need less.

    Args:
        doing: what needed the memory, as in "while training".
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        reason = out_of_memory_reason(error)
        if reason is None:
            raise
        raise OutOfMemoryError(f"out of memory {doing}: {reason}", where=where, hint=hint) from error


def require(module: str, extra: str) -> Any:
    """Import a module of an optional package.

    Raises:
        MissingExtraError: the module, or a package that it needs, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"the package {error.name!r} is not installed", hint=f'pip install "corral[{extra}]"'
        ) from None
