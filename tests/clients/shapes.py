"""What a good response of each route is, in the words of OpenAI's own types."""

from __future__ import annotations

import base64
from typing import Any

import pydantic
from openai.types import Completion, CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.conversations import Conversation
from openai.types.responses import Response, ResponseStreamEvent

_EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)


def check(path: str, content: Any) -> None:
    """Raises pydantic's ValidationError if the response's JSON, or the data of its events, has another form."""
    if path == "/v1/embeddings":
        _check_embeddings(content)
    elif isinstance(content, list):
        _check_stream(path, content)
    else:
        kinds: dict[str, type[pydantic.BaseModel]] = {
            "chat.completion": ChatCompletion,
            "text_completion": Completion,
            "response": Response,
            "conversation": Conversation,
            "model": Model,
        }
        if (kind := kinds.get(content["object"])) is not None:
            kind.model_validate(content)
        else:
            assert content["object"] == "list" or content["deleted"], content


def _check_stream(path: str, events: list[Any]) -> None:
    if path == "/v1/responses":
        for event in events:
            _EVENT.validate_python(event)
        assert events[-1]["type"] in ("response.completed", "response.incomplete")
        return
    assert events[-1] == "[DONE]"
    choices = [choice for event in events[:-1] for choice in event["choices"]]
    assert any(choice["finish_reason"] for choice in choices)
    if path == "/v1/completions":  # OpenAI's type is that of a whole completion, which has a finish reason
        for choice in choices:
            choice["finish_reason"] = choice["finish_reason"] or "length"
    kind = ChatCompletionChunk if path == "/v1/chat/completions" else Completion
    for event in events[:-1]:
        kind.model_validate(event)


def _check_embeddings(content: Any) -> None:
    for each in content["data"]:
        if isinstance(each["embedding"], str):
            each["embedding"] = [*base64.b64decode(each["embedding"])]
    CreateEmbeddingResponse.model_validate(content)
