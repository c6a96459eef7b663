"""Reads text that a chat template has rendered already (ChatML, Llama 2 to 4, Zephyr, Tulu, Gemma) back into turns.

Only a text that is a rendering from its first character to its last is read so. A text that merely mentions such a token is
text. One that begins as a rendering and is none to its end is refused, as templating it again would train it wrongly.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from corral.data.formats.fields import FormatError
from corral.messages import Message, Role

END_TOKENS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eot|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<end_of_turn>",
    "<|end|>",
    "</s>",
)
"""Strings of tokens that end an answer in the templates of Llama's family and its peers."""
_BEGIN_TOKENS = ("<|begin_of_text|>", "<s>", "<|startoftext|>", "<bos>")
_ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_ROLES["model"] = "assistant"  # as Gemma calls it
_LLAMA_3_PREAMBLE = "Cutting Knowledge Date:"


def parse_rendered(text: str, name: str, *, may_lack_end: bool = False) -> list[Message] | None:
    """The turns of a rendered conversation; None if the text does not begin as one.

    Args:
        text: whole, or a prompt and its completion.
        name: its column, for reasons.
        may_lack_end: whether the answer at the end may lack its end token, as a completion may. A text without one is cut.

    A last turn without content (a generation prompt) is left out.

    Raises FormatError if the text begins as a rendering and cannot be read as one to its end.
    """
    body = text.strip()
    for token in _BEGIN_TOKENS:
        body = body.removeprefix(token).lstrip()
    for start, style, parse in _STYLES:
        if body.startswith(start):
            is_whole = may_lack_end or body.endswith(END_TOKENS)
            turns = parse(body) if is_whole else None
            if turns is None:
                raise FormatError(
                    f"{name} begins as a conversation rendered by {style}, and is none to its end: give its turns as messages"
                )
            return turns
    return None


_JSON_TURN = re.compile(r"[\[\s]*\{\s*[\"'](role|from|content|value)[\"']\s*:")


def refuse_rendered(text: str, name: str) -> str:
    """The text of one message. Raises FormatError if it is a rendered conversation, a list of turns in JSON or as Python
    prints it, or ends in an end token."""
    if text[:1] in "[{" and _JSON_TURN.match(text[:200]):
        raise FormatError(f"{name} is text that holds turns of a chat: write them as JSON, a list of objects")
    if "<" in text or "[" in text:
        if text.lstrip().startswith(_STARTS) and parse_rendered(text, name, may_lack_end=True) is not None:
            raise FormatError(
                f"{name} is a whole conversation that a template has rendered: give its turns as messages"
            )
        refuse_end_token(text, name)
    return text


def refuse_end_token(text: str, name: str) -> str:
    """The text. Raises FormatError if it ends in the letters of an end token, which would be trained as letters."""
    token = next((token for token in END_TOKENS if text.rstrip().endswith(token)), None)
    if token is not None:
        raise FormatError(f"{name} ends in {token}, which the template writes: remove it from the text")
    return text


def _without_end(text: str) -> str:
    """A turn's text without the end tokens behind it, and without the white space around them."""
    text = text.strip()
    while text.endswith(END_TOKENS):
        token = next(token for token in END_TOKENS if text.endswith(token))
        text = text.removesuffix(token).rstrip()
    return text


def _parse_headers(body: str, open_token: str, close_role: str) -> list[Message] | None:
    """The turns of `OPEN role CLOSE content END …`."""
    turns: list[Message] = []
    parts = body.split(open_token)[1:]
    for number, part in enumerate(parts, start=1):
        author, closed, content = part.partition(close_role)
        role = _ROLES.get(author.strip())
        is_last = number == len(parts)
        if role is None or not (closed or is_last):
            return None
        if not is_last and not content.rstrip().endswith(END_TOKENS):
            return None
        content = _without_end(content)
        if any(token in content for token in END_TOKENS):
            return None
        if role == "system" and content.startswith(_LLAMA_3_PREAMBLE):
            # Llama 3.1's template writes it by itself.
            content = content.partition("\n\n")[2].strip()
            if not content:
                continue
        if content:
            turns.append(Message(role, content))
        elif not is_last:
            return None
    return turns or None


def _parse_chatml(body: str) -> list[Message] | None:
    return _parse_headers(body, "<|im_start|>", "\n")


def _parse_llama_3(body: str) -> list[Message] | None:
    return _parse_headers(body, "<|start_header_id|>", "<|end_header_id|>")


def _parse_llama_4(body: str) -> list[Message] | None:
    return _parse_headers(body, "<|header_start|>", "<|header_end|>")


def _parse_gemma(body: str) -> list[Message] | None:
    return _parse_headers(body, "<start_of_turn>", "\n")


_ZEPHYR_ROLE = re.compile(r"<\|(system|user|assistant)\|>\n")


def _parse_zephyr(body: str) -> list[Message] | None:
    """The turns of `<|role|>` on a line of its own, then content; Zephyr ends each with an end token, Tulu answers only."""
    _, *parts = _ZEPHYR_ROLE.split(body)
    turns = [Message(_ROLES[role], _without_end(text)) for role, text in zip(parts[::2], parts[1::2], strict=True)]
    if turns and not turns[-1].content:
        del turns[-1]
    unclean = any(not turn.content or any(token in turn.content for token in END_TOKENS) for turn in turns)
    return None if unclean or not turns else turns


def _parse_llama_2(body: str) -> list[Message] | None:
    turns: list[Message] = []
    for number, part in enumerate(body.split("[INST]")[1:]):
        question, closed, answer = part.partition("[/INST]")
        question = question.strip()
        if number == 0 and question.startswith("<<SYS>>"):
            system, ended, question = question.removeprefix("<<SYS>>").partition("<</SYS>>")
            if not ended or not system.strip():
                return None
            turns.append(Message("system", system.strip()))
            question = question.strip()
        answer = _without_end(answer.strip().removesuffix("<s>"))
        if not closed or not question or any(token in answer for token in (*END_TOKENS, "[/INST]")):
            return None
        turns.append(Message("user", question))
        if answer:
            turns.append(Message("assistant", answer))
    return turns or None


_STYLES: tuple[tuple[str, str, Callable[[str], list[Message] | None]], ...] = (
    ("<|im_start|>", "ChatML", _parse_chatml),
    ("<|start_header_id|>", "Llama 3's template", _parse_llama_3),
    ("<|header_start|>", "Llama 4's template", _parse_llama_4),
    ("<start_of_turn>", "Gemma's template", _parse_gemma),
    ("<|system|>\n", "Zephyr's or Tulu's template", _parse_zephyr),
    ("<|user|>\n", "Zephyr's or Tulu's template", _parse_zephyr),
    ("[INST]", "Llama 2's template", _parse_llama_2),
)
_STARTS = (*_BEGIN_TOKENS, *(start for start, _, _ in _STYLES))
