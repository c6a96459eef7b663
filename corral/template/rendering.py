"""Messages → text, by a Jinja2 chat template, with the answers marked.

Templates are rendered in transformers' own sandbox, so that the text is the one it renders, and a template from a stranger
can do no more here than there. Generation markers become two marks in the text, by which it is cut into pieces.

This module does not know tokens: which texts are special is `tokenising`'s.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import date
from typing import Any, TypeAlias

from corral.errors import TemplateError

SEPARATOR = "\ufdd0"
"""A Unicode noncharacter, never valid in interchanged text, and refused in messages: what stands before and after it is
tokenised without regard to special tokens that the two would make together."""

Messages: TypeAlias = list[dict[str, str]]
"""What templates read: `{"role", "content"}` of each turn."""
Pieces: TypeAlias = list[tuple[str, bool]]
"""A rendered text in pieces, and of each whether it is an answer with its end token."""

# No message holds SPLIT, so neither mark can be written by one.
_OPEN, _CLOSE = SEPARATOR + "\ufdd1", SEPARATOR + "\ufdd2"
# Templates that print today's date would make new ids each day; the date Meta's templates default to stands for all.
_FIXED_DATE = date(2024, 7, 26)
_MARKER = re.compile(r"\{%(?P<before>-?)\s*(?:end)?generation\s*(?P<after>-?)%\}")
_STRFTIME = re.compile(r"strftime_now\(\s*(?P<quote>['\"])(?P<format>.*?)(?P=quote)\s*\)")


class JinjaTemplate:
    """One chat template.

    Args:
        source: Jinja2 text, with or without `{% generation %}` markers.
        variables: what it may read beside the messages: the tokenizer's special tokens by their roles.
        name: what to call it in errors.

    Attributes:
        source: the text, with every date fixed.
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
        """The rendered text; with `ask`, it ends where the next answer begins. Raises: TemplateError (it is refused)."""
        return "".join(piece for piece, _ in self.pieces(messages, generation_prompt=generation_prompt))

    def pieces(self, messages: Messages, *, generation_prompt: bool = False) -> Pieces:
        """The rendered text, cut at the markers. Raises: TemplateError (the template refuses the conversation)."""
        from jinja2 import TemplateError as JinjaError

        try:
            # Compiled when first used, so that a template that is no Jinja2 is refused in the same words.
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

    # The library has no public way to its sandbox; an environment made here would have other holes than that one.
    private: Any = chat_template_utils
    environment: Any = private._compile_jinja_template("").environment.overlay()
    # An overlay shares its parent's extensions, of which the one for this tag is replaced.
    extensions = [e for e in environment.extensions.values() if "generation" not in e.tags]
    environment.extensions = {e.identifier: e for e in [*extensions, Generation(environment)]}
    return environment.from_string(source)


def _strip_markers(source: str) -> str:
    # An empty comment takes the marker's place where the marker also trims white space around it.
    def replacement(marker: re.Match[str]) -> str:
        if marker["before"] or marker["after"]:
            return f"{{#{marker['before']} {marker['after']}#}}"
        at_line = source[: marker.start()].rpartition("\n")[2].strip() == "" or source[marker.end() :].startswith("\n")
        return "{# #}" if at_line else ""

    return _MARKER.sub(replacement, source)
