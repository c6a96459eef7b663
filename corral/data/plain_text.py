"""Plain documents → token ids, all of them trained: what a Template is for conversations, without turns.

Special strings that stand in a document become ordinary tokens, as in a Template. This module does not know where documents
come from.
"""

from __future__ import annotations

import json
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
        template: its tokenizer says which ids there are, and its source which of them steer a model.
    """

    def __init__(self, template: Template) -> None:
        tokenizer = template.tokenizer
        backend: Tokenizer = tokenizer.backend_tokenizer
        self._backend = _without_control(backend, template.source)
        bos: Any = tokenizer.bos_token_id
        # Not every model begins a document with its BOS token. The tokenizer may say so, or the template, where it writes
        # the token once; where it writes it for each turn, the token means something else.
        chat = template.encode(_PROBE).ids
        begins = bos in backend.encode("", add_special_tokens=True).ids or (chat[0] == bos and chat.count(bos) == 1)
        self._begin: tuple[int, ...] = (bos,) if begins else ()
        self._end: tuple[int, ...] = () if tokenizer.eos_token_id is None else (int(str(tokenizer.eos_token_id)),)
        self._control = frozenset(i for i, added in tokenizer.added_tokens_decoder.items() if added.special)

    def encode(self, text: str) -> Encoded:
        """Ids of a whole document: BOS where the model has it, the text, the end token. All but BOS are trained.

        Raises:
            TemplateError: the text is not valid Unicode, or its tokens would steer the model.
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


def split_windows(encoded: Encoded, limit: int) -> tuple[Encoded, ...]:
    """A sequence as pieces of at most `limit` (≥ 2) tokens. Each begins with the last token of the one before, not trained
    there, so that every token is predicted exactly once."""
    assert limit >= 2, f"windows of {limit} predict nothing"
    ids, trained = encoded.ids, encoded.trained
    pieces: list[Encoded] = [Encoded(ids[:limit], trained[:limit])]
    for start in range(limit - 1, len(ids) - 1, limit - 1):
        pieces.append(Encoded(ids[start : start + limit], (False, *trained[start + 1 : start + limit])))
    return tuple(pieces)


def _without_control(backend: Tokenizer, source: str) -> Tokenizer:
    """A tokenizer to which the tokens that steer a model are text."""
    from tokenizers import Tokenizer

    config: dict[str, Any] = json.loads(backend.to_str())
    config.update(truncation=None, padding=None, post_processor=None)
    config["added_tokens"] = [a for a in config["added_tokens"] if not a["special"] and a["content"] not in source]
    return Tokenizer.from_str(json.dumps(config))
