"""Ids and masks: prompt ids are a prefix, typed special strings are text, only answers are trained, saved ≡ trained."""

from __future__ import annotations

import copy
import json
import re
import shutil
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.errors import TemplateError
from corral.messages import Conversation
from corral.template import Template, rendering
from corral.template.template import shipped_templates
from tests.template.real import POLITE

STOCK = POLITE.replace("Be polite.", "Be brief.")

TEXT = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"], exclude_characters="\ufdd0"), st.sampled_from("<|im_end>\n ")),
    max_size=40,
)
PIECES = st.lists(st.one_of(TEXT, st.sampled_from(["<|im_end|>", "<|im_start|>", "<|im_", "end|>"])), max_size=4)
CONTENT = PIECES.map("".join)


@pytest.fixture(scope="module")
def chatml(tiny_tokenizer: Any) -> Template:
    return Template.load(tiny_tokenizer, "chatml")


@settings(deadline=None, max_examples=100)
@given(question=CONTENT, answer=CONTENT)
def test_a_prompt_is_a_prefix_typed_special_strings_are_text_and_no_text_is_lost(
    question: str, answer: str, chatml: Template
) -> None:
    prompt = chatml.prompt(Conversation.from_turns(("user", question)))
    encoded = chatml.encode(Conversation.from_turns(("user", question), ("assistant", answer)))
    assert list(encoded.ids[: len(prompt)]) == prompt
    assert not any(encoded.trained[: len(prompt)])
    assert encoded.trained[len(prompt)]
    plain = chatml.encode(Conversation.from_turns(("user", "x"), ("assistant", "y"))).ids
    for token in ("<|im_start|>", "<|im_end|>"):
        special = chatml.tokenizer.convert_tokens_to_ids(token)
        assert encoded.ids.count(special) == plain.count(special)
    whole = chatml.tokenizer.backend_tokenizer.decode(list(encoded.ids), skip_special_tokens=False)
    assert whole == f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"


def test_markers_that_trim_white_space_are_removed_without_changing_the_text(tiny_tokenizer: Any) -> None:
    source = (
        "{%- for m in messages %}\n{{ '<|im_start|>' + m.role + '\\n' }}"
        "{%- if m.role == 'assistant' -%}\n  {%- generation -%}\n{{ m.content }}<|im_end|>{%- endgeneration -%}\n"
        "{%- else -%}{{ m.content }}<|im_end|>{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
    )
    template = Template(tiny_tokenizer, source, "trimmed markers")
    encoded = template.encode(Conversation.from_turns(("user", "a"), ("assistant", "b")))
    trained = [i for i, is_trained in zip(encoded.ids, encoded.trained, strict=True) if is_trained]
    assert template.tokenizer.convert_ids_to_tokens(trained) == ["b", "<|im_end|>"]


def test_todays_date_is_fixed_in_what_is_rendered_and_saved(tiny_tokenizer: Any) -> None:
    dated = "{% set d = strftime_now('%d %b %Y') if strftime_now is defined else 'none' %}{{ d }}" + STOCK
    template = Template(tiny_tokenizer, dated, "dated")
    assert "26 Jul 2024" in template.source
    assert "26 Jul 2024" in template.decode(template.prompt(Conversation.from_turns(("user", "a"))))


@pytest.mark.parametrize(
    "dated",
    [
        "{% set f = '%d %b %Y' %}{{ strftime_now(f) }}",
        "{% set f = '%A, %-d %B %Y' %}{% macro today() %}{{ strftime_now(format=f) }}{% endmacro %}{{ today() }}",
        "{{ strftime_now('%d' ~ ' %b') }}",
        "{% for year in ('%Y', '%Y') %}{% if loop.first %}{{ strftime_now(year) }}{% endif %}{% endfor %}",
        "{% set now = strftime_now %}{{ now('%H:%M %j') }}",
        "\n{% if strftime_now is not defined %}never{% else %}{{ strftime_now('%' + 'F') }}{% endif %}",
    ],
)
def test_a_date_whose_format_is_computed_is_fixed_too(dated: str, tiny_tokenizer: Any, tmp_path: Any) -> None:
    from transformers import AutoTokenizer

    chosen = Template(tiny_tokenizer, dated + STOCK, "dated")
    talk = Conversation.from_turns(("user", "a"), ("assistant", "b"))
    prompt = chosen.decode(chosen.prompt(talk.split_answer()[0]))
    assert re.match(r"\n?(26 Jul 2024|Friday, 26 July 2024|26 Jul|2024|00:00 208|2024-07-26)system", prompt), prompt
    # Other programs have today's date, and must not use it either.
    chosen.save(tmp_path)
    saved: Any = AutoTokenizer.from_pretrained(tmp_path)
    messages = talk.split_answer()[0].to_json()["messages"]
    assert saved.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == chosen.prompt(
        talk.split_answer()[0]
    )
    again = Template.load(saved)
    assert (again.source, again.digest) == (chosen.source, chosen.digest)


def test_the_fixed_date_reads_as_strftime_writes_it() -> None:
    at = datetime(2024, 7, 26)
    assert all(at.strftime(f"%{directive}") == value for directive, value in rendering._DIRECTIVES.items())


THINKING = STOCK.replace("Be brief.", "Be brief.{{ ' Think first.' if enable_thinking }}")
VARIABLES = {"enable_thinking": True, "style": 'a "b" %}\n\\ é🙂', "level": 2, "share": 0.5}


def test_variables_of_the_recipe_reach_every_rendering_and_the_saved_form(tiny_tokenizer: Any, tmp_path: Any) -> None:
    from transformers import AutoTokenizer

    source = "{% macro note() %}{{ style }}{% endmacro %}{{ level + 1 }} {{ share }} {{ note() }}" + THINKING
    chosen = Template(tiny_tokenizer, source, "thinking", variables=VARIABLES)
    turns = Conversation.from_turns(("user", "a"))
    prompt = chosen.decode(chosen.prompt(turns))
    assert prompt.startswith('3 0.5 a "b" %}\n\\ é🙂system\nBe brief. Think first.')
    chosen.save(tmp_path)
    saved: Any = AutoTokenizer.from_pretrained(tmp_path)
    messages = turns.to_json()["messages"]
    again = Template.load(saved)
    assert again.digest == chosen.digest
    assert again.prompt(turns) == chosen.prompt(turns)
    assert saved.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == chosen.prompt(turns)
    # What another program gives still counts: in other programs, and in the recipe of a model made of this one.
    text = saved.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, enable_thinking=False)
    assert "Think" not in text
    other = Template.load(saved, variables={"enable_thinking": False})
    assert "Think" not in other.decode(other.prompt(turns))


def test_variables_are_part_of_the_digest_and_the_fingerprint(tiny_tokenizer: Any) -> None:
    templates = [
        Template(tiny_tokenizer, STOCK + "{{ '' if level == 7 }}", "x", variables=values)
        for values in (None, {}, {"level": 1}, {"level": 2})
    ]
    assert (
        len({template.digest for template in templates}) == len({template.fingerprint for template in templates}) == 3
    )


@pytest.mark.parametrize("start", ["\n", "  {% if true %}x{% endif %}", "\n\n{{ level }}"])
def test_a_variable_does_not_change_the_white_space_at_the_start(start: str, tiny_tokenizer: Any) -> None:
    source = start + STOCK + "{{ '' if level is defined }}"
    turns = Conversation.from_turns(("user", "a"))
    plain = tiny_tokenizer.apply_chat_template(
        turns.to_json()["messages"], chat_template=source, add_generation_prompt=True, return_dict=False, level=3
    )
    assert Template(tiny_tokenizer, source, "spaces", variables={"level": 3}).prompt(turns) == plain


def test_a_variable_that_the_template_does_not_read_is_refused_with_those_that_it_reads(tiny_tokenizer: Any) -> None:
    with pytest.raises(TemplateError, match="no variable 'enable_thinkin'") as caught:
        Template(tiny_tokenizer, THINKING, "thinking", variables={"enable_thinkin": False})
    assert "the variables that it reads: enable_thinking" in str(caught.value)


def named(tokenizer: Any, **templates: str) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = templates
    return changed


def test_of_several_templates_the_default_or_the_named_one_is_used(tiny_tokenizer: Any, tmp_path: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = named(tiny_tokenizer, default=STOCK, brief=STOCK.replace("Be brief.", "Be terse."))
    turns = Conversation.from_turns(("user", "a"))
    assert "Be brief." in (default := Template.load(tokenizer)).decode(default.prompt(turns))
    brief = Template.load(tokenizer, "tokenizer:brief")
    assert "Be terse." in brief.decode(brief.prompt(turns))
    assert Template.load(tokenizer, "tokenizer:default").digest == default.digest
    # A model that was trained on one is saved with that one alone.
    brief.save(tmp_path)
    saved: Any = AutoTokenizer.from_pretrained(tmp_path)
    assert saved.chat_template == brief.source
    assert Template.load(saved).digest == brief.digest


@pytest.mark.parametrize("form", ["list", "files"])
def test_both_forms_of_several_templates_are_read_from_a_folder(form: str, tiny_tokenizer: Any, tmp_path: Any) -> None:
    from transformers import AutoTokenizer

    templates = {"default": STOCK, "tool_use": STOCK.replace("Be brief.", "Use tools.")}
    named(tiny_tokenizer, **templates).save_pretrained(tmp_path)
    assert (tmp_path / "additional_chat_templates" / "tool_use.jinja").is_file()
    if form == "list":  # as older versions of transformers write it
        shutil.rmtree(tmp_path / "additional_chat_templates")
        (tmp_path / "chat_template.jinja").unlink()
        config = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
        config["chat_template"] = [{"name": name, "template": source} for name, source in templates.items()]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    read: Any = AutoTokenizer.from_pretrained(tmp_path)
    assert Template.load(read).source == STOCK
    assert Template.load(read, "tokenizer:tool_use").source == templates["tool_use"]


def test_a_name_that_is_not_there_names_those_that_are(tiny_tokenizer: Any) -> None:
    with pytest.raises(TemplateError, match="no chat template 'rag': it has default, tool_use"):
        Template.load(named(tiny_tokenizer, default=STOCK, tool_use=STOCK), "tokenizer:rag")
    with pytest.raises(TemplateError, match="no chat template 'default': it has rag, tool_use") as caught:
        Template.load(named(tiny_tokenizer, tool_use=STOCK, rag=STOCK))
    assert 'template = "tokenizer:rag"' in str(caught.value)


def test_streamed_text_equals_the_decoded_whole_at_every_cut(chatml: Template) -> None:
    text = "Ünïcode — 東京 🙂🙂 end"
    ids = chatml.tokenizer.encode(text)
    for cut in range(len(ids) + 1):
        decoder = chatml.stream_decoder()
        assert decoder.push(ids[:cut]) + decoder.push(ids[cut:]) + decoder.finish() == text
    half = chatml.stream_decoder()
    assert half.push(ids[:3]) + half.finish() == chatml.decode(ids[:3])


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "no special token"),
        (STOCK.replace("<|im_start|>assistant\n{% endif %}", "assistant: {% endif %}"), "unmaskable"),
        ("{% for m in messages %}{{ m.content }", "refuses"),
        (
            STOCK.replace("{{ m.content }}", "{% generation %}{% endgeneration %}{{ m.content }}"),
            "enclose no answer",
        ),
        (
            "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
            "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}A{% endif %}",
            "not the beginning",
        ),
    ],
)
def test_a_template_that_cannot_be_masked_or_never_ends_is_refused(
    source: str, reason: str, tiny_tokenizer: Any
) -> None:
    with pytest.raises(TemplateError, match=reason):
        Template(tiny_tokenizer, source, "bad")


@pytest.mark.parametrize(
    ("talk", "reason"),
    [
        (Conversation.from_turns(("user", "lone \ud800 surrogate")), "not valid Unicode"),
        (Conversation.from_turns(("user", "non\ufdd0character")), "U\\+FDD0"),
        (Conversation.from_turns(("user", "a"), ("assistant", "b")), "already ends with an answer"),
    ],
)
def test_a_conversation_that_cannot_be_asked_is_refused_with_a_reason(
    talk: Conversation, reason: str, chatml: Template
) -> None:
    with pytest.raises(TemplateError, match=reason):
        chatml.prompt(talk)


# The tiny tokenizer has not the special tokens of the others.
@pytest.mark.parametrize(
    "name", sorted(name for name in shipped_templates() if not name.startswith(("llama-3", "llama-4")))
)
@pytest.mark.parametrize("begun", ["Two plus", "e", "a <|im_end|> b", " Two  ", "Zwei\n\n"])
def test_an_answer_is_continued_where_its_text_ends_as_if_the_model_had_written_it(
    name: str, begun: str, tiny_tokenizer: Any
) -> None:
    template = Template.load(tiny_tokenizer, name)
    asked = Conversation.from_turns(("user", "What is two plus two?"))
    prompt, ids = template.prompt(asked), template.continuation(asked.add("assistant", begun))
    assert ids[: len(prompt)] == prompt
    text = template.decode(ids)[len(template.decode(prompt)) :]
    assert text in {before + form for before in ("", " ") for form in (begun, begun.rstrip(), begun.strip())}
    if begun == begun.strip():
        whole = template.encode(asked.add("assistant", begun)).ids
        assert list(whole[: len(ids)]) == ids, "what follows is the end that the template writes"
    assert template.continuation(asked.add("assistant", " \n")) == prompt


@pytest.mark.parametrize(("spec", "words"), [("chatlm", "chatml"), ("tokenizer", "name a template")])
def test_a_template_that_is_nowhere_is_refused_with_the_names_of_those_that_ship_or_a_way_on(
    spec: str, words: str, tiny_tokenizer: Any
) -> None:
    with pytest.raises(TemplateError, match=words):
        Template.load(tiny_tokenizer, spec)


def test_templates_on_equal_tokenizers_share_their_encoders_and_a_changed_tokenizer_has_its_own(
    tiny_tokenizer: Any,
) -> None:
    larger = copy.deepcopy(tiny_tokenizer)
    first, second = (Template.load(each, "chatml") for each in (tiny_tokenizer, larger))
    assert first._piece_tokenizer._encoders is second._piece_tokenizer._encoders
    assert larger.add_tokens(["zebra"]) == 1
    question = Conversation.from_turns(("user", "zebra"))
    assert larger.convert_tokens_to_ids("zebra") in Template.load(larger, "chatml").prompt(question)
    assert Template.load(tiny_tokenizer, "chatml").prompt(question) == first.prompt(question)
