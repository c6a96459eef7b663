"""A text's words have the ids of the whole text, and tokenizers whose rules are unknown are not cut at all."""

from __future__ import annotations

import copy
import json
from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from corral.messages import Conversation
from corral.template import Template
from corral.template.word_boundaries import split_words, words_keep_ids
from tests.template.real import template, tokenizer

WORDS = ["It's", " we'LL", " a", " b.", " -", " 12", " 3,4", " x1y", "é", " ß", "東京", " 🙂", "▁", " ▁", "`` "]
SPACES = ["\n", "\r\n", "  ", "\t"]
OTHERS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufdd0<"), max_size=6)
TEXT = st.lists(st.one_of(st.sampled_from(WORDS + SPACES), OTHERS), max_size=12).map("".join)
TOKENIZERS = {"llama-2": "llama-2", "llama-3": "llama-3", "smollm2": "chatml"}


@cache
def config(name: str) -> dict[str, Any]:
    return json.loads(tokenizer(name).backend_tokenizer.to_str())


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None, max_examples=300)
@given(text=TEXT)
@example(text='A word, and  two  spaces \n\n and 10 more: they\'re "here" . x a\u00a0b \u2028 c\x1c d\x85 e')
def test_a_text_that_is_cut_into_words_has_the_ids_that_transformers_gives_the_whole(name: str, text: str) -> None:
    chosen = template(TOKENIZERS[name])
    assert "".join(split_words(text)) == text
    question = Conversation.from_turns(("user", text))
    theirs = chosen.tokenizer.apply_chat_template(
        question.to_json()["messages"], chat_template=chosen.source, add_generation_prompt=True, return_dict=False
    )
    assert chosen.prompt(question) == list(theirs)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_tokenizers_of_the_llama_family_are_cut(name: str) -> None:
    assert words_keep_ids(config(name))
    assert template(TOKENIZERS[name])._piece_tokenizer._split_words is split_words
    assert split_words("To be, or not.") == ["To", " be,", " or", " not."]


def test_a_tokenizer_with_another_rule_is_not_cut() -> None:
    changes: dict[str, dict[str, Any]] = {
        "another pattern": {
            "pre_tokenizer": config("llama-3")["pre_tokenizer"]
            | {"pretokenizers": [{"type": "ByteLevel", "use_regex": False}]}
        },
        "a normalizer": {"normalizer": {"type": "NFC"}},
        "dropout": {"model": config("llama-3")["model"] | {"dropout": 0.1}},
        "a token of users": {"added_tokens": [{"content": "New York", "special": False}]},
        "no pre-tokenizer": {"pre_tokenizer": None},
    }
    for name, change in changes.items():
        assert not words_keep_ids(config("llama-3") | change), name


def test_a_vocabulary_with_a_space_within_a_token_is_not_cut() -> None:
    changed = copy.deepcopy(config("llama-2"))
    changed["model"]["vocab"]["of▁the"] = len(changed["model"]["vocab"])
    assert not words_keep_ids(changed)


def test_what_is_remembered_changes_no_ids() -> None:
    talk = Conversation.from_turns(("user", "the cat and the dog and the cat"), ("assistant", "the cat, the dog"))
    fresh = Template.load(tokenizer("smollm2"), "chatml")
    assert fresh.encode(talk) == fresh.encode(talk) == template("chatml").encode(talk)
