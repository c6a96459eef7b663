"""Encodes plain documents as token ids, all of them trained, as a Template encodes conversations.

The names of special tokens in a document become ordinary tokens, as in a Template.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from corral.errors import TemplateError
from corral.messages import Conversation
from corral.template import Encoded, Template

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_PROBE = Conversation.from_turns(("user", "a"), ("assistant", "b"))


class PlainTextEncoder:
    """Encodes documents with a template's tokenizer.

    Args:
        template: its tokenizer encodes; its source, without the system message, shows which tokens control a model.
    """

    def __init__(self, template: Template) -> None:
        tokenizer = template.tokenizer
        backend: Tokenizer = tokenizer.backend_tokenizer
        self._backend = _without_control_tokens(backend, template.bare_source)
        bos: Any = tokenizer.bos_token_id
        # Not every model begins a document with its BOS token. It does if the tokenizer adds the token, or if the template
        # writes it once, at the start; a template that writes it for each turn uses it for something else.
        chat = template.encode(_PROBE).ids
        has_bos = bos in backend.encode("", add_special_tokens=True).ids or (chat[0] == bos and chat.count(bos) == 1)
        self._begin: tuple[int, ...] = (bos,) if has_bos else ()
        self._end: tuple[int, ...] = () if tokenizer.eos_token_id is None else (int(str(tokenizer.eos_token_id)),)
        self._control = frozenset(i for i, added in tokenizer.added_tokens_decoder.items() if added.special)

    def encode(self, text: str) -> Encoded:
        """Ids of a whole document: BOS if the model uses it, the text, the end token. All but BOS are trained.

        Raises TemplateError if the text is not valid Unicode, or it would be encoded with control tokens.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise TemplateError("the text is not valid Unicode") from None
        ids = self._backend.encode(text, add_special_tokens=False).ids
        if not self._control.isdisjoint(ids):
            raise TemplateError("a special token's name in the text cannot be told from the token")
        whole = (*self._begin, *ids, *self._end)
        return Encoded(whole, (False,) * len(self._begin) + (True,) * (len(whole) - len(self._begin)))

    def character_ends(self, text: str, positions: Sequence[int]) -> list[int]:
        """Where in the text the tokens at these positions of its ids end, in characters."""
        offsets = self._backend.encode(text, add_special_tokens=False).offsets
        return [offsets[min(max(0, at - len(self._begin)), len(offsets) - 1)][1] for at in positions]


def split_windows(encoded: Encoded, limit: int) -> tuple[Encoded, ...]:
    """Split a sequence into windows of at most `limit` (≥ 2) tokens. Each begins with the last token of the one before, which
    is not trained there, so that every token is predicted exactly once."""
    assert limit >= 2, f"windows of {limit} predict nothing"
    ids, trained = encoded.ids, encoded.trained
    windows: list[Encoded] = [Encoded(ids[:limit], trained[:limit])]
    for start in range(limit - 1, len(ids) - 1, limit - 1):
        windows.append(Encoded(ids[start : start + limit], (False, *trained[start + 1 : start + limit])))
    return tuple(windows)


def _without_control_tokens(backend: Tokenizer, source: str) -> Tokenizer:
    """A copy of the tokenizer to which control tokens are ordinary text."""
    from tokenizers import Tokenizer

    config: dict[str, Any] = json.loads(backend.to_str())
    config.update(truncation=None, padding=None, post_processor=None)
    config["added_tokens"] = [a for a in config["added_tokens"] if not a["special"] and a["content"] not in source]
    return Tokenizer.from_str(json.dumps(config))
