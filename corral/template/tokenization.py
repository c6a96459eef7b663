"""Tokenizes pieces of rendered text, with special tokens where the template wrote them and nowhere else.

Each piece is tokenised separately, so the ids of the first pieces do not depend on those that follow.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias
from weakref import WeakValueDictionary

from corral.errors import TemplateError
from corral.template.rendering import SEPARATOR, Pieces
from corral.template.word_boundaries import split_words, words_keep_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

# Encoders: of text at the start, after a special token, and within running text.
_AT_START, _AFTER_SPECIAL, _RUNNING = range(3)
# Words repeat, and so do the pieces that a template writes between its special tokens; longer texts do not.
_LONGEST_CACHED = 24
_MOST_CACHED = 100_000

_WordIds: TypeAlias = dict[str, list[int]]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a text, and whether each one is trained."""

    ids: tuple[int, ...]
    trained: tuple[bool, ...]


class PieceTokenizer:
    """A tokenizer for pieces of text that a template rendered.

    Args:
        tokenizer: a fast tokenizer. It is not changed.
        source: the template's text: added tokens that occur in it count as special.

    Attributes:
        control: the special tokens, and all other added tokens that the template writes; longest first.
        control_ids: their ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, source: str) -> None:
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self.control = _control_tokens(tokenizer, source)
        self._id_of = {token: self._id(token) for token in self.control}
        self.control_ids = frozenset(self._id_of.values())
        alternatives = "|".join(map(re.escape, self.control)) or "(?!)"
        # A lookahead finds overlapping strings too.
        self._special_string = re.compile(f"(?=(?:{alternatives}))")
        self._separators = re.compile(f"({SEPARATOR}|{alternatives})")
        self._control_pattern = re.compile(alternatives)
        self._shared = _Encoders.of(self._backend)
        self._split_words, self._encoders = self._shared.split_words, self._shared.encoders
        # A byte-level tokenizer has one encoder for all three: its texts are encoded in one call.
        self._first_equal = [next(i for i, e in enumerate(self._encoders) if e is other) for other in self._encoders]
        # The ids of words, by encoder. Entries are never removed, as other threads may be reading.
        self._cache: list[_WordIds] = [{} for _ in self._encoders]

    def escape(self, content: str) -> str:
        """A message's text with a SEPARATOR inside each special string.

        Raises:
            TemplateError: it contains half a surrogate pair, or SEPARATOR itself.
        """
        if not content.isascii():
            if SEPARATOR in content:
                raise TemplateError(
                    "the text contains U+FDD0, which is not a character", hint="remove it from the text"
                )
            try:
                content.encode("utf-8")
            except UnicodeEncodeError as error:
                # Without the position, as equal reasons are counted together.
                raise TemplateError(f"the text is not valid Unicode: {error.reason}") from None
        # A separator after its first character breaks a special string.
        cuts = [m.start() + 1 for m in self._special_string.finditer(content)]
        return SEPARATOR.join(content[a:b] for a, b in pairwise([0, *cuts, len(content)])) if cuts else content

    def last_control(self, text: str, start: int = 0) -> re.Match[str] | None:
        """The last special token in a text that does not begin before `start`."""
        return max(self._control_pattern.finditer(text, start), key=lambda m: m.start(), default=None)

    def tokenize(self, pieces: Pieces) -> Encoded:
        """The ids of all pieces in order, each piece tokenised separately, and whether each id's piece is trained."""
        return self.tokenize_batch([pieces])[0]

    def tokenize_batch(self, texts: Sequence[Pieces]) -> list[Encoded]:
        """The same for several texts, in few calls of the tokenizer, which may use several cores for each."""
        plans = [list(self._plan(pieces)) for pieces in texts]
        new_ids = self._encode_new_words(plans)
        results: list[Encoded] = []
        for plan in plans:
            ids: list[int] = []
            trained: list[bool] = []
            for encoder, words, is_trained in plan:
                start = len(ids)
                if encoder < 0:
                    ids.append(self._id_of[words[0]])
                else:
                    self._look_up(encoder, words[:1], new_ids, ids)
                    self._look_up(self._first_equal[_RUNNING], words[1:], new_ids, ids)
                trained += [is_trained] * (len(ids) - start)
            results.append(Encoded(tuple(ids), tuple(trained)))
        return results

    def _plan(self, pieces: Pieces) -> Iterable[tuple[int, list[str], bool]]:
        """(encoder, words, trained) of each run of plain text, and (-1, [token], trained) of each special token."""
        encoder = _AT_START
        for piece, is_trained in pieces:
            for i, part in enumerate(self._separators.split(piece)):
                if i % 2 == 0:
                    if part:
                        yield self._first_equal[encoder], self._split_words(part), is_trained
                        encoder = _RUNNING
                elif part == SEPARATOR:
                    encoder = _RUNNING
                else:
                    yield -1, [part], is_trained
                    encoder = _AFTER_SPECIAL

    def _encode_new_words(self, plans: Iterable[Iterable[tuple[int, list[str], bool]]]) -> list[_WordIds]:
        """For each encoder the ids of words that are not in its cache; short ones are added to it."""
        new_words: list[set[str]] = [set() for _ in self._encoders]
        running = self._first_equal[_RUNNING]
        for plan in plans:
            for encoder, words, _ in plan:
                if encoder >= 0:
                    if words[0] not in self._cache[encoder]:
                        new_words[encoder].add(words[0])
                    new_words[running].update(set(words[1:]).difference(self._cache[running]))
        new_ids: list[_WordIds] = []
        for words, encoder, cache in zip(new_words, self._encoders, self._cache, strict=True):
            batch = list(words)
            encoded = encoder.encode_batch_fast(batch, add_special_tokens=False) if batch else []
            new = {word: e.ids for word, e in zip(batch, encoded, strict=True)}
            if len(cache) < _MOST_CACHED:
                cache.update({word: ids for word, ids in new.items() if len(word) <= _LONGEST_CACHED})
            new_ids.append(new)
        return new_ids

    def _look_up(self, encoder: int, words: list[str], new_ids: list[_WordIds], ids: list[int]) -> None:
        cache, new = self._cache[encoder], new_ids[encoder]
        if new:
            for word in words:
                ids += new[word] if word in new else cache[word]
        else:
            ids += chain.from_iterable(map(cache.__getitem__, words))

    def _id(self, token: str) -> int:
        id_ = self._backend.token_to_id(token)
        assert id_ is not None, f"{token} is an added token without an id"
        return id_


def _keep_whole(text: str) -> list[str]:
    return [text]


def _control_tokens(tokenizer: PreTrainedTokenizerFast, source: str) -> tuple[str, ...]:
    tokens = {
        added.content for added in tokenizer.added_tokens_decoder.values() if added.special or added.content in source
    }
    # A token of one character cannot be split; no special token is so short.
    return tuple(sorted((t for t in tokens if len(t) > 1), key=lambda t: (-len(t), t)))


class _Encoders:
    """What cuts and encodes text as one tokenizer does. It takes seconds to make for a large vocabulary, so that templates on
    equal tokenizers share it."""

    _in_use: ClassVar[WeakValueDictionary[bytes, _Encoders]] = WeakValueDictionary()

    def __init__(self, serialised: str) -> None:
        config: dict[str, Any] = json.loads(serialised)
        self.split_words = split_words if words_keep_ids(config) else _keep_whole
        self.encoders = _make_encoders(serialised, config)

    @classmethod
    def of(cls, backend: Tokenizer) -> _Encoders:
        """Those of a tokenizer as it is now."""
        serialised = backend.to_str()
        digest = hashlib.sha256(serialised.encode()).digest()
        found = cls._in_use.get(digest)
        if found is None:
            found = cls._in_use[digest] = cls(serialised)
        return found


def _make_encoders(serialised: str, config: dict[str, Any]) -> tuple[Tokenizer, Tokenizer, Tokenizer]:
    """Tokenizers for text at the start, after a special token, and within running text.

    SentencePiece-style tokenizers put a space before a text. When transformers tokenises a whole text, this happens at the
    start and, in the "legacy" form (a Prepend normalizer), after each special token, but never within running text.
    Byte-level tokenizers make no difference. `serialised` is the tokenizer's JSON, and `config` its content, which is changed.
    """
    from tokenizers import Tokenizer

    before = config.get("pre_tokenizer")
    encoders = [Tokenizer.from_str(serialised)]
    changed = _replace_values(before, "Metaspace", {"prepend_scheme": {"first": "never"}})
    encoders.append(Tokenizer.from_str(json.dumps(config)) if changed else encoders[0])
    changed = _replace_values(before, "Metaspace", {"prepend_scheme": {"always": "never"}})
    changed |= _replace_values(before, "ByteLevel", {"add_prefix_space": {True: False}})
    changed |= _replace_values(config.get("normalizer"), "Prepend", {"prepend": {"▁": ""}})
    encoders.append(Tokenizer.from_str(json.dumps(config)) if changed else encoders[1])
    for encoder in encoders:
        encoder.no_truncation()
        encoder.no_padding()
    return encoders[0], encoders[1], encoders[2]


def _replace_values(node: Any, kind: str, changes: dict[str, dict[Any, Any]]) -> bool:
    """In a tokenizer's JSON, replace values in every component of a kind. Returns whether there were any."""
    if not isinstance(node, dict):
        return False
    changed = False
    for inner in (*node.get("normalizers", ()), *node.get("pretokenizers", ())):
        changed |= _replace_values(inner, kind, changes)
    if node.get("type") == kind:
        for key, values in changes.items():
            if node.get(key) in values:
                node[key] = values[node[key]]
                changed = True
    return changed
