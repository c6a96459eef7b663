"""What the routes of OpenAI's protocols share, as types: the limits, a refusal, the fields of every request, usage and votes.

A field that would change the answer and is not supported is refused by name, and so is a field nobody knows; what clients
send by habit and changes nothing is accepted. The types hold what can be judged from the request alone, in a time that a
wrong request cannot stretch: of a long list the first wrong entry is told, and of many unknown fields one. They do not know
the model, its context, or the limits of a server that has others than the usual ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, TypeAlias, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from corral.answering.consensus import Method, StopRule
from corral.errors import InputError


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask of the server."""

    body_bytes: int = 2**20
    n: int = 16
    """Choices of one prompt."""
    prompts: int = 64
    """Prompts of one request, where a request may hold several."""
    choices: int = 64
    """Choices of all its prompts."""
    inputs: int = 1024
    """Texts of one request that are embedded."""
    stop_characters: int = 256
    """Length of one stop string."""
    messages: int = 2048
    """Of one prompt, with those that were stored before."""
    parts: int = 1024
    """Parts of one message."""
    prompt_characters: int = 2**18
    """Characters of one prompt as it came, which are counted before its tokens are."""
    prompt_tokens: int = 32768
    """Tokens of one prompt, with all that is shown before the question."""
    max_tokens: int = 8192
    """The most tokens of one choice that may be asked for."""
    default_tokens: int = 4096
    """The most tokens of an answer whose request does not say how many it wants; the context may set fewer."""
    step_tokens: int = 2**25
    """Tokens of one request that may have to be read again to find the most likely ones of its prompts: half the square of the
    length of each, which one prompt of 8192 comes to."""

    @property
    def tokens(self) -> int:
        """Tokens of one request, of all its prompts and of the answers they may get: what one prompt may come to with `n`
        choices."""
        return self.prompt_tokens + self.n * self.max_tokens


USUAL = Limits()
"""To which the types hold lists before they look at the entries."""
MAX_STOPS = 16
"""Stop strings of a request of `/v1/completions`: tasks of lm-eval have more than OpenAI's four, which other routes take."""
MAX_ID = 2**31
"""Over every id of a token, and every count of them: engines compute with numbers of a fixed size."""
_MOST_SHOWN = 1000


class Refused(InputError):
    """A request that is answered with an error.

    Args:
        status: the HTTP status.
        what: the fault, for the person who reads it.
        param: the field it is about.
        code: what programs know it by.
        retry_seconds: after how long the same request may fare better.
    """

    def __init__(
        self,
        status: int,
        what: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_seconds: int | None = None,
    ) -> None:
        super().__init__(what, where=param)
        self.status = status
        self.code = code
        self.retry_seconds = retry_seconds

    def body(self) -> ErrorBody:
        """The form it is sent in."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        param = None if self.where is None else _short(self.where)
        return ErrorBody(error=ErrorDetail(message=_short(self.what), type=kind, param=param, code=self.code))


def _short(text: str) -> str:
    """A text that may quote what a client sent, without the middle where it is long."""
    half = _MOST_SHOWN // 2
    return text if len(text) <= _MOST_SHOWN else f"{text[:half]} … {text[-half:]}"


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is not a success, and the last event of a stream that broke."""

    error: ErrorDetail


@dataclass(frozen=True)
class _Only(AfterValidator):
    """A check that the OpenAPI document tells."""

    harmless: tuple[object, ...] = ()

    def __get_pydantic_json_schema__(self, _: object, __: object) -> dict[str, Any]:
        return {"enum": [*self.harmless]}


def only(*harmless: object) -> AfterValidator:
    """Accepts values that change nothing, and refuses a field that would have to be supported otherwise."""

    def check(value: object) -> object:
        if value not in harmless:
            shown = " or ".join("null" if v is None else repr(v).replace("'", '"') for v in harmless)
            raise PydanticCustomError(
                "unsupported", "is not supported by this server: leave it out (or {shown})", {"shown": shown}
            )
        return value

    return _Only(check, harmless)


Nothing: TypeAlias = Annotated[Any, only(None)]
Empty: TypeAlias = Annotated[Any, only(None, [], {})]
Zero: TypeAlias = Annotated[Any, only(None, 0)]
Ignored: TypeAlias = dict[Any, Any] | None
"""An object whose fields change nothing."""


class Body(BaseModel):
    """Base of all that a request may hold."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, data: Any) -> Any:
        """Leave one unknown field of many: it is refused all the same, and the others are not looked at."""
        fields = cls.model_fields
        if not isinstance(data, dict) or len(cast(dict[str, Any], data)) <= len(fields):
            return cast(Any, data)
        sent = cast(dict[str, Any], data)
        unknown = next(name for name in sent if name not in fields)
        return {name: value for name, value in sent.items() if name in fields or name is unknown}


class StreamOptions(Body):
    """How a stream is sent."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, only(None, False)] = None


class Ask(Body):
    """What every request for text may hold. `top_k` is an extension."""

    model: str
    n: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=MAX_ID)

    # Sent by habit.
    user: str | None = None

    # Would change the answer, save for the values that do not.
    presence_penalty: Zero = None
    frequency_penalty: Zero = None
    logit_bias: Empty = None

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer tells log-probabilities."""
        return False

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ConsensusWish(Body):
    """That several answers are drawn and the one is given that agrees best with the others."""

    method: Method
    n: int = Field(5, ge=2)
    """Answers drawn."""
    stop: StopRule = "lossless"
    """When the rest is cancelled: `never`, `lossless` (once they cannot change the choice), or `adaptive` (also at a lead that
    is 95 % certain; of votes only)."""

    @model_validator(mode="after")
    def _votes(self) -> Self:
        if self.stop == "adaptive" and self.method not in ("majority", "rouge-l+math"):
            raise PydanticCustomError("adaptive", "'stop': \"adaptive\" counts votes, and this method has none")
        return self


class AskConversation(Ask):
    """What every request may hold that is about a conversation. `consensus` is an extension.

    Left out, the answer is chosen as the server was told; null turns that off.
    """

    consensus: ConsensusWish | None = None


def refusal(faults: Sequence[Any]) -> Refused:
    """What pydantic found wrong with a request → a 400 that names the field."""
    # Of a union, pydantic lists the faults of each alternative: the deepest is of the one that was meant; where all are as
    # deep, the one that is about more than the type.
    fault = max(faults, key=lambda each: (len(each["loc"]), not each["type"].endswith("_type")))
    if fault["type"] == "json_invalid":
        return Refused(400, "the body is not valid JSON")
    place: list[Any] = list(fault["loc"])[1:]
    if not place:
        return Refused(400, f"the body must be a JSON object, sent as application/json: {fault['msg']}")
    is_unknown = fault["type"] == "extra_forbidden"
    fields = _fields(Body)
    named = [p for p in place[:-1] if isinstance(p, int) or p in fields]
    if is_unknown or isinstance(place[-1], int) or place[-1] in fields:
        named.append(place[-1])
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in named).lstrip(".")
    if is_unknown:
        return Refused(400, f"{param!r} is not a field this server knows", param=param, code="unknown_parameter")
    if fault["type"] == "unsupported":
        return Refused(400, f"{param!r} {fault['msg']}", param=param, code="unsupported_parameter")
    return Refused(400, f"{param!r}: {fault['msg']}", param=param)


def _fields(body: type[Body]) -> set[str]:
    """The names of all fields that a request may hold."""
    return set(body.model_fields).union(*map(_fields, body.__subclasses__()))


class Usage(BaseModel):
    """Tokens: the prompt's once, with the examples shown before the question, and those drawn for all choices or candidates (a
    stop token is not counted)."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CandidateShown(BaseModel):
    """One of the answers that were voted on."""

    text: str
    finish_reason: Literal["stop", "length", "cancelled"]
    """`cancelled`: it was not needed, and is as far as it came."""
    score: float | None
    """Mean agreement with the others, or the share of the votes; null if it was not needed."""
    result: str | None
    """What was counted, where votes were."""


class VoteShown(BaseModel):
    """How the answer was chosen."""

    method: Method
    winner: int
    """Its place among the candidates."""
    candidates: list[CandidateShown]
    cancelled: int
    """Candidates that were not needed."""


class Model(BaseModel):
    """An entry of `/v1/models`. Extensions: `max_model_len`, most tokens of prompt and answer together, and `task`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "corral"
    max_model_len: int
    task: Literal["chat", "embeddings"] = "chat"


class ModelList(BaseModel):
    """`/v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]
