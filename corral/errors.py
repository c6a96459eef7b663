"""The exception tree. Knows nothing about the rest of corral.

    CorralError                    1   a fault of ours, or of the machine
    ├── InputError                 2   what the user gave cannot be used
    │   ├── RecipeError                a key, type, value or combination in a recipe
    │   ├── AssetError                 a packaged model or data set cannot be had, or is damaged
    │   ├── ModelError                 a model folder, hub id or GGUF file cannot be loaded
    │   ├── TemplateError              a chat template cannot be rendered, masked or trusted
    │   ├── DataError                  a source cannot be read, or leaves nothing to train on
    │   ├── CheckpointError            no checkpoint can be resumed from
    │   └── RunError                   a run directory is in use, or holds something else
    ├── StorageError               2   the disk is full, or a path cannot be written
    ├── DatabaseError              2   a server's database cannot be opened, reached or written
    ├── MissingExtraError          3   an optional dependency is not installed
    ├── GateError                  4   a stage ran, and what it made must not be promoted
    │   └── ContractError              two models or engines that must agree do not
    ├── TrainingError              1   training cannot go on (loss is not a number …)
    │   └── PeerError               another process of the same run has ended
    └── EngineError                1   an engine failed while it worked
        ├── RequestError           2   this engine cannot do what was asked of it
        ├── EngineUnavailableError     the engine cannot compute now, and may again later
        └── EngineClosedError          the engine was shut down, or its process died

The number is the exit code of the command line. Every error carries what is wrong (naming the value), `where` it was
found and `hint`, the next step; the command line prints the three and no traceback.
"""

from __future__ import annotations


class CorralError(Exception):
    """Base of all errors corral raises on purpose.

    Args:
        what: the fault, naming the value that caused it.
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
    """What the user gave cannot be used."""

    exit_code = 2


class RecipeError(InputError):
    """A key, type, value or combination in a recipe."""


class AssetError(InputError):
    """A packaged model or data set cannot be had, or is damaged."""


class ModelError(InputError):
    """A model folder, hub id or GGUF file cannot be loaded."""


class TemplateError(InputError):
    """A chat template cannot be rendered, masked or trusted."""


class DataError(InputError):
    """A source cannot be read, or leaves nothing to train on."""


class CheckpointError(InputError):
    """No checkpoint can be resumed from."""


class RunError(InputError):
    """A run directory is in use, or holds something else."""


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
    """A stage ran, and what it made must not be promoted."""

    exit_code = 4


class ContractError(GateError):
    """Two models or engines that must agree do not."""


class TrainingError(CorralError):
    """Training cannot go on."""


class PeerError(TrainingError):
    """Another process of the same run has ended."""


class EngineError(CorralError):
    """An engine failed while it worked.

    Args:
        what, where, hint: see CorralError.
        status: what an endpoint answered, where one did.
        retry_seconds: after how long it wants to be asked again, where it says so.
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
    """This engine cannot do what was asked of it."""

    exit_code = 2


class EngineUnavailableError(EngineError):
    """The engine cannot compute now, and may again later."""


class EngineClosedError(EngineError):
    """The engine was shut down, or its process died."""
