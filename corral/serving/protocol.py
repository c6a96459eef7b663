"""Types that OpenAI's protocols share: request limits, common request fields, usage and consensus results.

A field that is unknown, or would change the answer and is not supported, is refused by name; fields that change nothing are
accepted. The types check what can be checked without the model, and stop at the first fault, so that a large malformed
request costs no more than a good one. They use the default limits; a server's own are checked in `generation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, TypeAlias, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from corral.answering.consensus import Method, StopRule
from corral.serving.errors import Refused


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Limits of one request; `ServerLimits` holds those of the whole server."""

    body_bytes: int = 2**20
    n: int = 16
    """Choices of one prompt."""
    prompts: int = 64
    """Prompts of one `/v1/completions` request."""
    choices: int = 64
    """Choices of all prompts of one request."""
    inputs: int = 1024
    """Texts of one `/v1/embeddings` request."""
    stop_characters: int = 256
    """Length of one stop string."""
    messages: int = 2048
    """Messages of one prompt, with those of the stored conversation."""
    parts: int = 1024
    """Parts of one message."""
    prompt_characters: int = 2**18
    """Characters of one prompt, checked before it is tokenised."""
    prompt_tokens: int = 32768
    """Tokens of one prompt, with few-shot examples."""
    max_tokens: int = 8192
    """Largest `max_tokens` of a request."""
    default_tokens: int = 4096
    """`max_tokens` of a request that gives none; less if the context leaves less."""
    step_tokens: int = 2**25
    """Tokens that finding the most likely tokens of prompts may read again, in one request: half the square of the length of
    each prompt; one prompt of 8192 tokens reaches it."""

    @property
    def tokens(self) -> int:
        """Tokens of all prompts and answers of one request: as many as one prompt of the largest size with `n` choices."""
        return self.prompt_tokens + self.n * self.max_tokens


DEFAULT_LIMITS = RequestLimits()
"""The types check lengths of lists against these before they look at the entries."""
MAX_STOPS = 16
"""Stop strings of a `/v1/completions` request: tasks of lm-eval have more than the four that other routes take, as OpenAI."""
MAX_ID = 2**31
"""Greater than all token ids and counts of tokens: engines use integers of a fixed size."""


@dataclass(frozen=True)
class _UnsupportedExcept(AfterValidator):
    """A validator that also appears in the OpenAPI document, as an enum."""

    harmless: tuple[object, ...] = ()

    def __get_pydantic_json_schema__(self, _: object, __: object) -> dict[str, Any]:
        return {"enum": [*self.harmless]}


def unsupported_except(*harmless: object) -> AfterValidator:
    """Accept values that change nothing, and refuse all others as unsupported."""

    def check(value: object) -> object:
        if value not in harmless:
            shown = " or ".join("null" if v is None else repr(v).replace("'", '"') for v in harmless)
            raise PydanticCustomError(
                "unsupported", "is not supported by this server: leave it out (or {shown})", {"shown": shown}
            )
        return value

    return _UnsupportedExcept(check, harmless)


MustBeNull: TypeAlias = Annotated[Any, unsupported_except(None)]
MustBeEmpty: TypeAlias = Annotated[Any, unsupported_except(None, [], {})]
MustBeZero: TypeAlias = Annotated[Any, unsupported_except(None, 0)]
IgnoredObject: TypeAlias = dict[Any, Any] | None
"""An object whose fields change nothing."""


class StrictModel(BaseModel):
    """Base of all parts of a request: unknown fields and values of other types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _keep_one_unknown(cls, data: Any) -> Any:
        """Keep one unknown field, which is enough to refuse the request, so that pydantic does not list thousands."""
        fields = cls.model_fields
        if not isinstance(data, dict) or len(cast(dict[str, Any], data)) <= len(fields):
            return cast(Any, data)
        sent = cast(dict[str, Any], data)
        unknown = next(name for name in sent if name not in fields)
        return {name: value for name, value in sent.items() if name in fields or name is unknown}


class StreamOptions(StrictModel):
    """Options of a streamed response."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, unsupported_except(None, False)] = None


class GenerationRequest(StrictModel):
    """Fields of every request that generates text. `top_k` is an extension."""

    model: str
    n: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=MAX_ID)

    # Accepted without effect.
    user: str | None = None

    # Unsupported, except for values that change nothing.
    presence_penalty: MustBeZero = None
    frequency_penalty: MustBeZero = None
    logit_bias: MustBeEmpty = None

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_logprobs(self) -> bool:
        """Whether the response includes log-probabilities."""
        return False

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ConsensusOptions(StrictModel):
    """Ask for several answers, of which the one that agrees best with the others is returned."""

    method: Method
    n: int = Field(5, ge=2)
    """Number of answers."""
    stop: StopRule = "lossless"
    """When unfinished answers are cancelled: `never`, `lossless` (once they cannot change the choice), or `adaptive` (also
    once the lead is 95 % certain; for majority votes only)."""

    @model_validator(mode="after")
    def _check_stop(self) -> Self:
        if self.stop == "adaptive" and self.method not in ("majority", "rouge-l+math"):
            raise PydanticCustomError("adaptive", "'stop': \"adaptive\" counts votes, and this method has none")
        return self


class ConversationRequest(GenerationRequest):
    """Fields of every request about a conversation. `consensus` is an extension.

    Left out, the model's own consensus applies; null turns it off.
    """

    consensus: ConsensusOptions | None = None


def validation_error(errors: Sequence[Any]) -> Refused:
    """Turn pydantic's errors into a 400 that names the field."""
    # For a union, pydantic lists the errors of each alternative. The deepest one belongs to the alternative that was meant;
    # among equally deep ones, prefer an error that is not about the type.
    error = max(errors, key=lambda each: (len(each["loc"]), not each["type"].endswith("_type")))
    if error["type"] == "json_invalid":
        return Refused(400, "the body is not valid JSON")
    path: list[Any] = list(error["loc"])[1:]
    if not path:
        return Refused(400, f"the body must be a JSON object, sent as application/json: {error['msg']}")
    is_unknown = error["type"] == "extra_forbidden"
    fields = _field_names(StrictModel)
    named = [part for part in path[:-1] if isinstance(part, int) or part in fields]
    if is_unknown or isinstance(path[-1], int) or path[-1] in fields:
        named.append(path[-1])
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in named).lstrip(".")
    if is_unknown:
        return Refused(400, f"{param!r} is not a field this server knows", param=param, code="unknown_parameter")
    if error["type"] == "unsupported":
        return Refused(400, f"{param!r} {error['msg']}", param=param, code="unsupported_parameter")
    return Refused(400, f"{param!r}: {error['msg']}", param=param)


def _field_names(body: type[StrictModel]) -> set[str]:
    """The names of all fields of all requests."""
    return set(body.model_fields).union(*map(_field_names, body.__subclasses__()))


class Usage(BaseModel):
    """Token counts: of the prompt, once, with few-shot examples; of all choices or candidates, without end tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ConsensusCandidate(BaseModel):
    """One of the answers that consensus chose from."""

    text: str
    finish_reason: Literal["stop", "length", "cancelled"]
    """`cancelled`: it was not needed; `text` is what there was of it."""
    score: float | None
    """Mean agreement with the others, or share of the votes; null for a cancelled one."""
    result: str | None
    """The extracted result that was counted in a majority vote."""


class ConsensusResult(BaseModel):
    """How the answer was chosen."""

    method: Method
    winner: int
    """Index of the chosen candidate."""
    candidates: list[ConsensusCandidate]
    cancelled: int
    """Number of cancelled candidates."""


class Model(BaseModel):
    """An entry of `/v1/models`. Extensions: `max_model_len` (most tokens of prompt and answer together), `max_requests` (most
    requests that run at once, of all models together), `task` and `alias_of` (another name of that model)."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "corral"
    max_model_len: int
    max_requests: int
    task: Literal["chat", "embeddings"] = "chat"
    alias_of: str | None = None


class ModelList(BaseModel):
    """`/v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]
