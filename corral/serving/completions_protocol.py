"""OpenAI's older protocol, text or token ids in and their continuation out, as types.

vLLM's extensions that make it exact for programs are part of it: ids in the answer, and what ends one. As in `protocol`, the
types hold what can be judged from the request alone: they do not know the model or its context.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, Field, PlainValidator
from pydantic_core import PydanticCustomError

from corral.serving.protocol import MAX_ID, USUAL, Ask, Nothing, Usage, Zero, only

MAX_STOP_IDS = 128


def _prompts(value: Any) -> list[str | list[int]]:
    """One text, several, the ids of one, or the ids of several → a list of prompts."""
    if isinstance(value, str):
        return [value]
    # By hand: a union of lists would be tried list by list, with a fault noted for each of a million ids.
    kinds: set[type] = set(map(type, value)) if isinstance(value, list) else set()
    if kinds == {int}:
        return [value]
    if kinds in ({str}, {list}) and len(value) > USUAL.prompts:
        raise PydanticCustomError("too_long", "at most {most} prompts are served", {"most": USUAL.prompts})
    if kinds == {str} or (kinds == {list} and all(set(map(type, ids)) == {int} for ids in value)):
        return value
    raise PydanticCustomError("prompt", "must be text, a list of texts, a list of token ids, or a list of such lists")


# As the OpenAPI document tells it.
_Form: TypeAlias = str | list[str] | list[int] | list[list[int]]
Prompts: TypeAlias = Annotated[Any, PlainValidator(_prompts, json_schema_input_type=_Form)]


class CompletionRequest(Ask):
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

    # Would change the answer, save for the values that do not.
    best_of: Annotated[Any, only(None, 1)] = None
    suffix: Nothing = None
    min_p: Zero = None
    repetition_penalty: Annotated[Any, only(None, 1)] = None
    skip_special_tokens: Annotated[Any, only(None, True)] = None

    @property
    def wants_logprobs(self) -> bool:  # noqa: D102 (see Ask)
        return self.logprobs is not None


class TextLogprobs(BaseModel):
    """The tokens of a choice, one entry each. A token that is no whole text is written as `bytes:\\xe2\\x80`."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    """null for the first token of a prompt, which nothing precedes; -9999 for one that is impossible."""
    top_logprobs: list[dict[str, float] | None] | None = None
    """With `logprobs: 1`, of each token itself and of the most likely one in its place; null where that is not known."""
    text_offset: list[int] = []
    """Where in the text each begins, in characters."""


class TextChoice(BaseModel):
    """A continuation, or new text of one."""

    index: int
    """Counts the choices of the first prompt, then those of the second, and so on."""
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    token_ids: list[int] | None = None
    """Drawn, where asked for."""
    prompt_token_ids: list[int] | None = None
    """Where asked for; in a stream, in the first chunk of each choice."""


class TextCompletion(BaseModel):
    """An answer, or an event of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[TextChoice]
    usage: Usage | None = None
