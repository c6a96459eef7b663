"""Shipped and stock templates on real tokenizers: exact texts and masks, the same ids in training, serving and elsewhere."""

from __future__ import annotations

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
SPECIAL = (
    "<s>",
    "</s>",
    "<|im_end|>",
    "<|im_start|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|begin_of_text|>",
    "[INST]",
    "<|",
)
CONTENT = st.lists(st.one_of(TEXT, st.sampled_from((*SPECIAL, "\n", "\n\n", " "))), max_size=4).map("".join)
EXCHANGES = st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=3)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    system = draw(st.one_of(st.none(), CONTENT))
    turns = [] if system is None else [Message("system", system)]
    for question, answer in draw(EXCHANGES):
        turns += [Message("user", question), Message("assistant", answer)]
    return Conversation(tuple(turns))


def rendered(chosen: Template, talk: Conversation, *, ask: bool = False) -> str:
    """The text as plain Jinja2 renders the saved template, without any sandbox, trimming or extension."""
    messages = talk.to_json()["messages"]
    variables = chosen.tokenizer.special_tokens_map
    return jinja2.Template(chosen.source).render(messages=messages, add_generation_prompt=ask, **variables)


def trained_text(chosen: Template, talk: Conversation) -> str:
    encoded = chosen.encode(talk)
    ids = [i for i, t in zip(encoded.ids, encoded.trained, strict=True) if t]
    return chosen.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)


def test_every_template_that_ships_is_tested_on_a_real_tokenizer() -> None:
    assert {spec for _, spec in SHIPPED.values()} == set(shipped_templates())
    assert len(ALL) == 29


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
    special = [i for i in ids if i in chosen._piece_tokenizer.control_ids]
    assert special == [i for i in chosen.encode(shape).ids if i in chosen._piece_tokenizer.control_ids]
    escaped = [{"role": m.role, "content": m.content} for m in talk.messages]
    text = chosen._stripped.text(escaped)
    decoded = chosen.tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=False)
    if STOCK.get(name, SHIPPED.get(name))[0] == "llama-2":  # SentencePiece writes spaces of its own
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
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = chosen._messages(talk)

    def text(count: int, ask: bool) -> str:
        variables = chosen.tokenizer.special_tokens_map
        texts, _ = render_jinja_template(
            [messages[:count]], chat_template=chosen.source, add_generation_prompt=ask, **variables
        )
        return str(texts[0])

    whole, at = text(len(messages), False), 0
    ids: list[int] = []
    trained: list[bool] = []
    for i, message in enumerate(messages, start=1):
        if message["role"] == "assistant":
            start, after = len(text(i - 1, True)), text(i, False)
            end = max(
                after.rfind(token) + len(token) for token in chosen._piece_tokenizer.control if token in after[start:]
            )
            add(chosen, whole[at:start], False, ids, trained)
            add(chosen, whole[start:end], True, ids, trained)
            at = end
    add(chosen, whole[at:], False, ids, trained)
    return ids, trained


def add(chosen: Template, text: str, is_trained: bool, ids: list[int], trained: list[bool]) -> None:
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
    end = chosen.tokenizer.convert_ids_to_tokens(
        chosen.encode(TALKS[0]).ids[chosen.encode(TALKS[0]).trained.index(True) :]
    )
    close = next(token for token in end if token in chosen._piece_tokenizer.control)
    assert trained_text(chosen, TALKS[0]).replace(" ", "") == f"Four.{close}"
    assert trained_text(chosen, TALKS[2]).replace(" ", "") == f"b{close}deff(x):\nreturnx{close}"
    assert chosen.tokenizer.convert_tokens_to_ids(close) in chosen.stop_ids


@pytest.mark.parametrize("name", ALL)
def test_the_saved_form_gives_transformers_the_same_ids_and_plain_jinja2_the_same_text(name: str) -> None:
    chosen = template(name)
    for talk in TALKS:
        prompt_turns, _ = talk.split_answer()
        messages = prompt_turns.to_json()["messages"]
        transformers_ids = chosen.tokenizer.apply_chat_template(
            messages, chat_template=chosen.source, add_generation_prompt=True, return_dict=False
        )
        assert chosen.prompt(prompt_turns) == list(transformers_ids)
        if name in SHIPPED:
            assert rendered(chosen, prompt_turns, ask=True) == chosen._rendering.text(messages, generation_prompt=True)


@pytest.mark.parametrize("name", ["instruction on Llama-2", "stock Llama-3.2", "stock SmolLM2"])
def test_a_saved_tokenizer_read_again_gives_the_same_ids(name: str, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    chosen = template(name)
    chosen.save(tmp_path)
    saved: Any = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    again = Template.load(saved)
    assert again.digest == chosen.digest
    for talk in TALKS:
        prompt_turns, _ = talk.split_answer()
        messages = prompt_turns.to_json()["messages"]
        transformers_ids = saved.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert list(transformers_ids) == again.prompt(prompt_turns) == chosen.prompt(prompt_turns)
        assert again.encode(talk) == chosen.encode(talk)


@pytest.mark.parametrize("name", ALL)
def test_a_conversation_opens_with_the_bos_token_at_most_once(name: str) -> None:
    chosen = template(name)
    ids = chosen.encode(TALKS[2]).ids
    bos = chosen.tokenizer.bos_token_id
    writes_none = {"smollm2", "zephyr", "tulu", "stock Zephyr", "stock Tulu"}
    kind = STOCK.get(name, SHIPPED.get(name))[0]
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


def test_the_instruction_form_reads_as_it_should() -> None:
    chosen = template("instruction on Llama-3")
    talk = Conversation.from_turns(("user", with_input("Sum up.", "It rains.")), ("assistant", "Rain."))
    assert rendered(chosen, talk) == (
        "<|begin_of_text|>Instruction:\nSum up.\n\n### Input:\nIt rains.\n\n### Response:\nRain.<|end_of_text|>"
    )


def test_the_question_form_puts_its_context_first() -> None:
    chosen = template("question on Llama-2")
    plain = Conversation.from_turns(("user", "How many days?"), ("assistant", "30."))
    assert rendered(chosen, plain) == (
        "<s>Answer the following question:\n\nQuestion:\nHow many days?\n---\nAnswer:\n30.</s>"
    )
    found = Conversation.from_turns(("user", with_input("How many days?", "Leave: 30 days.")), ("assistant", "30."))
    assert rendered(chosen, found) == (
        "<s>Answer the following question:\n\nContext:\nLeave: 30 days.\n\nQuestion:\nHow many days?\n---\nAnswer:\n30.</s>"
    )


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
    assert rendered(template(name), Conversation.from_turns(*turns), ask=True) == text


def test_base_models_are_given_only_tokens_that_they_know() -> None:
    for name in ("alpaca", "vicuna"):
        known = template(name)
        assert set(known.tokenizer.convert_ids_to_tokens(known.special_ids)) == {"<s>", "</s>"}
    for name in ("instruction", "question"):
        llama3, llama2 = template(f"{name} on Llama-3"), template(f"{name} on Llama-2")
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
