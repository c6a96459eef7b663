"""Renders messages to text with a Jinja2 chat template, with the answers marked.

Templates are rendered in transformers' own sandbox, so that the text is the same as there, and an untrusted template can do
no more than there. Generation markers become two marks in the text, at which it is split into pieces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import date
from typing import Any, TypeAlias

from corral.errors import TemplateError

SEPARATOR = "\ufdd0"
"""A Unicode noncharacter, never valid in exchanged text, and refused in messages. The texts before and after it are tokenised
as if they did not meet, so that they cannot form a special token together."""

Messages: TypeAlias = list[dict[str, str]]
"""The input of templates: `{"role", "content"}` of each turn."""
Pieces: TypeAlias = list[tuple[str, bool]]
"""A rendered text in pieces; each is an answer with its end token (True) or other text."""

# No message contains SEPARATOR, so none can contain these marks.
_OPEN, _CLOSE = SEPARATOR + "\ufdd1", SEPARATOR + "\ufdd2"
# Today's date in a template would change its ids every day; the default date of Meta's templates is used instead.
_FIXED_DATE = date(2024, 7, 26)
_MARKER = re.compile(r"\{%(?P<before>-?)\s*(?:end)?generation\s*(?P<after>-?)%\}")
_STRFTIME = re.compile(r"strftime_now\(\s*(?P<quote>['\"])(?P<format>.*?)(?P=quote)\s*\)")


class JinjaTemplate:
    """One chat template.

    Args:
        source: Jinja2 text, with or without `{% generation %}` markers.
        variables: what it may read besides the messages: the tokenizer's special tokens by their roles.
        name: its name in errors.

    Attributes:
        source: the Jinja2 text, with every date fixed.
        marked: whether it has generation markers.
    """

    def __init__(self, source: str, variables: Mapping[str, Any], name: str) -> None:
        self.source = _STRFTIME.sub(lambda m: json.dumps(_FIXED_DATE.strftime(m["format"])), source)
        self.marked = _MARKER.search(self.source) is not None
        self.name = name
        self._variables = {"tools": None, "documents": None, **variables}
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
