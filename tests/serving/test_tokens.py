"""`/tokenize` and `/detokenize`, which give the ids that the other routes would compute with."""

from __future__ import annotations

from typing import Any

import pytest

from corral.messages import Conversation
from corral.serving.protocol import RequestLimits
from tests.serving.conftest import ASKED, Serve

TEXT = "What is two plus two? Ünïcode<|im_end|>"


def test_a_text_is_tokenised_as_the_prompt_of_a_completion_and_back(serve: Serve) -> None:
    server, tokenizer = serve("Hello"), serve.template.tokenizer
    for path in ("", "/v1"):
        status, answer, _ = server.call("POST", f"{path}/tokenize", {"prompt": TEXT, "return_token_strs": True})
        assert status == 200, answer
        completion = server.complete(prompt=TEXT, return_token_ids=True)[1]["choices"][0]
        assert answer["tokens"] == completion["prompt_token_ids"]
        assert answer["token_strs"] == tokenizer.convert_ids_to_tokens(answer["tokens"])
        assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 8192)
        _, text, _ = server.call("POST", f"{path}/detokenize", {"model": "m", "tokens": answer["tokens"]})
        assert text == {"prompt": TEXT}


def test_messages_are_tokenised_as_the_prompt_of_a_chat(serve: Serve) -> None:
    server, template = serve("Hello"), serve.template
    begun: Any = [*ASKED, {"role": "assistant", "content": "Two plus"}]
    expected = template.prompt(Conversation.from_turns(("user", ASKED[0]["content"])))
    assert server.call("POST", "/tokenize", {"messages": ASKED})[1]["tokens"] == expected
    more = server.call("POST", "/tokenize", {"messages": begun})[1]["tokens"]
    assert more[: len(expected)] == expected
    assert template.decode(more[len(expected) :]) == "Two plus"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": ASKED}, "prompt"),
        ("/tokenize", {"prompt": "a\ufdd0b"}, "prompt"),
        ("/tokenize", {"prompt": "a" * 101}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a" * 101}]}, "messages"),
        ("/tokenize", {"prompt": "a b " * 25, "return_token_strs": True}, "return_token_strs"),
        ("/detokenize", {"tokens": [2**20]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [5] * 51}, "tokens"),
    ],
)
def test_what_cannot_be_tokenised_is_refused_by_name(path: str, body: Any, param: str, serve: Serve) -> None:
    server = serve("Hello", limits=RequestLimits(prompt_characters=100, prompt_tokens=50))
    status, answer, _ = server.call("POST", path, body)
    assert (status, answer["error"]["param"]) == (400, param)
    assert server.call("POST", path, {**body, "model": "x"})[0] in (400, 404)
