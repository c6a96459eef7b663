"""Requests that mean harm: as large, deep, long or odd as a client can send them, to every route of the server.

Each should get an answer or a clear error, while other requests go on. `serve.py` measures the longest stall of the server's
event loop that one of them causes; a test sends them without a clock.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import quote

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
EMBEDDINGS, CONVERSATIONS = "/v1/embeddings", "/v1/conversations"
EMBEDDING_MODEL = "all-minilm-l6-v2"

MEGABYTE = 2**20
MOST_CHARACTERS = 2**18
"""Of a prompt, by the server's own limit: the longest that it tokenises."""
MOST_BYTES = 1_000_000
"""Of the JSON of a text, so that the body is not too large to be read at all."""
EMBEDDED = 8_000
"""Characters of an odd text to embed: each window of it is computed."""
MANY = 100_000


class Hostile(NamedTuple):
    """A request; `{conversation}` in its path stands for the id of a stored conversation."""

    name: str
    method: str
    path: str
    content: bytes = b""


def prepare(size: int) -> list[dict[str, Any]]:
    """The items of a conversation to be stored before: so many of 40,000 characters each."""
    text = "Two plus two is four. " * 1820
    return [{"type": "message", "role": "user", "content": text} for _ in range(size)]


def requests(model: str, scale: float = 1) -> Iterator[Hostile]:
    """All of them; with a smaller `scale` they are that much smaller."""
    for name, fields in {**_texts(scale), **_messages(scale), **_settings(model, scale)}.items():
        messages = fields.pop("messages", _ask("Two?"))
        yield _post(f"chat: {name}", CHAT, {"model": model, "max_tokens": 4, "messages": messages, **fields})
    for name, fields in _prompts(scale).items():
        yield _post(f"completions: {name}", TEXT, {"model": model, "max_tokens": 4, **fields})
    for name, text in _odd_texts(scale).items():
        yield _post(f"completions: {name}", TEXT, {"model": model, "max_tokens": 1, "prompt": text, "echo": True})
        yield _post(f"responses: {name}", RESPONSES, {"model": model, "max_output_tokens": 1, "input": text})
        yield _post(f"embeddings: {name}", EMBEDDINGS, {"model": EMBEDDING_MODEL, "input": text[:EMBEDDED]})
        yield _post(f"tokenize: {name}", "/tokenize", {"model": model, "prompt": text})
    for name, input_ in _inputs(scale).items():
        yield _post(f"embeddings: {name}", EMBEDDINGS, {"model": EMBEDDING_MODEL, "input": input_})
    for path in (CHAT, TEXT, RESPONSES, EMBEDDINGS, CONVERSATIONS, "/tokenize", "/detokenize"):
        for name, content in _broken_json(scale).items():
            yield Hostile(f"{path}: {name}", "POST", path, content)
    yield from _stored(model, scale)
    yield from _paths(scale)


def _ask(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def _post(name: str, path: str, body: Any) -> Hostile:
    try:
        content = json.dumps(body, ensure_ascii=False).encode()  # escapes would make it larger than bodies may be
    except UnicodeEncodeError:
        content = json.dumps(body).encode()
    return Hostile(name, "POST", path, content)


def _odd_texts(scale: float) -> dict[str, str]:
    """Texts that cost a tokenizer, a template or a pattern more than plain words do."""
    length = int(MOST_CHARACTERS * scale)
    units = {
        "one letter": "a",
        "words": "word ",
        "spaces": " ",
        "line ends": "\n",
        "digits": "9",
        "special tokens": "<|im_end|>",
        "beginnings of special tokens": "<|",
        "template marks": "{{ x }}{% if %}",
        "emoji": "👩‍👩‍👧‍👦",
        "combining marks": "e\u0301\u0323\u0302",
        "right to left": "שלום\u202e",
        "no characters": "\ue000\uffff\U000f0000",
        "half surrogates": "\ud83d",
        "zeros": "\0",
        "Chinese": "東京都港区",
    }
    texts: dict[str, str] = {}
    for name, unit in units.items():
        characters = min(length, int(MOST_BYTES * scale) // len(json.dumps(unit)) * len(unit))
        texts[name] = (unit * (characters // len(unit) + 1))[:characters]
    return texts


def _texts(scale: float) -> dict[str, dict[str, Any]]:
    texts = {name: {"messages": _ask(text)} for name, text in _odd_texts(scale).items()}
    return texts | {"2 MB of text": {"messages": _ask("word " * int(2 * MEGABYTE * scale / 5))}}


def _messages(scale: float) -> dict[str, dict[str, Any]]:
    count = max(2, int(2048 * scale))
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"Message {i}"} for i in range(count - 1)]
    parts = [{"type": "text", "text": "x"} for _ in range(int(1024 * scale) + 1)]
    return {
        "2,048 messages": {"messages": [*turns[: count - 1 - count % 2], *_ask("Two?")]},
        "2,048 long messages": {"messages": [{"role": "user", "content": "x" * 400} for _ in range(count)]},
        "20,000 messages": {"messages": _ask("x") * (10 * count)},
        "1,024 parts in each of 16 messages": {"messages": _ask(parts) * 16},
        "empty messages": {"messages": _ask("") * count},
        "deep content": {"messages": _ask(_deep(int(500 * scale)))},
    }


def _settings(model: str, scale: float) -> dict[str, dict[str, Any]]:
    many = int(MANY * scale)
    stops = [("ab" * 128)[: 240 + i] for i in range(16)]
    tokens = int(2000 * scale)
    votes = {f"a vote of 16 long answers by {method}": {
        "max_tokens": tokens, "temperature": 0.9, "consensus": {"method": method, "n": 16, "stop": "never"}
    } for method in ("majority", "rouge-l", "rouge-l+math", "cosine")}  # fmt: skip
    return votes | {
        "16 long answers": {"n": 16, "max_tokens": tokens, "temperature": 0.9},
        "16 long answers streamed": {"n": 16, "max_tokens": tokens, "temperature": 0.9, "stream": True},
        "16 long answers with log-probs": {"n": 16, "max_tokens": tokens, "logprobs": True, "top_logprobs": 20},
        "16 long stop strings": {"stop": stops, "max_tokens": tokens, "n": 4},
        "stop strings of one letter": {"stop": [chr(0x4E00 + i) for i in range(16)], "max_tokens": tokens},
        "100,000 stop strings": {"stop": ["x"] * many},
        "a stop string of 1 MB": {"stop": "x" * int(MEGABYTE * 0.9 * scale)},
        "80,000 biases": {"logit_bias": {str(i): 1 for i in range(many * 4 // 5)}},
        "100,000 stop ids": {"stop_token_ids": [*range(many)]},
        "100,000 pairs of metadata": {"metadata": {str(i): "x" for i in range(many // 2)}},
        "100,000 unknown fields": {f"field {i}": 1 for i in range(many // 2)},
        "a deep unknown field": {"extra": _deep(int(900 * scale))},
        "a long model name": {"model": "x" * int(MEGABYTE * 0.9 * scale)},
        "long options": {"options": {str(i): i for i in range(many // 2)}, "chat_template_kwargs": {"x": "y" * many}},
        "numbers without measure": {"temperature": 1e308, "seed": 10**4000, "max_tokens": 10**18, "top_k": 10**30},
    }


def _deep(levels: int) -> Any:
    value: Any = "end"
    for _ in range(levels):
        value = [value]
    return value


def _prompts(scale: float) -> dict[str, dict[str, Any]]:
    many = int(MANY * scale)
    return {
        "64 prompts of 4,000 characters": {"prompt": ["word " * int(800 * scale)] * 64, "n": 1},
        "64 prompts with 16 choices": {"prompt": ["a"] * 64, "n": 16},
        "100,000 prompts": {"prompt": ["a"] * many},
        "100,000 empty prompts of ids": {"prompt": [[]] * many},
        "100,000 ids": {"prompt": [7] * many},
        "8,000 ids scored": {"prompt": [7] * int(8000 * scale), "echo": True, "logprobs": 5, "max_tokens": 0},
        "8,000 ids shown": {"prompt": [7] * int(8000 * scale), "echo": True, "return_token_ids": True, "n": 16},
        "ids that do not exist": {"prompt": [2**31 - 1, 2**63, -1]},
        "huge ids": {"prompt": [10**100]},
    }


def _inputs(scale: float) -> dict[str, Any]:
    many = int(MANY * scale)
    return {
        "1,024 short texts": ["Two plus two is four."] * int(1024 * scale),
        "8 long texts": ["Two plus two is four. " * int(1400 * scale)] * 8,
        "100,000 texts": ["a"] * many,
        "100,000 empty lists": [[]] * many,
        "100,000 ids": [7] * many,
        "1,024 lists of ids": [[7] * 4] * int(1024 * scale),
        "texts and ids": ["a", [7]] * (many // 2),
    }


def _broken_json(scale: float) -> dict[str, bytes]:
    many = int(MANY * scale)
    return {
        "deep lists": b"[" * many + b"]" * many,
        "deep objects": b'{"a":' * many + b"1" + b"}" * many,
        "an unfinished text": b'{"model": "' + b"x" * int(MEGABYTE * 0.9 * scale),
        "a number of 900,000 digits": b'{"model": ' + b"9" * (9 * many) + b"}",
        "one key 100,000 times": b"{" + b",".join([b'"n":1'] * many) + b"}",
        "100,000 keys": json.dumps({f"k{i}": i for i in range(many // 2)}).encode(),
        "escapes": b'{"model": "' + b"\\u0000" * many + b'"}',
        "no UTF-8": b'{"model": "' + b"\xff" * many + b'"}',
        "spaces": b" " * (9 * many) + b"{}",
        "2 MB": b'{"model": "' + b"x" * int(2 * MEGABYTE * scale) + b'"}',
        "a list of zeros": b"[" + b"0," * (4 * many) + b"0]",
        "nothing": b"",
    }


def _stored(model: str, scale: float) -> Iterator[Hostile]:
    """Requests about conversations and responses."""
    count = max(1, int(2048 * scale))
    items = [{"type": "message", "role": ("user", "assistant")[i % 2], "content": f"Message {i}"} for i in range(count)]
    response = {"model": model, "max_output_tokens": 1}
    bodies: dict[str, dict[str, Any]] = {
        "2,048 items": {"input": [*items, {"role": "user", "content": "Two?"}][1:]},
        "2,048 items cut to the context": {
            "input": [*items, {"role": "user", "content": "Two?"}][1:],
            "truncation": "auto",
        },
        "a stored conversation cut to the context": {
            "input": "Two?",
            "conversation": "{conversation}",
            "truncation": "auto",
        },
        "a stored conversation": {"input": "Two?", "conversation": "{conversation}"},
        "long instructions": {"input": "Two?", "instructions": "word " * int(MOST_CHARACTERS * scale / 5)},
        "long ids": {"input": "Two?", "previous_response_id": "x" * int(MEGABYTE * 0.5 * scale)},
        "100,000 pairs of metadata": {"input": "Two?", "metadata": {str(i): "" for i in range(int(MANY * scale) // 2)}},
    }
    for name, body in bodies.items():
        yield _post(f"responses: {name}", RESPONSES, response | body)
    yield _post("conversations: 20 long items", CONVERSATIONS, {"items": prepare(20)})
    yield Hostile("conversations: export", "GET", CONVERSATIONS + "/{conversation}/export")
    yield Hostile("conversations: a page of long items", "GET", CONVERSATIONS + "/{conversation}/items?limit=100")
    yield Hostile("conversations: all", "GET", CONVERSATIONS + "?limit=100")
    yield Hostile(
        "conversations: a page far beyond", "GET", CONVERSATIONS + "/{conversation}/items?limit=" + "9" * 1000
    )


def _paths(scale: float) -> Iterator[Hostile]:
    """Requests whose path is what is odd."""
    long = "x" * int(8000 * scale)
    for path in ("/v1/models/", "/v1/responses/", "/v1/conversations/"):
        yield Hostile(f"{path}: a long name", "GET", path + long)
        yield Hostile(f"{path}: an odd name", "GET", path + quote("../\0\ud83d 東京%", errors="surrogatepass"))
    yield Hostile("health: many parameters", "GET", "/health?" + "a=1&" * int(2000 * scale))
    yield Hostile("no route", "GET", "/" + "/".join("abc"))
    yield Hostile("no such method", "PATCH", CHAT)
    for path in ("/metrics", "/openapi.json", "/docs", "/version", "/v1/models", "/health/ready"):
        yield Hostile(path, "GET", path)
