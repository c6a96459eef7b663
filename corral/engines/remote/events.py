"""What servers of the vLLM kind send back from `/v1/completions`: chunks of a stream, whole answers, errors in their place.

Fields that nobody here asks for are passed over. It does not know who asked, or for what.
"""

from __future__ import annotations

from pydantic import BaseModel

from corral.engines.base import Finish
from corral.engines.remote.http_errors import Lost
from corral.errors import EngineError

_PASSING = ("engine_unavailable", "503", "429")  # codes of errors amid a stream that another try may not meet


class Logprobs(BaseModel):
    """Of the tokens of a choice; null for one that nothing precedes."""

    token_logprobs: list[float | None] = []


class NewTokens(BaseModel):
    """A choice of a chunk, or of a whole answer."""

    index: int = 0
    text: str = ""
    token_ids: list[int] | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None

    @property
    def finish(self) -> Finish | None:
        """Why it ended, if it has. Raises: Lost (the server went down), EngineError (nobody knows that reason)."""
        match self.finish_reason:
            case "stop" | "length" | None as reason:
                return reason
            case "abort":  # vLLM, when it shuts down
                raise Lost("broke off its answer")
            case reason:
                raise EngineError(f"the endpoint ended a choice with the reason {reason!r}")


class Fault(BaseModel):
    """An error amid a stream."""

    message: str = "no reason is given"
    code: str | int | None = None

    def as_exception(self) -> Exception:
        """Lost where another try may not meet it, else EngineError."""
        what = f"the endpoint failed amid an answer: {self.message}"
        return Lost(what) if str(self.code) in _PASSING else EngineError(what)


class Event(BaseModel):
    """A chunk, a whole answer, or an error."""

    choices: list[NewTokens] = []
    error: Fault | None = None
