"""Texts that a template has rendered already, and texts that only mention its tokens."""

from __future__ import annotations

from typing import Any

import pytest

from corral.data.formats import FORMATS
from corral.data.formats.rendered_text import parse_rendered
from corral.messages import Conversation, Text
from tests.data.formats.rows import reason
from tests.template import real

TWO = Conversation.from_turns(("user", "Hi?"), ("assistant", "Yes."), ("user", "And?"), ("assistant", "No."))
WITH_SYSTEM = Conversation.from_turns(("system", "Be brief."), ("user", "Hi?"), ("assistant", "Yes."))


@pytest.mark.parametrize("name", ["llama-2", "llama-3", "smollm2"])
@pytest.mark.parametrize("conversation", [TWO, WITH_SYSTEM], ids=["two exchanges", "system"])
def test_what_a_real_template_renders_is_read_back_into_its_turns(name: str, conversation: Conversation) -> None:
    template = real.template(name)
    tokenizer: Any = template.tokenizer
    messages = conversation.to_json()["messages"]
    text = tokenizer.apply_chat_template(messages, chat_template=template.source, tokenize=False)
    turns = parse_rendered(text, "text") or []
    if turns[0].role == "system" and conversation is TWO:  # some templates write a system message of their own
        del turns[0]
    assert tuple(turns) == conversation.messages


def test_rendered_rows_become_conversations_in_the_formats_of_texts() -> None:
    chatml = "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
    expected = Conversation.from_turns(("user", "Hi?"), ("assistant", "Yes."))
    assert FORMATS["text"]({"text": chatml + "Yes.<|im_end|>\n"}) == expected
    assert FORMATS["text"]({"text": "<s>[INST] Hi? [/INST] Yes. </s>"}) == expected
    for completion in ("Yes.<|im_end|>", "Yes."):
        assert FORMATS["prompt-completion"]({"prompt": chatml, "completion": completion}) == expected


@pytest.mark.parametrize(
    "text",
    ["Write <|im_start|>user first.", "The tag [INST] opens a turn.", "a < b and [x]", "See <|eot_id|> there."],
)
def test_a_mention_of_a_token_stays_text(text: str) -> None:
    assert parse_rendered(text, "text") is None
    assert FORMATS["text"]({"text": text}) == Text(text)
    assert FORMATS["prompt-completion"]({"prompt": text, "completion": "x"}).messages[0].content == text  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "text",
    [
        "<|im_start|>user\nHi?",
        "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>narrator\nx<|im_end|>",
        "<|im_start|>user\nHi?<|im_start|>assistant\nYes.<|im_end|>",
        "[INST] Hi?",
        "[INST] Hi? [/INST] is how a question is marked.",
        "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nAn answer that is cut",
        "[INST] <<SYS>> Hi? [/INST] x",
        "<|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>b<|start_header_id|>assistant<|end_header_id|>\n\nc",
    ],
)
def test_what_begins_as_a_rendering_and_is_none_to_its_end_is_refused(text: str) -> None:
    assert any(
        words in reason(FORMATS["text"], {"text": text})
        for words in ("begins as a conversation rendered by", "no answer: the last message is from the user")
    )


def test_a_message_that_is_a_rendering_or_ends_in_an_end_token_is_refused() -> None:
    rendered = "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>"
    turns = [{"role": "user", "content": rendered}, {"role": "assistant", "content": "x"}]
    assert "messages.0.content is a whole conversation" in reason(FORMATS["messages"], {"messages": turns})
    assert reason(FORMATS["alpaca"], {"instruction": "i", "output": "o</s>"}) == (
        "output ends in </s>, which the template writes: remove it from the text"
    )


@pytest.mark.parametrize(
    "text",
    [
        "<|header_start|>user<|header_end|>\n\nHi?<|eot|><|header_start|>assistant<|header_end|>\n\nYes.<|eot|>",
        "<start_of_turn>user\nHi?<end_of_turn>\n<start_of_turn>model\nYes.<end_of_turn>\n",
        "<|user|>\nHi?</s>\n<|assistant|>\nYes.</s>\n",
        "<|user|>\nHi?\n<|assistant|>\nYes.<|end_of_text|>",
        "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n<|endoftext|>",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|><|end_of_text|>",
    ],
    ids=["llama-4", "gemma", "zephyr", "tulu", "chatml with two ends", "llama-3.1 with its preamble"],
)
def test_renderings_of_the_peers_are_read(text: str) -> None:
    assert FORMATS["text"]({"text": text}) == Conversation.from_turns(("user", "Hi?"), ("assistant", "Yes."))
