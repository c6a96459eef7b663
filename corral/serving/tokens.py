"""The routes `/tokenize` and `/detokenize`, as vLLM's: text or messages → token ids, and ids → text.

A text's ids are those of the same prompt of `/v1/completions`; those of messages are the prompt of `/v1/chat/completions`,
without the examples that a model's prompting may add.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from corral.errors import TemplateError
from corral.messages import Conversation
from corral.serving.chat import Messages, build_conversation
from corral.serving.errors import Refused
from corral.serving.generation import (
    arrange_system,
    check_characters,
    check_conversation,
    check_known_fields,
    check_rules,
)
from corral.serving.models import ServedModel, ServedModels
from corral.serving.protocol import MAX_ID
from corral.serving.request_fields import RequestBody, report
from corral.serving.streams import json_response

# Rough costs, to decide whether to use a thread.
_CHARACTERS_PER_TOKEN = 8
_CHARACTERS_PER_MESSAGE = 50


class TokenizeRequest(RequestBody):
    """`POST /tokenize`: either `prompt` or `messages`."""

    model: str | None = None
    """The server's first model if left out."""
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    """Begin a prompt as the tokenizer does, with BOS if it has one; messages have what their template writes."""
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None


class Tokens(BaseModel):
    """The response of `/tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(RequestBody):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0, lt=MAX_ID)]], Field(fail_fast=True)]


class Detokenized(BaseModel):
    """The response of `/detokenize`."""

    prompt: str


def build_router(models: ServedModels) -> APIRouter:
    """The routes, also under `/v1`."""
    router = APIRouter()

    def find(name: str | None) -> ServedModel:
        return models.all()[0] if name is None else models.get(name)

    @router.post("/tokenize")
    @router.post("/v1/tokenize", include_in_schema=False)
    async def tokenize(body: TokenizeRequest) -> Response:  # pyright: ignore[reportUnusedFunction]
        served = find(body.model)
        return report(body.notes, json_response(await _tokenize(served, body)))

    @router.post("/detokenize")
    @router.post("/v1/detokenize", include_in_schema=False)
    async def detokenize(body: DetokenizeRequest) -> Response:  # pyright: ignore[reportUnusedFunction]
        served = find(body.model)
        check_known_fields(served.limits, body)
        vocabulary, most = served.answerer.engine.features.vocabulary, served.limits.prompt_tokens
        rules = (
            (len(body.tokens) > most, "tokens", f"at most {most} tokens are decoded at once"),
            (max(body.tokens, default=0) >= vocabulary, "tokens", f"ids are from 0 to {vocabulary - 1}"),
        )
        check_rules(rules)
        text = await served.answerer.run_in_thread_if_long(
            _CHARACTERS_PER_TOKEN * len(body.tokens), _decode, served, body.tokens
        )
        return report(body.notes, json_response(Detokenized(prompt=text)))

    return router


async def _tokenize(served: ServedModel, body: TokenizeRequest) -> str:
    """The response as JSON. Raises: Refused."""
    check_known_fields(served.limits, body)
    answerer = served.answerer
    if body.messages is not None and body.prompt is None:
        conversation = build_conversation(body.messages, body.continue_final_message, body.add_generation_prompt)
        check_conversation(served, conversation, param="messages")
        characters, param = conversation.characters + _CHARACTERS_PER_MESSAGE * len(body.messages), "messages"
        encode, arguments = _encode, (served, conversation, bool(body.return_token_strs))
    elif body.prompt is not None and body.messages is None:
        check_characters(served, len(body.prompt), param="prompt")
        characters, param = len(body.prompt), "prompt"
        begin = body.add_special_tokens is not False
        encode, arguments = _encode_text, (served, body.prompt, begin, bool(body.return_token_strs))
    else:
        raise Refused(400, "'prompt': give either it or 'messages'", param="prompt")
    try:
        return await answerer.run_in_thread_if_long(characters, encode, *arguments)
    except TemplateError as error:
        raise Refused(400, f"{param!r}: {error.what}", param=param) from error


def _encode(served: ServedModel, conversation: Conversation, names: bool) -> str:
    template = served.answerer.template
    conversation = arrange_system(template, conversation)
    encode = template.continuation if conversation.answered else template.prompt
    return _tokens(served, encode(conversation), names)


def _encode_text(served: ServedModel, text: str, begin: bool, names: bool) -> str:
    return _tokens(served, served.plain_text.ids(text, begin=begin), names)


def _tokens(served: ServedModel, ids: list[int], names: bool) -> str:
    most = served.limits.prompt_tokens
    what = f"at most {most} tokens are returned with their strings, and there are {len(ids)}"
    check_rules(((names and len(ids) > most, "return_token_strs", what),))
    strings: Any = served.answerer.template.tokenizer.convert_ids_to_tokens(ids) if names else None
    return Tokens(count=len(ids), max_model_len=served.context, tokens=ids, token_strs=strings).model_dump_json()


def _decode(served: ServedModel, ids: list[int]) -> str:
    return served.answerer.template.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)
