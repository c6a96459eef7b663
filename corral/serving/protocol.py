"""Types that OpenAI's protocols share: request limits, common request fields, usage and consensus results.

The types check what can be checked without the model, and stop at the first fault, so that a large malformed request costs no
more than a good one. They use the default limits; a server's own are checked in `generation`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias, cast

from pydantic import BaseModel, BeforeValidator, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from corral.answering.consensus import Method, StopRule
from corral.serving.errors import Refused
from corral.serving.request_fields import RequestBody, StrictModel


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
    all_parts: int = 4096
    """Parts of all messages of one request: checking one takes microseconds, on the event loop."""
    logprobs: int = 2**18
    """Log-probabilities that one request may return: those of its answers' tokens and of the most likely ones."""
    prompt_characters: int = 2**18
    """Characters of one prompt, checked before it is tokenised."""
    prompt_tokens: int = 32768
    """Tokens of one prompt, with few-shot examples."""
    max_tokens: int = 8192
    """Largest `max_tokens` of a request."""
    default_tokens: int = 4096
    """`max_tokens` of a request that gives none; less if the context leaves less."""
    strict: bool = False
    """Refuse fields that no type of request declares, and more `max_tokens` than there is room for."""

    @property
    def tokens(self) -> int:
        """Tokens of all prompts and answers of one request: as many as one prompt of the largest size with `n` choices."""
        return self.prompt_tokens + self.n * self.max_tokens


DEFAULT_LIMITS = RequestLimits()
"""The types check lengths of lists against these before they look at the entries."""
MAX_STOPS = 16
"""Stop strings of one request; OpenAI takes four, and programs send more."""
MAX_STOP_IDS = 128
MAX_BIASES = 1024
"""Tokens of one `logit_bias`."""
MAX_ID = 2**31
"""Greater than all token ids and counts of tokens: engines use integers of a fixed size."""


def texts_or_ids(most: int) -> PlainValidator:
    """Accept one text, several texts, the ids of one text or of several; the value becomes a list of texts or lists of ids."""

    def read(value: Any) -> list[str | list[int]]:
        if isinstance(value, str):
            return [value]
        # Not a pydantic union: that would record an error for each of a million ids.
        kinds: set[type] = set(map(type, value)) if isinstance(value, list) else set()
        if kinds == {int}:
            return [value]
        if kinds in ({str}, {list}) and len(value) > most:
            raise PydanticCustomError("too_long", "at most {most} texts are taken at once", {"most": most})
        if kinds == {str} or (kinds == {list} and all(set(map(type, ids)) == {int} for ids in value)):
            return value
        raise PydanticCustomError(
            "texts", "must be text, a list of texts, a list of token ids, or a list of such lists"
        )

    return PlainValidator(read, json_schema_input_type=str | list[str] | list[int] | list[list[int]])


class StreamOptions(StrictModel):
    """Options of a streamed response."""

    include_usage: bool | None = None
    ignored = frozenset({"include_obfuscation"})


def _read_length(value: Any) -> Any:
    """A number of tokens; -1 and -2 set no limit, as in llama.cpp and Ollama, and some programs send it as text."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        return int(value)
    return None if value in (-1, -2) else value


Length: TypeAlias = Annotated[int | None, BeforeValidator(_read_length)]


def _read_bias(value: Any) -> Any:
    """`{"id": bias}` → ((id, bias), …)."""
    if not isinstance(value, dict):
        raise PydanticCustomError("bias", "must be an object: token id, as text → number from -100 to 100")
    biases = cast(dict[Any, Any], value)
    if len(biases) > MAX_BIASES:
        raise PydanticCustomError("too_long", "has more than {most} tokens", {"most": MAX_BIASES})
    for id_, bias in biases.items():
        is_id = isinstance(id_, str) and id_.isascii() and id_.isdigit() and len(id_) < 11
        if not is_id or isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise PydanticCustomError("bias", "must have token ids, as text, and numbers from -100 to 100")
    return tuple((int(id_), float(bias)) for id_, bias in biases.items() if bias)


Bias: TypeAlias = Annotated[Any, PlainValidator(_read_bias, json_schema_input_type=dict[str, float])]


NO_FORMS = "answers are not held to a form, so describe it in the prompt"
"""Why a field that asks for JSON, or text of a grammar, is refused."""


class GenerationRequest(RequestBody):
    """Fields of every request that generates text.

    Extensions, named as vLLM's: `top_k` to `stop_token_ids`, and `num_ctx` and `options` as Ollama's.
    """

    model: str
    n: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Bias | None = None
    top_k: int | None = Field(None, ge=-1, lt=MAX_ID)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    min_tokens: int | None = Field(None, ge=0, lt=MAX_ID)
    stop_token_ids: list[Annotated[int, Field(ge=0, lt=MAX_ID)]] | None = Field(
        None, max_length=MAX_STOP_IDS, fail_fast=True
    )
    num_ctx: int | None = None
    """The context that a client counts on: refused if the model has less."""

    ignored = frozenset({"user"})
    # Samplers and forms of answers that this server has not, with the values that change nothing.
    only: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **dict.fromkeys(("typical_p", "tfs", "num_beams", "length_penalty", "guidance_scale"), (1,)),
        **dict.fromkeys(("top_a", "epsilon_cutoff", "eta_cutoff", "mirostat", "mirostat_mode", "dry_multiplier"), (0,)),
        **dict.fromkeys(
            ("xtc_probability", "smoothing_factor", "dynatemp_range", "no_repeat_ngram_size", "n_probs"), (0,)
        ),
        **dict.fromkeys(("use_beam_search", "early_stopping", "ban_eos_token", "prompt_logprobs"), (False,)),
        "include_stop_str_in_output": (False,),
        **dict.fromkeys(("negative_prompt", "grammar", "format", "custom_token_bans"), ("",)),
        **dict.fromkeys(("banned_strings", "bad_words", "documents", "allowed_token_ids"), ([],)),
        **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar", "json_schema"), ()),
        **dict.fromkeys(("structured_outputs", "chat_template", "truncate_prompt_tokens"), ()),
        **dict.fromkeys(("lora_path", "lora_request", "prompt_embeds", "logits_processors"), ()),
    }
    why: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("grammar", "format", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "json_schema"), NO_FORMS
    )
    renamed: ClassVar[Mapping[str, str]] = {
        "repeat_penalty": "repetition_penalty",
        "num_predict": "max_tokens",
        "n_predict": "max_tokens",
        "max_new_tokens": "max_tokens",
    }

    @classmethod
    def spread(cls, sent: dict[str, Any]) -> dict[str, Any]:
        """With the keys of `options` and `chat_template_kwargs`, and names of other servers, as fields; the own ones win."""
        fields = dict(sent)
        for place in ("options", "chat_template_kwargs"):
            if isinstance(inner := fields.get(place), dict):
                del fields[place]
                fields |= {name: value for name, value in inner.items() if fields.get(name) is None}
        for other, name in cls.renamed.items():
            if other in fields:
                value = fields.pop(other)
                fields[name] = value if fields.get(name) is None else fields[name]
        return fields

    @property
    def stops(self) -> list[str]:
        """The stop strings, each once, without empty ones."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return list(dict.fromkeys(filter(None, stops)))

    @property
    def top_logprob_count(self) -> int:
        """How many of the most likely tokens at each position are requested."""
        return 0

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
    path: list[Any] = [*list(error["loc"])[1:], *filter(None, [error.get("ctx", {}).get("field")])]
    if not path:
        return Refused(400, f"the body must be a JSON object, sent as application/json: {error['msg']}")
    fields = _field_names(StrictModel)
    named = [part for part in path[:-1] if isinstance(part, int) or part in fields]
    if error["type"] == "unsupported" or isinstance(path[-1], int) or path[-1] in fields:
        named.append(path[-1])
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in named).lstrip(".")
    if error["type"] == "unsupported":
        return Refused(400, f"{param!r} {error['msg']}", param=param, code="unsupported_parameter")
    found = "" if error["type"] == "missing" else f" ({_KINDS.get(type(error['input']), 'an object')} was sent)"
    return Refused(400, f"{param!r}: {error['msg']}{found}", param=param)


_KINDS = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
}


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


def json_with(body: BaseModel, **fields: str) -> str:
    """The JSON of a model with these fields, which are JSON already.

    A large response is put together from small parts, because a thread that encodes it at once lets nothing else run.
    """
    rest = body.model_dump_json(exclude=set(fields))[1:-1]
    return "{" + ",".join([*filter(None, [rest]), *(f'"{name}":{value}' for name, value in fields.items())]) + "}"


def json_list(items: Iterable[str]) -> str:
    """A JSON list of items that are JSON already."""
    return f"[{','.join(items)}]"
