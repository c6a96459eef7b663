from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from corral.errors import ModelError
from corral.export.ollama_modelfile import modelfile
from corral.messages import Conversation
from corral.model.loading import load_tokenizer
from corral.template import Template
from corral.template.rendering import with_system
from tests.conftest import make_tiny_model
from tests.export.modelfile import read_modelfile

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|end|>\n\n' + m['content'] | trim"
    " + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|end|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '<s>[INST] ' + ('<<SYS>>\n' + system + '\n<</SYS>>\n\n' if system and loop.index0 == 1"
    " else '') + m['content'] + ' [/INST]' }}{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' <|im_end|>' }}"
    "{% endif %}{% endfor %}"
)
DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}" + DEFAULT
CHATS = [
    Conversation.from_turns(("user", "hi")),
    Conversation.from_turns(("system", "Short."), ("user", "Grüße\n\n東京 🙂")),
    Conversation.from_turns(
        ("user", "a"), ("assistant", "b {% c %}"), ("user", "d"), ("assistant", "e"), ("user", "{{ f }}")
    ),
    Conversation.from_turns(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "d")),
]


def render_go(template: str, messages: list[dict[str, str]]) -> str:
    """What Go's text/template makes of the few actions that a Modelfile's TEMPLATE uses here."""
    parts = re.split(r"\{\{ (.*?) \}\}", template)
    assert parts[1] == "range $i, $_ := .Messages"
    depth, end = 1, 3
    while True:
        depth += {"if": 1, "end": -1}.get(parts[end].split(" ")[0], 0)
        if depth == 0:
            break
        end += 2
    body, text = parts[2:end], parts[0]

    def holds(test: str, index: int, message: dict[str, str]) -> bool:
        if test.startswith("and "):
            assert test == 'and (eq $i 1) (eq (index $.Messages 0).Role "system")'
            return index == 1 and messages[0]["role"] == "system"
        _, what, value = test.split(" ")
        return index == int(value) if what == "$i" else message["role"] == value.strip('"')

    for index, message in enumerate(messages):
        stack: list[tuple[bool, bool]] = []  # whether the branch is taken, and whether any was
        for position, part in enumerate(body):
            live = all(taken for taken, _ in stack)
            if position % 2 == 0:
                text += part if live else ""
            elif part.startswith("if "):
                taken = holds(part[3:], index, message)
                stack.append((taken, taken))
            elif part == "else" or part.startswith("else if "):
                _, any_taken = stack.pop()
                taken = not any_taken and (part == "else" or holds(part[8:], index, message))
                stack.append((taken, any_taken or taken))
            elif part == "end":
                stack.pop()
            else:
                assert part == ".Content"
                text += message["content"] if live else ""
    assert len(parts) == end + 2
    return text + parts[-1]


def save_model(path: Path, tokenizer: Any, source: str) -> Path:
    make_tiny_model(len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "chat_template.jinja").write_text(source, "utf-8")
    return path


def values(text: str, command: str) -> list[str]:
    """What a Modelfile says by a command, as Ollama reads it."""
    return [value for name, value in read_modelfile(text) if name == command]


def go_template(text: str) -> str:
    """The TEMPLATE of a Modelfile."""
    (template,) = values(text, "template")
    return template


SOURCES = {"Llama 3": LLAMA3, "Llama 2": LLAMA2, "a default system": DEFAULT, "no system": NO_SYSTEM, "shipped": ""}


@pytest.mark.parametrize("name", SOURCES)
def test_the_go_template_renders_what_the_models_own_does(name: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    source = SOURCES[name] or Template.load(tiny_tokenizer, "chatml").source
    text = modelfile(save_model(tmp_path / "m", tiny_tokenizer, source), "m.gguf", (2,))
    assert text.startswith("FROM ./m.gguf\n")
    chats = [c.to_json()["messages"] for c in CHATS if source != NO_SYSTEM or c.messages[0].role != "system"]
    assert len(chats) >= 2
    for messages in chats:
        theirs = tiny_tokenizer.apply_chat_template(
            messages, chat_template=source, tokenize=False, add_generation_prompt=True
        )
        assert render_go(go_template(text), messages) == theirs
    assert ("strips white space" in text) == (source == LLAMA3)


@pytest.mark.parametrize("system", ["Be brief.", ' You are "Ada".\n\nSay "hi"', '"', '""\nx'])
def test_a_system_message_of_the_template_is_a_line_of_its_own(
    system: str, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    led = Template.load(tiny_tokenizer, "chatml", system=system).source
    text = modelfile(save_model(tmp_path / "led", tiny_tokenizer, led), "m.gguf", (2,))
    assert values(text, "system") == [system]
    plain = Template.load(tiny_tokenizer, "chatml").source
    without = modelfile(save_model(tmp_path / "plain", tiny_tokenizer, plain), "m.gguf", (2,))
    assert go_template(text) == go_template(without)
    assert values(without, "system") == []
    stripping = modelfile(save_model(tmp_path / "strips", tiny_tokenizer, with_system(LLAMA3, system)), "m.gguf", (2,))
    assert values(stripping, "system") == [system.strip()]


@pytest.mark.parametrize("system", ['Write """ around it.', "👨\u200d👩\u200d👧 \\ {{ x }}\xa0!\n"])
def test_what_such_a_line_cannot_hold_is_in_the_go_template(system: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    led = Template.load(tiny_tokenizer, "chatml", system=system).source
    text = modelfile(save_model(tmp_path / "led", tiny_tokenizer, led), "m.gguf", (2,))
    assert values(text, "system") == []
    (string,) = re.findall(r'{{ "(.*?)" }}', go_template(text))
    escapes = re.compile(r"\\U([0-9a-f]{8})")  # as Go reads a string
    assert escapes.sub(lambda escape: chr(int(escape[1], 16)), string) == system
    assert f'{{{{ if eq $i 0 }}}}<|im_start|>system\n{{{{ "{string}" }}}}<|im_end|>\n' in go_template(text)
    another = save_model(tmp_path / "other", tiny_tokenizer, with_system("{{ messages | length }}" + LLAMA3, system))
    text = modelfile(another, "m.gguf", (2,))
    assert (values(text, "template"), values(text, "system")) == ([], [])
    assert "# No SYSTEM: the model has a system message that a Modelfile cannot hold." in text


def test_a_bos_token_that_ollama_writes_itself_is_left_out(tiny_tokenizer: Any, tmp_path: Path) -> None:
    from tokenizers import processors

    folder = save_model(tmp_path / "m", tiny_tokenizer, LLAMA3)
    tokenizer = type(tiny_tokenizer).from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", pair="<|im_start|> $A $B", special_tokens=[("<|im_start|>", 1)]
    )
    tokenizer.save_pretrained(folder)
    template = go_template(modelfile(folder, "m.gguf", (2,)))
    assert render_go(template, CHATS[0].to_json()["messages"]).startswith("<|im_start|>user<|end|>")


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m['content'] | upper }}<|im_end|>{% endfor %}",
        "{{ messages | length }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}",
        "{% for m in messages %}{{ '{{' + m['content'] }}<|im_end|>{% endfor %}",
        "{{ messages[-1]['content'] }}",
        "{% for m in messages %}{{ m['role'] + ':\u200b' + m['content'] }}<|im_end|>{% endfor %}",
    ],
)
def test_a_template_of_another_form_is_left_out_and_said_to_be(
    source: str, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    text = modelfile(save_model(tmp_path / "m", tiny_tokenizer, source), "m.gguf", (2,))
    assert values(text, "template") == []
    assert "# No TEMPLATE: none in Ollama's language was proved" in text


def test_every_stop_token_and_licence_is_there(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "m"))
    (folder / "LICENSE").write_text("Do as you like.\n")
    (folder / "NOTICE").write_text("Made by us.\n")
    line_break, quote = (load_tokenizer(folder).encode(text)[0] for text in ("\n", '"'))
    text = modelfile(folder, "m.gguf", (0, 2, line_break))
    assert values(text, "from") == ["./m.gguf"]
    assert values(text, "stop") == ["<|im_end|>", "<|endoftext|>", "\n"]
    assert values(modelfile(folder, "m.gguf", (quote,)), "stop") == ['"']
    assert values(text, "license") == ["Do as you like.", "Made by us."]
    (folder / "NOTICE").write_text('"""')
    with pytest.raises(ModelError, match="cannot hold") as caught:
        modelfile(folder, "m.gguf", (2,))
    assert str(folder / "NOTICE") == caught.value.where


@pytest.mark.parametrize("text", ["東", "\x07"], ids=["half a character", "a bell"])
def test_a_stop_token_that_ollama_cannot_compare_with_is_refused(text: str, tiny_folder: Path) -> None:
    id_ = load_tokenizer(tiny_folder).encode(text)[0]
    with pytest.raises(ModelError, match=f"answers end at token {id_}"):
        modelfile(tiny_folder, "m.gguf", (id_,))
