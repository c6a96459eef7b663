"""The `tokenizer.model` beside Meta's checkpoints → a tokenizer with the same ids.

There are two kinds under one name. Llama 2's is a SentencePiece model (a protocol buffer): any two neighbours that make a
piece are joined, best score first. Llama 3's is a tiktoken file (a line per token: base64 and rank): the same with ranks, on
words cut by a rule that stands in Meta's code, as do the names of its 256 special tokens. Both become byte-pair encoding of
the `tokenizers` library, whose merge list names every pair that makes a token, in the order of the tokens.

It writes no chat template: nothing beside the weights says whether they were tuned to chat. What it does not know of
SentencePiece (user-defined pieces, normalisation, other algorithms) it refuses. This module knows nothing about weights.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, cast

from corral.errors import ModelError

_SPACE = "\u2581"
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # kinds of pieces
_BPE = 2  # a kind of model
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""How Llama 3 splits text into words."""
_SPECIALS = 256
_LLAMA_3 = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
_LLAMA_3_1 = _LLAMA_3 | {4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"}

_Fields: TypeAlias = Iterator[tuple[int, int | bytes]]


@dataclass(frozen=True, slots=True)
class MetaTokenizer:
    """What a `tokenizer.model` says.

    Args:
        fast: a `PreTrainedTokenizerFast` that puts the BOS token before a text.
        size: number of ids, special ones included.
        bos: id that a text begins with.
        stops: ids at which Meta's own generation stops, the end of text first.
        tiktoken: whether it is Llama 3's kind.
    """

    fast: Any
    size: int
    bos: int
    stops: list[int]
    tiktoken: bool


def read_tokenizer(path: Path, *, scaled_rope: bool) -> MetaTokenizer:
    """The tokenizer of a checkpoint.

    Args:
        path: its `tokenizer.model`.
        scaled_rope: Llama 3.1 and later, which gave three of Llama 3's reserved tokens a name.

    Raises:
        ModelError: the file cannot be read, is damaged, or asks for what this module does not know.
    """
    try:
        data = path.read_bytes()
        return _sentencepiece(data) if data[:1] == b"\n" else _tiktoken(data, scaled_rope)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path.name} cannot be used: {error}",
            where=str(path),
            hint="fetch it again: Llama 2's is a SentencePiece model, Llama 3's lists a token and its rank a line",
        ) from error


# ---- Llama 3


def _tiktoken(data: bytes, scaled_rope: bool) -> MetaTokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokens = _ranked(data)
    letters = _byte_letters()
    vocab = {"".join(letters[byte] for byte in token): rank for rank, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ValueError("a token is there twice")
    missing = [byte for byte in range(256) if letters[byte] not in vocab]
    if missing:
        raise ValueError(f"the byte 0x{missing[0]:02X} has no token")
    # A word that is a token is that token, whatever the merges say.
    backend: Any = Tokenizer(models.BPE(vocab=vocab, merges=_merges(list(vocab), vocab), ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    names = _special_names(_LLAMA_3_1 if scaled_rope else _LLAMA_3)
    ids = {name: len(vocab) + place for place, name in enumerate(names)}
    pad = {"pad_token": "<|finetune_right_pad_id|>"} if scaled_rope else {}
    fast = _finished(backend, names, "<|begin_of_text|>", ids, eos_token="<|end_of_text|>", **pad)
    stops = [ids[name] for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>") if name in ids]
    return MetaTokenizer(fast, len(vocab) + len(names), ids["<|begin_of_text|>"], stops, tiktoken=True)


def _ranked(data: bytes) -> list[bytes]:
    """The tokens in order of rank. Raises: ValueError."""
    ranked: dict[int, bytes] = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            token, rank = line.split()
            text, place = base64.b64decode(token, validate=True), int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"line {number} is not a token in base64 and its rank: {line[:40]!r}") from error
        if place in ranked or not text:
            raise ValueError(f"line {number} gives rank {place} again, or to nothing")
        ranked[place] = text
    if set(ranked) != set(range(len(ranked))):
        raise ValueError(f"its {len(ranked)} ranks are not 0 to {len(ranked) - 1}")
    return [ranked[place] for place in range(len(ranked))]


def _byte_letters() -> dict[int, str]:
    """The letter that byte-level tokenizers write for each byte: its own where that can be seen, else one from 256 on."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet: list[str] = sorted(ByteLevel.alphabet())
    seen = {ord(letter): letter for letter in alphabet if ord(letter) < 256}
    unseen = (byte for byte in range(256) if byte not in seen)
    return seen | dict(zip(unseen, alphabet[len(seen) :], strict=True))


def _special_names(named: dict[int, str]) -> list[str]:
    """The special tokens in order: places without a name of their own are counted as reserved."""
    reserved = (place for place in range(_SPECIALS) if place not in named)
    names = named | {place: f"reserved_special_token_{count}" for count, place in enumerate(reserved)}
    return [f"<|{names[place]}|>" for place in range(_SPECIALS)]


# ---- Llama 2


@dataclass(slots=True)
class _Model:
    """What matters of a SentencePiece model; defaults are its format's."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list[tuple[str, float, int]])
    """Text, score, kind, by id."""
    kind: int = 1
    byte_fallback: bool = False
    suffix_space: bool = False
    ids: dict[str, int] = field(default_factory=lambda: {"unk": 0, "bos": 1, "eos": 2})
    rules: bytes = b""
    prefix_space: bool = True
    squeezes_spaces: bool = True
    escapes_spaces: bool = True


def _sentencepiece(data: bytes) -> MetaTokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    model = _parsed(data)
    _refuse_unknown(model)
    vocab = {text: place for place, (text, _, _) in enumerate(model.pieces)}
    normal = [place for place, (_, _, kind) in enumerate(model.pieces) if kind == _NORMAL]
    best_first = sorted(normal, key=lambda place: (-model.pieces[place][1], place))
    texts = [model.pieces[place][0] for place in best_first]
    unknown, bos, eos = (model.pieces[model.ids[name]][0] for name in ("unk", "bos", "eos"))
    merges = _merges(texts, {text: vocab[text] for text in texts})
    backend: Any = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    steps: list[Any] = [normalizers.Prepend(_SPACE)] if model.prefix_space else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    ends: list[Any] = [decoders.Strip(" ", 1, 0)] if model.prefix_space else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    )
    specials = [text for text, _, kind in model.pieces if kind in (_UNKNOWN, _CONTROL)]
    fast = _finished(backend, specials, bos, vocab, eos_token=eos, unk_token=unknown)
    return MetaTokenizer(fast, len(vocab), model.ids["bos"], [model.ids["eos"]], tiktoken=False)


def _refuse_unknown(model: _Model) -> None:
    """Raises: ValueError: byte-pair encoding without normalisation could not give its ids."""
    kinds = {kind for _, _, kind in model.pieces}
    texts = {text for text, _, _ in model.pieces}
    bytes_there = sum(kind == _BYTE for _, _, kind in model.pieces)
    faults = {
        f"its model is of kind {model.kind}, not byte-pair encoding": model.kind != _BPE,
        f"it has {bytes_there} byte pieces, not 256": not model.byte_fallback or bytes_there != 256,
        f"it has pieces of kinds {sorted(kinds)}": not kinds <= {_NORMAL, _UNKNOWN, _CONTROL, _BYTE},
        "a piece is there twice": len(texts) != len(model.pieces),
        "it rewrites text before it splits it": bool(model.rules) or model.squeezes_spaces,
        "it writes spaces in another way": model.suffix_space or not model.escapes_spaces,
    }
    for what, wrong in faults.items():
        if wrong:
            raise ValueError(what)
    for name, place in model.ids.items():
        if place >= len(model.pieces) or model.pieces[place][2] not in (_UNKNOWN, _CONTROL):
            raise ValueError(f"its {name} id is {place}, which is no special piece")


def _parsed(data: bytes) -> _Model:
    """Reads the fields of a `ModelProto` that matter here. Raises: ValueError."""
    model = _Model()
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(_bytes(value)))
            if len(raw := _bytes(piece.get(2, bytes(4)))) != 4:
                raise ValueError(f"a score of {len(raw)} bytes")
            (score,) = struct.unpack("<f", raw)
            model.pieces.append((_bytes(piece.get(1, b"")).decode("utf-8"), score, _number(piece.get(3, _NORMAL))))
        elif number == 2:
            trainer = dict(_fields(_bytes(value)))
            model.kind = _number(trainer.get(3, model.kind))
            model.suffix_space = bool(trainer.get(24, 0))
            model.byte_fallback = bool(trainer.get(35, 0))
            model.ids = {
                name: _number(trainer.get(place, model.ids[name]))
                for name, place in (("unk", 40), ("bos", 41), ("eos", 42))
            }
        elif number == 3:
            rules = dict(_fields(_bytes(value)))
            model.rules = _bytes(rules.get(2, b"")) + _bytes(rules.get(6, b""))
            model.prefix_space, model.squeezes_spaces, model.escapes_spaces = (
                bool(rules.get(place, 1)) for place in (3, 4, 5)
            )
    return model


def _fields(data: bytes) -> _Fields:
    """(number, value) of each field of a protocol buffer's message. Raises: ValueError."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        match key & 7:
            case 0:
                value, at = _varint(data, at)
                yield key >> 3, value
                continue
            case 1:
                size = 8
            case 2:
                size, at = _varint(data, at)
            case 5:
                size = 4
            case kind:
                raise ValueError(f"a field of kind {kind} at byte {at}, which no SentencePiece model has")
        if size > len(data) - at:
            raise ValueError(f"it is cut short: {size} bytes at byte {at} of {len(data)}")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, least first, and the place after it. Raises: ValueError."""
    value = 0
    for shift, byte in enumerate(data[at : at + 10]):
        value |= (byte & 127) << (7 * shift)
        if byte < 128:
            return value, at + shift + 1
    raise ValueError(f"it is cut short, or holds no number at byte {at}")


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where bytes belong")
    return value


def _number(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError("bytes where a number belongs")
    return value


# ---- both


def _merges(texts: list[str], ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, in the order of `texts`, the pairs of one token by their ids."""
    merges: list[tuple[str, str]] = []
    for text in texts:
        pairs = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        known = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
        merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges


def _finished(backend: Any, specials: list[str], bos: str, ids: dict[str, int], **named: str) -> Any:
    """`backend` with special tokens and the BOS token before each text, as a `PreTrainedTokenizerFast`."""
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in specials])
    wrong = [name for name in specials if backend.token_to_id(name) != ids[name]]
    if wrong:
        raise ValueError(f"the special token {wrong[0]!r} is an ordinary one too")
    backend.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, ids[bos])]
    )
    make = cast("Callable[..., Any]", PreTrainedTokenizerFast)
    return make(tokenizer_object=backend, bos_token=bos, clean_up_tokenization_spaces=False, **named)
