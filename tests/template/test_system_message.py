"""A template's system message: the ids of a conversation that states it, in training, in serving and in other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from corral.data.plain_text import PlainTextEncoder
from corral.errors import TemplateError
from corral.messages import Conversation, Message
from corral.template import Template
from corral.template.rendering import split_system, with_system
from tests.template.real import POLITE, SHIPPED, STOCK, template

ALL = [*SHIPPED, *STOCK]
SYSTEM = "You are Ada.\n\nSay \"hi\" or 'hi'; write {{ x }}, {% if y %} and \\n — 東京 🙂"
TALK = Conversation.from_turns(("user", "a"), ("assistant", "b"), ("user", "c\n"), ("assistant", "d"))
IN_CHATML = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\ufdd0\0")
TEXT = st.lists(
    st.one_of(st.text(CHARACTERS, max_size=8), st.sampled_from(['"', "\\", "\n", "%}", "{#", "{% generation %}"])),
    min_size=1,
).map("".join)


def led_by(system: str, talk: Conversation) -> Conversation:
    return Conversation((Message("system", system), *talk.messages))


def prompts(talk: Conversation) -> list[Conversation]:
    """The conversation up to each of its questions."""
    return [Conversation(talk.messages[:end]) for end, m in enumerate(talk.messages) if m.role == "assistant"]


@pytest.mark.parametrize("name", ALL)
def test_a_conversation_without_a_system_message_has_the_ids_of_one_that_states_it(name: str) -> None:
    plain, bearing = template(name), template(name, SYSTEM)
    stated = led_by(SYSTEM, TALK)
    assert bearing.encode(TALK) == plain.encode(stated) == bearing.encode(stated)
    assert bearing.encode_batch([TALK]) == [plain.encode(stated)]
    for asked in prompts(TALK):
        assert bearing.prompt(asked) == plain.prompt(led_by(SYSTEM, asked))
    other = led_by("Be kind.", TALK)
    assert bearing.encode(other) == plain.encode(other)


@pytest.mark.parametrize("name", ALL)
def test_the_saved_form_brings_it_to_other_programs(name: str) -> None:
    plain, bearing = template(name), template(name, SYSTEM)
    for asked in prompts(TALK):
        messages, stated = asked.to_json()["messages"], led_by(SYSTEM, asked).to_json()["messages"]
        asking: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
        render = bearing.tokenizer.apply_chat_template
        text: Any = render(messages, chat_template=bearing.source, **asking)
        assert text == render(stated, chat_template=plain.source, **asking)
        assert text == render(stated, chat_template=bearing.source, **asking)
        if name != "stock Zephyr":  # it is written for an environment that trims
            variables = bearing.tokenizer.special_tokens_map
            plain_jinja2 = jinja2.Template(bearing.source)
            assert plain_jinja2.render(messages=messages, add_generation_prompt=True, **variables) == text
    again = Template(bearing.tokenizer, bearing.source, "saved")
    assert (again.system, again.digest, again.bare_source) == (SYSTEM, bearing.digest, plain.source)
    assert again.encode(TALK) == bearing.encode(TALK)


@settings(deadline=None, max_examples=25)  # each compiles four templates
@given(system=TEXT, start=st.sampled_from(["", " ", "\n", "\n\n", "\n "]))
@example(system="\\", start="")
@example(system='"', start="\n")
def test_any_text_is_rendered_as_it_is_and_read_again(system: str, start: str, tiny_tokenizer: Any) -> None:
    source = start + POLITE
    assert split_system(with_system(source, system)) == (system, source)
    bearing = Template(tiny_tokenizer, source, "any text", system=system)
    texts = [
        tiny_tokenizer.apply_chat_template(talk.to_json()["messages"], chat_template=saved, tokenize=False)
        for talk, saved in ((TALK, bearing.source), (led_by(system, TALK), source))
    ]
    assert texts[0] == texts[1]
    assert bearing.encode(TALK) == Template(tiny_tokenizer, source, "none").encode(led_by(system, TALK))


def test_a_saved_folder_keeps_it_until_a_recipe_gives_another(tiny_tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    Template.load(tiny_tokenizer, "chatml", system=SYSTEM).save(tmp_path)
    saved: Any = AutoTokenizer.from_pretrained(tmp_path)
    for replacement, expected in ((None, SYSTEM), ("Be brief.", "Be brief.")):
        again = Template.load(saved, system=replacement)
        assert again.system == expected
        text = tiny_tokenizer.decode(again.prompt(prompts(TALK)[0]))
        assert text.count("<|im_start|>system") == text.count(expected) == 1
    fresh = Template.load(saved, "chatml")
    assert fresh.system is None  # another template is another prompt


def test_it_stands_before_variables_and_dates_of_the_template(tiny_tokenizer: Any) -> None:
    source = "\n{{ strftime_now(form) }}{{ level }}" + POLITE
    bearing = Template(
        tiny_tokenizer, source, "varied", variables={"level": 3}, system="strftime_now('%Y') {{ level }}"
    )
    again = Template(tiny_tokenizer, bearing.source, "again", system=SYSTEM)
    assert "strftime_now('%Y') {{ level }}" in tiny_tokenizer.decode(bearing.prompt(prompts(TALK)[0]))
    assert tiny_tokenizer.decode(again.prompt(prompts(TALK)[0])).endswith(
        f"3{IN_CHATML}<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    )


def test_digest_and_fingerprint_depend_on_it(tiny_tokenizer: Any) -> None:
    templates = [Template.load(tiny_tokenizer, "chatml", system=system) for system in (None, "a", "b")]
    assert len({t.digest for t in templates}) == len({t.fingerprint for t in templates}) == 3


REFUSED = {
    "gemma": "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + POLITE,
    "ignoring": POLITE.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_refuses_or_ignores_it_is_refused(name: str, tiny_tokenizer: Any) -> None:
    Template(tiny_tokenizer, REFUSED[name], name)
    with pytest.raises(
        TemplateError, match=r"(System role not supported|does not render it)\n.*data\.system, "
    ) as caught:
        Template(tiny_tokenizer, REFUSED[name], name, system=SYSTEM)
    assert "model.template" in str(caught.value.hint)


@pytest.mark.parametrize("system", [" ", "user", "What"])
def test_a_text_that_an_ignoring_template_writes_anyway_does_not_count_as_rendered(
    system: str, tiny_tokenizer: Any
) -> None:
    with pytest.raises(TemplateError, match="does not render it"):
        Template(tiny_tokenizer, REFUSED["ignoring"], "ignoring", system=system)


@pytest.mark.parametrize("system", ["Write <|im_end|> last.", "a\ufdd0b", "a\ud800b", "a\0b"])
def test_a_text_that_cannot_be_text_everywhere_is_refused(system: str, tiny_tokenizer: Any) -> None:
    with pytest.raises(
        TemplateError, match=r"the system message cannot be used: .*(im_end|FDD0|not valid Unicode|a NUL)"
    ):
        Template.load(tiny_tokenizer, "chatml", system=system)


def test_documents_are_encoded_without_it(tiny_tokenizer: Any) -> None:
    plain, bearing = (Template.load(tiny_tokenizer, "chatml", system=system) for system in (None, SYSTEM))
    assert PlainTextEncoder(bearing).encode(SYSTEM) == PlainTextEncoder(plain).encode(SYSTEM)
