"""Writes an Ollama Modelfile for an exported GGUF file: template, system message, stop tokens, licence.

Ollama renders chats with a Go template and does not run the Jinja template in a GGUF file. Without a TEMPLATE line it picks
the most similar of its built-in templates. This module therefore renders sample conversations with the chat template,
extracts the six texts that it puts around messages, and builds a Go template from them. It then renders other conversations
both ways, and writes the Go template only if all of them are equal.

A system message that the chat template brings becomes a SYSTEM line, which Ollama puts before conversations without one. What
such a line cannot hold is written into the Go template.

The Go side of the comparison is computed by `_Form.render`; Ollama itself is never run. Ollama joins consecutive messages
of one role, which no template can prevent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from corral.errors import ModelError
from corral.export.gguf_vocabulary import read_vocabulary
from corral.messages import Conversation, Role
from corral.model.folder import licence_texts
from corral.model.loading import load_tokenizer, quiet
from corral.template.decoding import TokenBytes
from corral.template.rendering import split_system

_TURNS: tuple[tuple[Role, str], ...] = (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
_UNLEARNT = (
    Conversation.from_turns(("user", "What is 2 + 2?")),
    Conversation.from_turns(
        ("system", "Grüße, 東京 🙂"), ("user", "Ça va?"), ("assistant", "```python\nx = {}\n```"), ("user", "Go.")
    ),
    Conversation.from_turns(("user", "one"), ("assistant", "two\n\nthree"), ("user", "four  five")),
    Conversation.from_turns(("system", "be\nbrief"), ("user", "{{ .Content }} {% x %}")),
    Conversation.from_turns(*_TURNS, ("user", "c")),
    Conversation.from_turns(("system", "s"), *_TURNS, ("user", "c")),
)
_EDGES = (Conversation.from_turns(("user", " \n hi \n"), ("assistant", "\n so \t"), ("user", "  bye ")),)


@dataclass(frozen=True, slots=True)
class _Form:
    """The texts that a chat template puts around messages: an optional system message, then user and assistant in turn.

    Args:
        opens: before the first message, if it is a user message.
        system: before a system message; None if the template does not accept one.
        after_system: between the system message and the user message.
        answers: between a user message and an answer.
        continues: between an answer and the next user message.
        asks: after the last user message.
    """

    opens: str
    system: str | None
    after_system: str
    answers: str
    continues: str
    asks: str

    def render(self, conversation: Conversation, *, strip: bool) -> str:
        text = ""
        for index, message in enumerate(conversation.messages):
            if message.role == "system":
                text += self.system or ""
            elif message.role == "assistant":
                text += self.answers
            elif index == 0:
                text += self.opens
            else:
                text += self.after_system if conversation.messages[index - 1].role == "system" else self.continues
            text += message.content.strip() if strip else message.content
        return text + self.asks


def modelfile(folder: Path, gguf: str, stop_ids: Sequence[int]) -> str:
    """The text of a Modelfile for `ollama create`.

    Args:
        folder: the model folder that the GGUF file was written from.
        gguf: name of the GGUF file, which must be in the Modelfile's folder.
        stop_ids: the ids that end an answer, one to three.

    Raises:
        ModelError: if the tokenizer cannot be translated (as in `gguf_writer.write_gguf`), or a Modelfile cannot hold a
            licence or the text of a stop id.
        TemplateError: if the chat template has generation markers and cannot be used.
    """
    tokenizer: Any = load_tokenizer(folder)
    words = read_vocabulary(folder, _rows(folder, tokenizer), stop_ids)
    lines = [f"FROM ./{gguf}", ""]
    lines += _chat_lines(tokenizer, words.chat_template, add_bos=words.add_bos)
    lines += [f"PARAMETER stop {_quoted(_stop_text(tokenizer, id_, folder), folder)}" for id_ in words.end_ids]
    for path in licence_texts(folder):
        lines += ["", f"LICENSE {_quoted(path.read_text('utf-8', errors='replace').strip(), path)}"]
    return "\n".join(lines) + "\n"


def _stop_text(tokenizer: Any, stop_id: int, folder: Path) -> str:
    """The text at which Ollama ends an answer. Raises ModelError if it is not printable, or a part of a character."""
    text = TokenBytes(tokenizer.backend_tokenizer)[stop_id].decode(errors="replace")
    if "\N{REPLACEMENT CHARACTER}" in text or not _is_kept(text):
        raise ModelError(
            f"answers end at token {stop_id}, {text!r}; Ollama ends them at printable texts only",
            where=str(folder / "generation_config.json"),
            hint="name in eos_token_id only tokens that the model writes at the end of an answer",
        )
    return text or tokenizer.convert_ids_to_tokens(stop_id)  # a special token adds no text to an answer


def _is_kept(text: str) -> bool:
    """Whether Ollama reads all of a text; it leaves out characters that are not printable."""
    return all(character.isprintable() or character in "\t\r\n" for character in text)


def _quoted(text: str, where: Path) -> str:
    """The text as a Modelfile's value. Raises ModelError if its grammar has no form for it."""
    if '"""' in text:
        raise ModelError('a Modelfile cannot hold text with """', where=str(where), hint="write it in another way")
    return f'"""{text}"""'


def _is_value(text: str) -> bool:
    return '"""' not in text and _is_kept(text)


def _go_string(text: str) -> str:
    """The text as a string in a Go template, in characters that a Modelfile keeps."""
    return "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in text)


def _rows(folder: Path, tokenizer: Any) -> int:
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    return max(int(config.vocab_size), len(tokenizer))


def _chat_lines(tokenizer: Any, source: str | None, *, add_bos: bool) -> list[str]:
    """The lines of the template and of the system message that it brings."""
    none = "Ollama takes the nearest template it knows, or none: check its prompts (OLLAMA_DEBUG=1)."
    if source is None:
        return ["# No TEMPLATE: the model has no chat template.", f"# {none}", ""]
    system, source = split_system(source)
    bos = tokenizer.bos_token if add_bos else ""

    def render(conversation: Conversation) -> str:
        with quiet():
            text: str = tokenizer.apply_chat_template(
                conversation.to_json()["messages"], chat_template=source, tokenize=False, add_generation_prompt=True
            )
        return text.removeprefix(bos or "")

    learnt = _learn(render)
    if learnt is None or (system is not None and learnt[0].system is None):
        return [
            "# No TEMPLATE: none in Ollama's language was proved to render what the model's own does.",
            f"# {none}",
            "",
            *_system_lines(system),
        ]
    form, strips = learnt
    lines = ["# Proved to render what the model's own chat template does."]
    if strips:
        lines += ["# One difference: the model's own strips white space around a message, which Ollama cannot."]
        system = system and system.strip()
    if system is not None and not _is_value(system):
        form = replace(form, opens=f'{form.system}{{{{ "{_go_string(system)}" }}}}{form.after_system}')
        system = None
    return [*lines, f'TEMPLATE """{_go(form)}"""', "", *_system_lines(system)]


def _system_lines(system: str | None) -> list[str]:
    if system is None:
        return []
    if not _is_value(system):
        return ["# No SYSTEM: the model has a system message that a Modelfile cannot hold.", ""]
    return [f'SYSTEM """{system}"""', ""]


def _learn(render: Any) -> tuple[_Form, bool] | None:
    """The template's form, and whether it strips messages. None if it has no such form or a Modelfile cannot hold it."""
    marks = ["\u2983u1\u2984", "\u2983a1\u2984", "\u2983u2\u2984"]
    turns = Conversation.from_turns(("user", marks[0]), ("assistant", marks[1]), ("user", marks[2]))
    plain = _between(render, turns, marks)
    if plain is None:
        return None
    system = "\u2983s\u2984"
    led = _between(
        render, Conversation((*Conversation.from_turns(("system", system)).messages, *turns.messages)), [system, *marks]
    )
    form = _Form(plain[0], led[0] if led else None, led[1] if led else "", plain[1], plain[2], plain[3])
    texts = (*plain, *(led or ()))
    if any(part in text for text in texts for part in ("{{", '"""')) or not all(map(_is_kept, texts)):
        return None
    unlearnt = [c for c in _UNLEARNT if form.system is not None or c.messages[0].role != "system"]
    for strips in (False, True):
        if all(_rendered(render, c) == form.render(c, strip=strips) for c in (*unlearnt, *_EDGES)):
            return form, strips
    return None


def _between(render: Any, conversation: Conversation, marks: Sequence[str]) -> list[str] | None:
    """The texts before, between and after the messages.

    None if the template rejects the conversation, or does not render each message exactly once and in order.
    """
    text = _rendered(render, conversation)
    parts: list[str] = []
    for mark in marks:
        if text is None or text.count(mark) != 1:
            return None
        part, _, text = text.partition(mark)
        parts.append(part)
    return None if text is None else [*parts, text]


def _rendered(render: Any, conversation: Conversation) -> str | None:
    from jinja2 import TemplateError as JinjaError

    try:
        return render(conversation)
    except (JinjaError, TypeError, KeyError, ValueError):
        return None


def _go(form: _Form) -> str:
    """Writes the form as a Go text/template with Ollama's variable names."""
    after = ""
    system = ""
    if form.system is not None:
        after = '{{ else if and (eq $i 1) (eq (index $.Messages 0).Role "system") }}' + form.after_system
        system = '{{ else if eq .Role "system" }}' + form.system + "{{ .Content }}"
    user = "{{ if eq $i 0 }}" + form.opens + after + "{{ else }}" + form.continues + "{{ end }}{{ .Content }}"
    answer = '{{ else if eq .Role "assistant" }}' + form.answers + "{{ .Content }}"
    each = '{{ if eq .Role "user" }}' + user + answer + system + "{{ end }}"
    return "{{ range $i, $_ := .Messages }}" + each + "{{ end }}" + form.asks
