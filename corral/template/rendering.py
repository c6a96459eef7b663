"""Renders messages to text with a Jinja2 chat template, with the answers marked.

Templates are rendered in transformers' own sandbox, so that the text is the same as there, and an untrusted template can do
no more than there. Generation markers become two marks in the text, at which it is split into pieces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import date
from functools import lru_cache
from typing import Any, TypeAlias

from corral.errors import TemplateError

SEPARATOR = "\ufdd0"
"""A Unicode noncharacter, never valid in exchanged text, and refused in messages. The texts before and after it are tokenised
as if they did not meet, so that they cannot form a special token together."""

Messages: TypeAlias = list[dict[str, str]]
"""The input of templates: `{"role", "content"}` of each turn."""
Pieces: TypeAlias = list[tuple[str, bool]]
"""A rendered text in pieces; each is an answer with its end token (True) or other text."""

Variables: TypeAlias = Mapping[str, bool | int | float | str]
"""Values of a recipe for variables that its template reads."""
RESERVED_VARIABLES = frozenset(
    {
        *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"),
        *(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")),
        *("additional_special_tokens", "strftime_now", "raise_exception", "namespace", "dict", "range", "loop"),
    }
)
"""Names that a template reads and that no recipe sets: what every rendering gives, and Jinja2's own."""

# No message contains SEPARATOR, so none can contain these marks.
_OPEN, _CLOSE = SEPARATOR + "\ufdd1", SEPARATOR + "\ufdd2"
# Today's date in a template would change its ids every day; the default date of Meta's templates is used instead.
_FIXED_DATE = date(2024, 7, 26)
# What each directive of strftime writes for it, in any locale.
_DATE_PARTS = """
a=Fri A=Friday w=5 u=5 d=26 e=26 -d=26 j=208 -j=208 b=Jul h=Jul B=July m=07 -m=7 y=24 Y=2024 G=2024 C=20 U=29 V=30 W=30
H=00 -H=0 I=12 -I=12 p=AM M=00 -M=0 S=00 -S=0 f=000000 z= Z= D=07/26/24 x=07/26/24 F=2024-07-26 T=00:00:00 X=00:00:00
R=00:00
"""
_DIRECTIVES = {
    **{directive: value for directive, _, value in (pair.partition("=") for pair in _DATE_PARTS.split())},
    "c": "Fri Jul 26 00:00:00 2024",
    "%": "%",
}
# Takes the place of strftime_now where a template computes the format, which is known only when it is rendered.
_DATE_MACRO = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('%{directive}', '{value}')" for directive, value in _DIRECTIVES.items())
    + " }}{% endmacro %}"
)
# How a template with a system message of its own begins. The text is a Jinja2 string, with no more escapes than every program
# that renders templates reads.
_SYSTEM_START = (
    "{% if not messages or messages[0]['role'] != 'system' %}{% set messages = [{'role': 'system', 'content': \""
)
_SYSTEM_END = '"}] + messages %}{% endif %}'
_SYSTEM = re.compile(re.escape(_SYSTEM_START) + r'((?:[^"\\]|\\.)*)' + re.escape(_SYSTEM_END) + r"(?:\n(?=\s))?")
_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_MARKER = re.compile(r"\{%(?P<before>-?)\s*(?:end)?generation\s*(?P<after>-?)%\}")
_STRFTIME = re.compile(r"strftime_now\(\s*(?P<quote>['\"])(?P<format>(?:(?!(?P=quote)).)*)(?P=quote)\s*\)")
_STRFTIME_TEST = re.compile(r"strftime_now\s+is\s+(not\s+)?defined")


class JinjaTemplate:
    """One chat template.

    Args:
        source: Jinja2 text, with or without `{% generation %}` markers.
        special_tokens: the tokenizer's, by their roles, which it may read besides the messages.
        name: its name in errors.

    Attributes:
        source: the Jinja2 text.
        marked: whether it has generation markers.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, Any], name: str) -> None:
        self.source = source
        self.marked = _MARKER.search(self.source) is not None
        self.name = name
        self._variables = {"tools": None, "documents": None, **special_tokens}
        self._compiled: Any = None

    def stripped(self) -> JinjaTemplate:
        """The same template without its markers."""
        return JinjaTemplate(_strip_markers(self.source), self._variables, self.name)

    def text(self, messages: Messages, *, generation_prompt: bool = False) -> str:
        """The rendered text; with `generation_prompt` it ends where the next answer begins. Raises TemplateError."""
        return "".join(piece for piece, _ in self.pieces(messages, generation_prompt=generation_prompt))

    def pieces(self, messages: Messages, *, generation_prompt: bool = False) -> Pieces:
        """The rendered text, split at the markers. Raises TemplateError if the template refuses the conversation."""
        from jinja2 import TemplateError as JinjaError

        try:
            # Compiled on first use, so that an invalid template gives the same error.
            self._compiled = self._compiled or _compile(self.source)
            text: str = self._compiled.render(
                messages=messages, add_generation_prompt=generation_prompt, **self._variables
            )
        except (JinjaError, TypeError, KeyError, ValueError, AttributeError) as error:
            raise TemplateError(f"the template refuses this conversation: {error}", where=self.name) from None
        first, *others = text.split(_OPEN)
        pieces = [(first, False)]
        for other in others:
            answer, _, after = other.partition(_CLOSE)
            pieces += [(answer, True), (after, False)]
        return [piece for piece in pieces if piece[0]]


def with_defaults(source: str, values: Variables, name: str) -> str:
    """A template in which variables have these values wherever it is rendered without them.

    Raises TemplateError if the template, called `name`, reads no variable of that name.
    """
    from jinja2 import Environment, meta
    from jinja2 import TemplateError as JinjaError

    if not values:
        return source
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        read = meta.find_undeclared_variables(environment.parse(_MARKER.sub("", source)))
    except JinjaError as error:
        raise TemplateError(f"the template is not valid Jinja2: {error}", where=name) from None
    for variable in values:
        if variable not in read:
            raise TemplateError(
                f"the template reads no variable {variable!r}",
                where=f"model.template_variables, {name}",
                hint=f"the variables that it reads: {', '.join(sorted(read - RESERVED_VARIABLES)) or 'none'}",
            )
    defaults = [
        f"{{% if {variable} is not defined %}}{{% set {variable} = {json.dumps(value, ensure_ascii=False)} %}}{{% endif %}}"
        for variable, value in values.items()
    ]
    return _put_before("".join(defaults), source)


def with_system(source: str, text: str | None) -> str:
    """A template that renders conversations without a system message with this one; the same template if it is None."""
    if text is None:
        return source
    return _put_before(_SYSTEM_START + "".join(_ESCAPES.get(c, c) for c in text) + _SYSTEM_END, source)


def split_system(source: str) -> tuple[str | None, str]:
    """The inverse of `with_system`: (the system message that a template brings, if any; the template without it)."""
    match = _SYSTEM.match(source)
    if match is None:
        return None, source
    characters = {escape: character for character, escape in _ESCAPES.items()}
    text = re.sub(r"\\.", lambda escape: characters.get(escape[0], escape[0]), match[1])
    return text, source[match.end() :]


def fix_dates(source: str) -> str:
    """The template with the fixed date in place of today's; one whose dates are fixed stays as it is."""
    source = _STRFTIME.sub(lambda m: json.dumps(_FIXED_DATE.strftime(m["format"])), source)
    if _DATE_MACRO in source or "strftime_now" not in _STRFTIME_TEST.sub("", source):
        return source
    return _put_before(_DATE_MACRO, source)


def _put_before(statements: str, source: str) -> str:
    # White space that trimming removes at the start of a line stays there; the sandbox trims the new line break itself.
    return statements + ("\n" if source[:1].isspace() else "") + source


@lru_cache(maxsize=32)  # the shipped ones, which many templates are compared with, and those in use
def _compile(source: str) -> Any:
    """A Jinja2 template in transformers' sandbox; its generation blocks are rendered between two marks."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from transformers.utils import chat_template_utils

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012  (Jinja2 reads it from the class)

        def parse(self, parser: Any) -> list[nodes.Node]:
            line: int = next(parser.stream).lineno
            body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)

            def mark(text: str) -> nodes.Node:
                return nodes.Output([nodes.TemplateData(text)]).set_lineno(line)

            return [mark(_OPEN), *body, mark(_CLOSE)]

    # The library has no public access to its sandbox; a sandbox of our own would have other gaps.
    private: Any = chat_template_utils
    environment: Any = private._compile_jinja_template("").environment.overlay()
    # An overlay shares its parent's extensions; the one for this tag is replaced.
    extensions = [e for e in environment.extensions.values() if "generation" not in e.tags]
    environment.extensions = {e.identifier: e for e in [*extensions, Generation(environment)]}
    return environment.from_string(source)


def _strip_markers(source: str) -> str:
    # A marker that trims white space is replaced by an empty comment that trims in the same way.
    def replacement(marker: re.Match[str]) -> str:
        if marker["before"] or marker["after"]:
            return f"{{#{marker['before']} {marker['after']}#}}"
        at_line = source[: marker.start()].rpartition("\n")[2].strip() == "" or source[marker.end() :].startswith("\n")
        return "{# #}" if at_line else ""

    return _MARKER.sub(replacement, source)
