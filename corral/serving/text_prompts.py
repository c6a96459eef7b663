"""Prompts that are text, with no template around them, as token ids. Knows nothing about requests or engines."""

from __future__ import annotations

from functools import cached_property

from corral.template import Template
from corral.template.tokenization import PieceTokenizer


class TextPrompts:
    """Text → ids, as the tokenizer begins a text (with BOS where it has one), and without special tokens elsewhere.

    A special token's name in the text is text here, as in a message of a chat. Who means the token gives its id.
    """

    def __init__(self, template: Template) -> None:
        self._template = template

    def ids(self, text: str, *, begin: bool = True) -> list[int]:
        """The ids of a text; `begin` puts before them what the tokenizer puts before every text. Raises: TemplateError."""
        ids = self._tokens.tokenize([(self._tokens.escape(text), False)]).ids
        return [*self._beginning, *ids] if begin else [*ids]

    @cached_property
    def _tokens(self) -> PieceTokenizer:
        return PieceTokenizer(self._template.tokenizer, self._template.source)

    @cached_property
    def _beginning(self) -> list[int]:
        encoded = self._template.tokenizer.backend_tokenizer.encode("a", add_special_tokens=True)
        return encoded.ids[: encoded.special_tokens_mask.index(0)]
