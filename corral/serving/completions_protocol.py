"""OpenAI's text completion protocol as types: text or token ids in, their continuation out.

It includes the extensions of vLLM that make it exact for programs: token ids in the response, and ids that end it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, Field, PlainValidator
from pydantic_core import PydanticCustomError

from corral.serving.protocol import (
    DEFAULT_LIMITS,
    MAX_ID,
    GenerationRequest,
    MustBeNull,
    MustBeZero,
    Usage,
    unsupported_except,
)

MAX_STOP_IDS = 128


def _parse_prompts(value: Any) -> list[str | list[int]]:
    """Accept one text, several texts, the ids of one prompt or of several, and return a list of prompts."""
    if isinstance(value, str):
        return [value]
    # Not a pydantic union: that would record an error for each of a million ids.
    kinds: set[type] = set(map(type, value)) if isinstance(value, list) else set()
    if kinds == {int}:
        return [value]
    if kinds in ({str}, {list}) and len(value) > DEFAULT_LIMITS.prompts:
        raise PydanticCustomError("too_long", "at most {most} prompts are served", {"most": DEFAULT_LIMITS.prompts})
    if kinds == {str} or (kinds == {list} and all(set(map(type, ids)) == {int} for ids in value)):
        return value
    raise PydanticCustomError("prompt", "must be text, a list of texts, a list of token ids, or a list of such lists")


# For the OpenAPI document.
_PromptForm: TypeAlias = str | list[str] | list[int] | list[list[int]]
Prompts: TypeAlias = Annotated[Any, PlainValidator(_parse_prompts, json_schema_input_type=_PromptForm)]


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`.

    Extensions, named as vLLM's: `return_token_ids`, `stop_token_ids`, `ignore_eos`, `add_special_tokens`, `top_k`.
    """

    prompt: Prompts
    max_tokens: int | None = Field(None, ge=0)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0)
    return_token_ids: bool | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0, lt=MAX_ID)]] | None = Field(
        None, max_length=MAX_STOP_IDS, fail_fast=True
    )
    ignore_eos: bool | None = None
    add_special_tokens: bool | None = None

    # Unsupported, except for values that change nothing.
    best_of: Annotated[Any, unsupported_except(None, 1)] = None
    suffix: MustBeNull = None
    min_p: MustBeZero = None
    repetition_penalty: Annotated[Any, unsupported_except(None, 1)] = None
    skip_special_tokens: Annotated[Any, unsupported_except(None, True)] = None

    @property
    def wants_logprobs(self) -> bool:  # noqa: D102 (see GenerationRequest)
        return self.logprobs is not None


class TextLogprobs(BaseModel):
    """The tokens of a choice, one entry each. A token that is not valid UTF-8 is written as `bytes:\\xe2\\x80`."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    """null for the first token of a prompt; -9999 for a token of probability 0."""
    top_logprobs: list[dict[str, float] | None] | None = None
    """With `logprobs: 1`, for each position: the token itself and the most likely token; null where that is not known."""
    text_offset: list[int] = []
    """Where each token begins in the text, in characters."""


class TextChoice(BaseModel):
    """A continuation, or in a stream the new part of one."""

    index: int
    """Numbers the choices of the first prompt, then those of the second, and so on."""
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    token_ids: list[int] | None = None
    """The generated ids, with `return_token_ids`."""
    prompt_token_ids: list[int] | None = None
    """With `return_token_ids`; in a stream, in the first chunk of each choice."""


class TextCompletion(BaseModel):
    """A response, or a chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[TextChoice]
    usage: Usage | None = None
