"""Decodes a stream of token ids to text, whole characters only, and cuts text at stop strings.

Every id stands for bytes, and a character may need the bytes of several ids. Working on bytes makes the text the same however
the stream is split, also where a model samples bytes that are not UTF-8 (each such run becomes one U+FFFD, as Unicode
recommends). Tokenizers of the Llama family (byte-level and SentencePiece) are supported exactly; with others each id is
decoded alone.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # SentencePiece's mark for a space


class TokenBytes:
    """The bytes that each id of a tokenizer adds to the text; special tokens and unknown ids add none."""

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        decoder: Any = backend.decoder
        state: dict[str, Any] = json.loads(decoder.__getstate__()) if decoder else {}
        parts: dict[str, dict[str, Any]] = {part["type"]: part for part in state.get("decoders", [state]) if part}
        self._token_to_bytes = self._decode_single
        if "ByteLevel" in parts:
            self._token_to_bytes = _byte_level
        elif {"ByteFallback", "Metaspace"} & parts.keys():
            self._token_to_bytes = _sentence_piece
        self.drops_first_space = (
            "Strip" in parts or parts.get("Metaspace", {}).get("prepend_scheme", "never") != "never"
        )
        """Whether decoding removes the space that SentencePiece puts before a text."""
        added: dict[int, Any] = backend.get_added_tokens_decoder()
        self._known: dict[int, bytes] = {id_: b"" for id_, token in added.items() if token.special}

    def __getitem__(self, id_: int) -> bytes:
        """The bytes of one id."""
        known = self._known.get(id_)
        if known is None:
            token = self._backend.id_to_token(id_)
            known = self._known[id_] = b"" if token is None else self._token_to_bytes(token)
        return known

    def _decode_single(self, token: str) -> bytes:
        id_ = self._backend.token_to_id(token)
        return b"" if id_ is None else self._backend.decode([id_]).encode()


class StreamDecoder:
    """Decodes the ids of one stream to text, holding back bytes that are not yet a whole character."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._drops_space = token_bytes.drops_first_space

    def push(self, ids: Sequence[int]) -> str:
        """The text that these ids complete."""
        return self._without_first_space(self._utf8.decode(b"".join(self._bytes[id_] for id_ in ids)))

    def finish(self) -> str:
        """The rest, if the stream ended inside a character."""
        return self._without_first_space(self._utf8.decode(b"", True))

    def _without_first_space(self, text: str) -> str:
        if self._drops_space and text:
            self._drops_space = False
            return text.removeprefix(" ")
        return text


def _byte_level(token: str) -> bytes:
    # An added token may hold characters that stand for no byte: it is plain text.
    values = [_BYTE_FOR_CHARACTER.get(character) for character in token]
    return token.encode() if None in values else bytes(b for b in values if b is not None)


def _sentence_piece(token: str) -> bytes:
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode()


def _printable_bytes() -> dict[str, int]:
    """GPT-2's printable character for each byte: itself if it is visible, else the next free one from U+0100."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(unseen)}


_BYTE_FOR_CHARACTER = _printable_bytes()


class StopStringCutter:
    """Cuts streamed text at the first stop string: the one that is complete first, and of several the longest.

    Text that may still become a stop string is held back. The joined output does not depend on how the text arrives.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The new text that is certainly before any stop string."""
        if not self._stop or self.stopped:
            return "" if self.stopped else text
        text = self._held + text
        matches = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if matches:
            self.stopped, self._held = True, ""
            return text[: min(matches)[1]]
        # There is no whole stop string, so an incomplete one starts within its own length of the end.
        longest = max(map(len, self._stop)) - 1
        starts = range(max(0, len(text) - longest), len(text))
        keep = next((at for at in starts if any(stop.startswith(text[at:]) for stop in self._stop)), len(text))
        self._held = text[keep:]
        return text[:keep]

    def finish(self) -> str:
        """The text held back, once the stream has ended."""
        held, self._held = self._held, ""
        return held
