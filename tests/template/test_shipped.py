"""Shipped and stock templates on real tokenizers: exact texts and masks, the same ids in training, serving and elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.errors import TemplateError
from corral.messages import Conversation, Message, with_input
from corral.template import Template
from corral.template.template import shipped_templates
from tests.template.real import ALWAYS_ASKS, SHIPPED, STOCK, template, tokenizer

ALL = [*SHIPPED, *STOCK]
TALKS = (
    Conversation.from_turns(("user", "What is 2 + 2?"), ("assistant", "Four.")),
    Conversation.from_turns(("system", "Be kind."), ("user", "Grüße, 東京 🙂"), ("assistant", "Hi.\n\nHow are you?  ")),
    Conversation.from_turns(
        ("user", "a"), ("assistant", "b"), ("user", "  c\n"), ("assistant", "def f(x):\n    return x")
    ),
)
# SmolLM2's tokenizer drops some control characters and the planes from U+40000 on: it has no token for their bytes.
CHARACTERS = st.characters(exclude_categories=["Cs", "Cc", "Cn", "Co"], max_codepoint=0x3FFFF)
TEXT = st.text(st.one_of(CHARACTERS, st.sampled_from("\n\n\n  \tabc<|s>/")), max_size=30)
SPECIAL = ["<s>", "</s>", "<|im_end|>", "<|im_start|>", "<|eot_id|>", "<|end_of_text|>", "<|begin_of_text|>", "<|"]
CONTENT = st.lists(st.one_of(TEXT, st.sampled_from([*SPECIAL, "[INST]", "\n", "\n\n", " "])), max_size=4).map("".join)
EXCHANGES = st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    system = draw(st.one_of(st.none(), CONTENT))
    turns = [] if system is None else [Message("system", system)]
    for question, answer in draw(EXCHANGES):
        turns += [Message("user", question), Message("assistant", answer)]
    return Conversation(tuple(turns))


def plain_jinja_text(chosen: Template, talk: Conversation, *, ask: bool = False) -> str:
    """The text as plain Jinja2 renders the saved template, without any sandbox, trimming or extension."""
    messages = talk.to_json()["messages"]
    variables = chosen.tokenizer.special_tokens_map
    return jinja2.Template(chosen.source).render(messages=messages, add_generation_prompt=ask, **variables)


def transformers_text(chosen: Template, messages: Sequence[Any], *, ask: bool = False) -> str:
    return chosen.tokenizer.apply_chat_template(
        messages, chat_template=chosen.source, tokenize=False, add_generation_prompt=ask
    )


def kind_of_tokenizer(name: str) -> str:
    return (SHIPPED | STOCK)[name][0]


def trained_text(chosen: Template, talk: Conversation) -> str:
    encoded = chosen.encode(talk)
    ids = [i for i, t in zip(encoded.ids, encoded.trained, strict=True) if t]
    return chosen.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)


def test_every_template_that_ships_is_tested_on_a_real_tokenizer() -> None:
    assert {spec for _, spec in SHIPPED.values()} == set(shipped_templates())
    assert len(ALL) == 30


@pytest.mark.parametrize("name", ALL)
@settings(deadline=None, max_examples=12)
@given(talk=conversations())
def test_what_is_trained_begins_with_what_is_asked_at_each_turn(name: str, talk: Conversation) -> None:
    chosen = template(name)
    whole = chosen.encode(talk)
    for end, message in enumerate(talk.messages):
        if message.role != "assistant":
            continue
        prompt = chosen.prompt(Conversation(talk.messages[:end]))
        assert list(whole.ids[: len(prompt)]) == prompt
        assert whole.trained[len(prompt)]
        assert not whole.trained[len(prompt) - 1]


@pytest.mark.parametrize("name", ALL)
@settings(deadline=None, max_examples=12)
@given(talk=conversations())
def test_no_text_is_lost_and_none_becomes_a_special_token(name: str, talk: Conversation) -> None:
    chosen = template(name)
    ids = chosen.encode(talk).ids
    shape = Conversation(tuple(Message(m.role, "x") for m in talk.messages))
    special = chosen.tokenizer.added_tokens_decoder.keys()
    assert [i for i in ids if i in special] == [i for i in chosen.encode(shape).ids if i in special]
    text = transformers_text(chosen, talk.to_json()["messages"])
    decoded = chosen.tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=False)
    if kind_of_tokenizer(name) == "llama-2":  # SentencePiece writes spaces of its own
        text, decoded = (t.replace(" ", "").replace("▁", "") for t in (text, decoded))
    assert decoded == text


@pytest.mark.parametrize("name", ALL)
@settings(deadline=None, max_examples=12)
@given(talks=st.lists(conversations(), min_size=1, max_size=3))
def test_a_batch_has_the_ids_and_masks_of_the_slow_way(name: str, talks: list[Conversation]) -> None:
    chosen = template(name)
    together = chosen.encode_batch(talks)
    assert together == [chosen.encode(talk) for talk in talks]
    assert [(list(e.ids), list(e.trained)) for e in together if not isinstance(e, TemplateError)] == [
        slowly(chosen, talk) for talk in talks
    ]


def slowly(chosen: Template, talk: Conversation) -> tuple[list[int], list[bool]]:
    """Rendered by transformers itself, cut by the renderings of the first turns, one call of the tokenizer for each text."""
    messages = chosen._messages(talk)
    whole, at = transformers_text(chosen, messages), 0
    ids: list[int] = []
    trained: list[bool] = []
    for i, message in enumerate(messages, start=1):
        if message["role"] == "assistant":
            start = len(transformers_text(chosen, messages[: i - 1], ask=True))
            after = transformers_text(chosen, messages[:i])
            end = max(
                after.rfind(token) + len(token) for token in chosen._piece_tokenizer.control if token in after[start:]
            )
            append_tokens(chosen, whole[at:start], False, ids, trained)
            append_tokens(chosen, whole[start:end], True, ids, trained)
            at = end
    append_tokens(chosen, whole[at:], False, ids, trained)
    return ids, trained


def append_tokens(chosen: Template, text: str, is_trained: bool, ids: list[int], trained: list[bool]) -> None:
    tokens = chosen._piece_tokenizer
    begins, after_special, continues = tokens._encoders
    encoder = begins if not ids else after_special if ids[-1] in tokens.control_ids else continues
    for part in tokens._separators.split(text):
        if part in tokens.control:
            new, encoder = [chosen.tokenizer.convert_tokens_to_ids(part)], after_special
        elif part == "\ufdd0":
            new, encoder = [], continues
        else:
            new = encoder.encode(part, add_special_tokens=False).ids
            encoder = continues if part else encoder
        ids += new
        trained += [is_trained] * len(new)


@pytest.mark.parametrize("name", ALL)
def test_only_the_answers_with_their_end_tokens_are_trained(name: str) -> None:
    chosen = template(name)
    encoded = chosen.encode(TALKS[0])
    (*_, last) = (i for i, is_trained in zip(encoded.ids, encoded.trained, strict=True) if is_trained)
    close = chosen.tokenizer.convert_ids_to_tokens(last)
    assert last in chosen.tokenizer.added_tokens_decoder
    assert trained_text(chosen, TALKS[0]).replace(" ", "") == f"Four.{close}"
    assert trained_text(chosen, TALKS[2]).replace(" ", "") == f"b{close}deff(x):\nreturnx{close}"
    assert last in chosen.stop_ids


@pytest.mark.parametrize("name", ALL)
def test_the_saved_form_gives_transformers_the_same_ids_and_plain_jinja2_the_same_text(name: str) -> None:
    chosen = template(name)
    for talk in TALKS:
        turns, _ = talk.split_answer()
        messages = turns.to_json()["messages"]
        transformers_ids = chosen.tokenizer.apply_chat_template(
            messages, chat_template=chosen.source, add_generation_prompt=True, return_dict=False
        )
        assert chosen.prompt(turns) == list(transformers_ids)
        if name in SHIPPED:
            assert plain_jinja_text(chosen, turns, ask=True) == transformers_text(chosen, messages, ask=True)


@pytest.mark.parametrize("name", ["instruction on llama-2", "stock Llama-3.2", "stock SmolLM2"])
def test_a_saved_tokenizer_read_again_gives_the_same_ids(name: str, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    chosen = template(name)
    chosen.save(tmp_path)
    assert "generation %" not in (tmp_path / "chat_template.jinja").read_text()
    saved: Any = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    again = Template.load(saved)
    assert again.digest == chosen.digest
    for talk in TALKS:
        turns, _ = talk.split_answer()
        messages = turns.to_json()["messages"]
        transformers_ids = saved.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert list(transformers_ids) == again.prompt(turns) == chosen.prompt(turns)
        assert again.encode(talk) == chosen.encode(talk)


@pytest.mark.parametrize("name", ALL)
def test_a_conversation_opens_with_the_bos_token_at_most_once(name: str) -> None:
    chosen = template(name)
    ids = chosen.encode(TALKS[2]).ids
    bos = chosen.tokenizer.bos_token_id
    kind = kind_of_tokenizer(name)
    writes_none = {"smollm2", "zephyr", "tulu", "stock Zephyr", "stock Tulu"}
    if kind == "smollm2" or name in writes_none:  # SmolLM2's BOS is the token that opens each turn
        assert (ids[0] == bos) == (kind == "smollm2" and not name.startswith(("instruction", "question", "alpaca")))
    elif "llama-2" in name.lower() and "on" not in name.split():  # Llama-2's chat models read one before each exchange
        assert ids[0] == bos
        assert ids.count(bos) == 2
    else:
        assert ids[0] == bos
        assert ids.count(bos) == 1


@pytest.mark.parametrize("name", STOCK)
def test_a_stock_template_takes_the_marks_of_the_one_that_renders_as_it_does(name: str) -> None:
    assert template(name).masked_by == STOCK[name][2]


def test_a_text_that_a_twin_renders_otherwise_is_masked_by_difference() -> None:
    kind = tokenizer("smollm2")
    shouting = kind.chat_template.replace("message['content'] +", "message['content'].replace('ham', 'HAM') +")
    chosen = Template(kind, shouting, "shouting")
    assert chosen.masked_by == "markers of smollm2"  # no probe holds that word
    talk = Conversation.from_turns(("user", "ham?"), ("assistant", "ham"))
    assert trained_text(chosen, talk) == "HAM<|im_end|>"
    prompt = chosen.prompt(talk.split_answer()[0])
    assert list(chosen.encode(talk).ids[: len(prompt)]) == prompt


def test_a_template_that_asks_after_every_answer_is_refused() -> None:
    with pytest.raises(TemplateError, match="begins another"):
        Template(tokenizer("llama-3"), ALWAYS_ASKS, "always asks")


SHORT_FORMS = {
    "instruction on llama-3": (
        with_input("Sum up.", "It rains."),
        "<|begin_of_text|>Instruction:\nSum up.\n\n### Input:\nIt rains.\n\n### Response:\nFine.<|end_of_text|>",
    ),
    "question on llama-2": (
        "How many days?",
        "<s>Answer the following question:\n\nQuestion:\nHow many days?\n---\nAnswer:\nFine.</s>",
    ),
    "question on smollm2": (
        with_input("How many?", "Leave: 30 days."),
        "Answer the following question:\n\nContext:\nLeave: 30 days.\n\nQuestion:\nHow many?\n---\nAnswer:\n"
        "Fine.<|im_end|>",
    ),
}


@pytest.mark.parametrize("name", SHORT_FORMS)
def test_the_forms_for_base_models_read_as_they_should(name: str) -> None:
    question, expected = SHORT_FORMS[name]
    talk = Conversation.from_turns(("user", question), ("assistant", "Fine."))
    assert plain_jinja_text(template(name), talk) == expected


EXCHANGE = (("user", "Hello"), ("assistant", "Hi!"), ("user", "Why? "))
# As the authors of each format publish it: (template, conversation, the text of its prompt).
KNOWN = [
    (
        "llama-4",
        (("system", " Be brief.\n"), *EXCHANGE),
        "<|begin_of_text|><|header_start|>system<|header_end|>\n\nBe brief.<|eot|>"
        "<|header_start|>user<|header_end|>\n\nHello<|eot|><|header_start|>assistant<|header_end|>\n\nHi!<|eot|>"
        "<|header_start|>user<|header_end|>\n\nWhy? <|eot|><|header_start|>assistant<|header_end|>\n\n",
    ),
    (
        "hermes",
        EXCHANGE,
        "<|begin_of_text|><|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi!<|im_end|>\n<|im_start|>user\nWhy? <|im_end|>\n<|im_start|>assistant\n",
    ),
    (
        "hermes",
        (("system", "Be brief."), ("user", "Hello")),
        "<|begin_of_text|><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    (
        "tulu",
        (("system", "Be brief."), *EXCHANGE),
        "<|system|>\nBe brief.\n<|user|>\nHello\n<|assistant|>\nHi!<|end_of_text|>\n<|user|>\nWhy? \n<|assistant|>\n",
    ),
    (
        "vicuna",
        EXCHANGE,
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
        "and polite answers to the user's questions. USER: Hello ASSISTANT: Hi!</s>USER: Why?  ASSISTANT:",
    ),
    ("vicuna", (("system", "Be brief."), ("user", "Hello")), "<s>Be brief. USER: Hello ASSISTANT:"),
    (
        "alpaca",
        (("user", "Name a river."),),
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a river.\n\n### Response:\n",
    ),
    (
        "alpaca",
        (("user", with_input("Sum up.", "It rains.")),),
        "<s>Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n"
        "### Instruction:\nSum up.\n\n### Input:\nIt rains.\n\n### Response:\n",
    ),
    (
        "alpaca",
        (("system", "Be brief."), *EXCHANGE),
        "<s>Be brief.\n\n### Instruction:\nHello\n\n### Response:\nHi!</s>\n\n### Instruction:\nWhy? \n\n### Response:\n",
    ),
]


@pytest.mark.parametrize(("name", "turns", "text"), KNOWN)
def test_a_shipped_template_renders_the_published_format(name: str, turns: Any, text: str) -> None:
    assert plain_jinja_text(template(name), Conversation.from_turns(*turns), ask=True) == text


def test_base_models_are_given_only_tokens_that_they_know() -> None:
    for name in ("alpaca", "vicuna"):
        known = template(name)
        assert set(known.tokenizer.convert_ids_to_tokens(known.special_ids)) == {"<s>", "</s>"}
    for name in ("instruction", "question"):
        llama3, llama2 = template(f"{name} on llama-3"), template(f"{name} on llama-2")
        written = llama3.tokenizer.convert_ids_to_tokens(llama3.special_ids)
        assert set(written) == {"<|begin_of_text|>", "<|end_of_text|>"}
        assert set(llama2.tokenizer.convert_ids_to_tokens(llama2.special_ids)) == {"<s>", "</s>"}
        assert llama3.stop_ids == (128001,)
    headers = template("llama-3").tokenizer.convert_ids_to_tokens(template("llama-3").special_ids)
    assert "<|start_header_id|>" in headers  # which training then refuses on a base model, by its embeddings


def test_a_tokenizer_without_an_end_token_is_refused_by_name() -> None:
    from transformers import PreTrainedTokenizerFast

    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer("llama-2").backend_tokenizer, bos_token="<s>")
    with pytest.raises(TemplateError, match="eos_token"):
        Template.load(endless, "instruction")


@pytest.mark.parametrize(("kind", "name"), [("llama-2", "llama-3"), ("llama-3", "llama-4"), ("llama-3", "hermes")])
def test_a_template_made_of_tokens_that_the_tokenizer_lacks_is_refused(kind: str, name: str) -> None:
    with pytest.raises(TemplateError, match="no special token"):
        Template.load(tokenizer(kind), name)
