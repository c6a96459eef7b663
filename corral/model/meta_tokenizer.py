"""Converts the `tokenizer.model` of Meta's checkpoints to a `tokenizers` tokenizer with the same ids.

Two file formats share this name:

- Llama 2: a SentencePiece model (a protocol buffer). Neighbours that form a piece are joined, highest score first.
- Llama 3: a tiktoken file (one token per line: base64 and rank). Tokens are joined in the same way by rank, within words.
  The file lacks the rule that splits text into words and the names of the 256 special tokens; both are from Meta's code.

Both become byte-pair encoding of the `tokenizers` library. The merge list names every pair that forms a token, in the order
of the tokens.

No chat template is written, because a checkpoint does not say whether it was tuned for chat. SentencePiece features that are
not supported (user-defined pieces, normalisation, other algorithms) raise an error.
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
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # SentencePiece piece types
_BPE = 2  # a SentencePiece model type
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""Llama 3's regular expression for splitting text into words."""
_SPECIALS = 256
_LLAMA_3 = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
_LLAMA_3_1 = _LLAMA_3 | {4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"}

_Fields: TypeAlias = Iterator[tuple[int, int | bytes]]


@dataclass(frozen=True, slots=True)
class MetaTokenizer:
    """A converted `tokenizer.model`.

    Args:
        fast: a `PreTrainedTokenizerFast` that puts the BOS token before a text.
        size: number of ids, including special tokens.
        bos: id of the BOS token.
        stops: ids at which Meta's own code stops generating; the end-of-text id is first.
        tiktoken: whether the file has Llama 3's format.
    """

    fast: Any
    size: int
    bos: int
    stops: list[int]
    tiktoken: bool


def read_tokenizer(path: Path, *, scaled_rope: bool) -> MetaTokenizer:
    """Reads and converts the tokenizer of a checkpoint.

    Args:
        path: the checkpoint's `tokenizer.model`.
        scaled_rope: whether the model is Llama 3.1 or later, which named three of Llama 3's reserved tokens.

    Raises:
        ModelError: if the file cannot be read, is damaged, or uses an unsupported feature.
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
    # A whole word that is a token becomes that token, without merging.
    backend: Any = Tokenizer(models.BPE(vocab=vocab, merges=_merges(list(vocab), vocab), ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    names = _special_names(_LLAMA_3_1 if scaled_rope else _LLAMA_3)
    ids = {name: len(vocab) + index for index, name in enumerate(names)}
    pad = {"pad_token": "<|finetune_right_pad_id|>"} if scaled_rope else {}
    fast = _finished(backend, names, "<|begin_of_text|>", ids, eos_token="<|end_of_text|>", **pad)
    stops = [ids[name] for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>") if name in ids]
    return MetaTokenizer(fast, len(vocab) + len(names), ids["<|begin_of_text|>"], stops, tiktoken=True)


def _ranked(data: bytes) -> list[bytes]:
    """The tokens in order of rank. Raises ValueError if a line or the ranks are invalid."""
    ranked: dict[int, bytes] = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            token, rank = line.split()
            text, rank_number = base64.b64decode(token, validate=True), int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"line {number} is not a token in base64 and its rank: {line[:40]!r}") from error
        if rank_number in ranked or not text:
            raise ValueError(f"line {number} gives rank {rank_number} again, or to nothing")
        ranked[rank_number] = text
    if set(ranked) != set(range(len(ranked))):
        raise ValueError(f"its {len(ranked)} ranks are not 0 to {len(ranked) - 1}")
    return [ranked[rank_number] for rank_number in range(len(ranked))]


def _byte_letters() -> dict[int, str]:
    """Byte-level tokenizers' character for each byte: itself if printable, otherwise a character with a code from 256 on."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet: list[str] = sorted(ByteLevel.alphabet())
    seen = {ord(letter): letter for letter in alphabet if ord(letter) < 256}
    unseen = (byte for byte in range(256) if byte not in seen)
    return seen | dict(zip(unseen, alphabet[len(seen) :], strict=True))


def _special_names(named: dict[int, str]) -> list[str]:
    """The special tokens in id order. Unnamed ones are numbered as reserved tokens."""
    reserved = (index for index in range(_SPECIALS) if index not in named)
    names = named | {index: f"reserved_special_token_{count}" for count, index in enumerate(reserved)}
    return [f"<|{names[index]}|>" for index in range(_SPECIALS)]


# ---- Llama 2


@dataclass(slots=True)
class _Model:
    """The fields of a SentencePiece model that the conversion uses. Defaults are those of the format."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list[tuple[str, float, int]])
    """Text, score and type of each piece, by id."""
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
    vocab = {text: index for index, (text, _, _) in enumerate(model.pieces)}
    normal = [index for index, (_, _, kind) in enumerate(model.pieces) if kind == _NORMAL]
    best_first = sorted(normal, key=lambda index: (-model.pieces[index][1], index))
    texts = [model.pieces[index][0] for index in best_first]
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
    """Raises ValueError if byte-pair encoding without normalisation cannot give the model's ids."""
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
    for name, index in model.ids.items():
        if index >= len(model.pieces) or model.pieces[index][2] not in (_UNKNOWN, _CONTROL):
            raise ValueError(f"its {name} id is {index}, which is no special piece")


def _parsed(data: bytes) -> _Model:
    """Reads the fields of a `ModelProto` that the conversion uses. Raises ValueError if the data is malformed."""
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
                name: _number(trainer.get(field, model.ids[name]))
                for name, field in (("unk", 40), ("bos", 41), ("eos", 42))
            }
        elif number == 3:
            rules = dict(_fields(_bytes(value)))
            model.rules = _bytes(rules.get(2, b"")) + _bytes(rules.get(6, b""))
            model.prefix_space, model.squeezes_spaces, model.escapes_spaces = (
                bool(rules.get(field, 1)) for field in (3, 4, 5)
            )
    return model


def _fields(data: bytes) -> _Fields:
    """Yields (number, value) of each field of a protocol buffer message. Raises ValueError if it is malformed."""
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
    """Decodes a varint (7 bits per byte, lowest first). Returns it and the next position. Raises ValueError if truncated."""
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
    """Every pair of tokens that forms a token, in the order of `texts`. Pairs of one token are sorted by their ids."""
    merges: list[tuple[str, str]] = []
    for text in texts:
        pairs = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        known = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
        merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges


def _finished(backend: Any, specials: list[str], bos: str, ids: dict[str, int], **named: str) -> Any:
    """Adds special tokens and a leading BOS token to `backend`, and wraps it as a `PreTrainedTokenizerFast`."""
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
