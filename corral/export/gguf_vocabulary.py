"""Translates a tokenizer into the `tokenizer.ggml.*` metadata of a GGUF file, so that llama.cpp gives the same ids.

llama.cpp has a fixed list of named splitting rules. This module recognises each part of `tokenizer.json` by its content, not
by the model's name, and raises ModelError for a part that llama.cpp cannot reproduce. It supports two families: byte-level
BPE (GPT-2, SmolLM, Llama 3) and SentencePiece-like BPE (Llama 1 and 2).

If the model has a chat template, the metadata follows corral's chat prompts: llama.cpp adds a BOS token only if the rendered
template begins with one, and never adds an EOS token.

Known limits: only llama.cpp's reading of the metadata is considered. corral splits text that spells a special token;
llama.cpp turns it into that token.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from corral.errors import ModelError
from corral.model.loading import load_tokenizer, quiet
from corral.model.meta_tokenizer import LLAMA3_SPLIT
from corral.template import Template, own_templates

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\b")
_STOPS = ("eos", "eot", "eom")


@dataclass(frozen=True, slots=True)
class GgufVocabulary:
    """The tokenizer metadata of a GGUF file.

    Args:
        model: llama.cpp's name of the algorithm: `llama` or `gpt2`.
        pre: llama.cpp's name of the splitting rule.
        tokens: text by id, one for each embedding row.
        types: token type by id.
        scores: merge scores by id, for `llama`; empty for `gpt2`.
        merges: merges in order, for `gpt2`; empty for `llama`.
        add_space_prefix: for `llama`: whether llama.cpp puts a space before text at the start and after a special token.
        add_bos: whether llama.cpp puts the BOS token before a text. It does not double a BOS token that the template writes.
        add_eos: whether llama.cpp puts the EOS token after a text.
        ids: ids of the special tokens that the tokenizer has, by name: bos, eos, eot, eom, unknown, padding.
        chat_template: Jinja2 source without `{% generation %}` markers.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    add_space_prefix: bool | None
    add_bos: bool
    add_eos: bool
    ids: dict[str, int]
    chat_template: str | None

    @property
    def end_ids(self) -> list[int]:
        """The ids that end an answer, the tokenizer's own EOS first."""
        return [self.ids[name] for name in _STOPS if name in self.ids]


def read_vocabulary(folder: Path, rows: int, stop_ids: Sequence[int]) -> GgufVocabulary:
    """Reads the tokenizer of a model folder and translates it for a GGUF file.

    Args:
        folder: contains `tokenizer.json` and `tokenizer_config.json`.
        rows: number of embedding rows. Ids without a token get an unused placeholder token.
        stop_ids: the ids that end an answer, one to three.

    Raises:
        ModelError: if the tokenizer cannot be read, llama.cpp would give other ids, or there are too many stop ids.
        TemplateError: if the chat template has generation markers and cannot be used.
    """
    try:
        return _translate(load_tokenizer(folder), folder, rows, stop_ids)
    except _OtherIdsError as reason:
        raise ModelError(
            f"llama.cpp has no tokenizer that gives the same ids: {reason}",
            where=str(folder / "tokenizer.json"),
            hint="use the model folder itself, or a base model with the tokenizer of Llama 2, Llama 3, GPT-2 or SmolLM",
        ) from None


class _OtherIdsError(Exception):
    """Why llama.cpp would give other ids."""


def _translate(tokenizer: Any, folder: Path, rows: int, stop_ids: Sequence[int]) -> GgufVocabulary:
    where = folder / "tokenizer.json"
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    _check_model(state)
    tokens, types = _tokens(state, rows, where)
    bos = tokenizer.bos_token_id
    chat, opens_with_bos = _chat(tokenizer, where)
    add_bos, add_eos = _ends(tokenizer)
    special = {"bos": bos, "unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id}
    ids = {name: int(token) for name, token in special.items() if token is not None}
    ids |= _end_ids(tokenizer, stop_ids, folder)
    pre, scores, merges, space = "default", list[float](), list[str](), None
    if _is_sentencepiece(state):
        scores = _scores(state, tokens, types)
        space = _space_prefix(state, chat is not None and opens_with_bos)
        types = [BYTE if _BYTE.fullmatch(t) and kind == NORMAL else kind for t, kind in zip(tokens, types, strict=True)]
        if (unknown := ids.get("unknown")) is not None:
            types[unknown] = UNKNOWN
    else:
        pre = _splitting_rule(state)
        merges = [" ".join(pair) for pair in _pairs(state)]
    return GgufVocabulary(
        model="llama" if scores else "gpt2",
        pre=pre,
        tokens=tokens,
        types=types,
        scores=scores,
        merges=merges,
        add_space_prefix=space,
        add_bos=add_bos and (chat is None or opens_with_bos),
        add_eos=add_eos and chat is None,
        ids=ids,
        chat_template=chat,
    )


def _end_ids(tokenizer: Any, stop_ids: Sequence[int], folder: Path) -> dict[str, int]:
    """The ids that end an answer by llama.cpp's names for them, the tokenizer's own EOS first. Raises ModelError."""
    if not 1 <= len(stop_ids) <= len(_STOPS):
        raise ModelError(
            f"the model has {len(stop_ids)} tokens that end an answer; a GGUF file holds 1 to {len(_STOPS)}",
            where=str(folder / "generation_config.json"),
            hint="name in eos_token_id only those that the model writes at the end of an answer",
        )
    eos = tokenizer.eos_token_id
    return dict(zip(_STOPS, sorted(stop_ids, key=lambda token: (token != eos, token)), strict=False))


def _check_model(state: dict[str, Any]) -> None:
    model = state["model"]
    if model.get("type") != "BPE":
        raise _OtherIdsError(f"its model is {model.get('type')!r}, not BPE")
    odd = {key: model[key] for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(key)}
    if odd:
        raise _OtherIdsError(f"its model has {odd}")
    for token in state["added_tokens"]:
        flags = [flag for flag in ("lstrip", "rstrip", "single_word") if token[flag]]
        if flags:
            raise _OtherIdsError(f"its token {token['content']!r} is matched with {', '.join(flags)}")


def _is_sentencepiece(state: dict[str, Any]) -> bool:
    return bool(state["model"].get("byte_fallback"))


def _pairs(state: dict[str, Any]) -> list[tuple[str, str]]:
    merges: list[Any] = state["model"]["merges"]
    return [cast("tuple[str, str]", tuple(m.split(" ", 1) if isinstance(m, str) else m)) for m in merges]


def _tokens(state: dict[str, Any], rows: int, where: Path) -> tuple[list[str], list[int]]:
    vocab: dict[str, int] = state["model"]["vocab"]
    by_id = {token: (text, NORMAL) for text, token in vocab.items()}
    for added in state["added_tokens"]:
        by_id[added["id"]] = (added["content"], CONTROL if added["special"] else USER_DEFINED)
    if max(by_id) >= rows:
        raise ModelError(
            f"the tokenizer has an id {max(by_id)}, the embedding {rows} rows",
            where=str(where),
            hint="use the tokenizer that the model was trained with",
        )
    filled = [by_id.get(i, (f"[PAD{i}]", UNUSED)) for i in range(rows)]
    texts = [text for text, _ in filled]
    ((twice, count),) = Counter(texts).most_common(1)
    if count > 1:
        raise _OtherIdsError(f"{twice!r} is there under two ids")
    return texts, [kind for _, kind in filled]


def _splitting_rule(state: dict[str, Any]) -> str:
    if state["normalizer"] is not None:
        raise _OtherIdsError(f"it changes the text first ({state['normalizer'].get('type')})")
    rule: dict[str, Any] = state["pre_tokenizer"] or {}
    parts: list[dict[str, Any]] = rule.get("pretokenizers", [rule])
    kinds = [part.get("type") for part in parts]
    levels = [part for part in parts if part.get("type") == "ByteLevel"]
    known = len(levels) == 1 and not levels[0]["add_prefix_space"]
    own_regex = known and levels[0].get("use_regex", True)
    ignores = bool(state["model"].get("ignore_merges"))
    if known and own_regex and kinds == ["ByteLevel"]:
        name = "gpt-2"
    elif known and own_regex and kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"]:
        name = "smollm"
    elif known and not own_regex and kinds == ["Split", "ByteLevel"] and _is_llama3_split(parts[0]):
        name = "llama-bpe"
    else:
        raise _OtherIdsError(f"it splits text by {json.dumps(rule, ensure_ascii=False)[:300]}")
    # Only llama.cpp's Llama 3 rule has ignore_merges (a whole word that is a token becomes that token); it cannot be off.
    if ignores != (name == "llama-bpe") and not _merges_suffice(state):
        raise _OtherIdsError(f"ignore_merges is {ignores}, and some of its tokens cannot be merged from smaller ones")
    missing = 256 - sum(token in state["model"]["vocab"] for token in _byte_characters())
    if missing and state["model"].get("unk_token") is not None:
        raise _OtherIdsError(f"{missing} bytes have no token of their own and become {state['model']['unk_token']!r}")
    return name


def _is_llama3_split(part: dict[str, Any]) -> bool:
    return part["pattern"] == {"Regex": LLAMA3_SPLIT} and part["behavior"] == "Isolated" and not part["invert"]


def _byte_characters() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel.alphabet()


def _merges_suffice(state: dict[str, Any]) -> bool:
    """Whether the merges alone produce every token. If so, `ignore_merges` makes no difference."""
    from tokenizers import Tokenizer, models

    added = {token["id"] for token in state["added_tokens"]}
    vocab: dict[str, int] = state["model"]["vocab"]
    merging = Tokenizer(models.BPE(vocab=vocab, merges=_pairs(state)))
    texts = [text for text, token in vocab.items() if token not in added]
    return all(len(encoding.ids) == 1 for encoding in merging.encode_batch(texts, add_special_tokens=False))


def _scores(state: dict[str, Any], tokens: list[str], types: list[int]) -> list[float]:
    """Token scores that make llama.cpp merge in the order of the merge list.

    llama.cpp joins any two neighbours that form a token: highest score first, and the leftmost pair if scores are equal. A
    merge list joins only the pairs that it names. The two agree if the list names every pair that forms a token, and the
    pairs of one token follow one another.
    """
    if not state["model"].get("fuse_unk") and state["model"].get("unk_token") is None:
        raise _OtherIdsError("it has no unknown token")
    missing = [i for i in range(256) if f"<0x{i:02X}>" not in state["model"]["vocab"]]
    if missing:
        raise _OtherIdsError(f"it has no token for the byte <0x{missing[0]:02X}>")
    order: dict[str, int] = {}
    pairs = _pairs(state)
    for left, right in pairs:
        if order.setdefault(left + right, len(order)) != len(order) - 1:
            raise _OtherIdsError(f"the merges that make {left + right!r} do not follow one another")
    listed, vocab = set(pairs), set(tokens)
    for token, kind in zip(tokens, types, strict=True):
        if kind == NORMAL and not _BYTE.fullmatch(token):
            for cut in range(1, len(token)):
                pair = (token[:cut], token[cut:])
                if pair[0] in vocab and pair[1] in vocab and pair not in listed:
                    raise _OtherIdsError(
                        f"{token!r} could be made from {pair[0]!r} and {pair[1]!r}, which no merge says"
                    )
    lowest = float(-len(order))
    return [
        -float(order[token]) if token in order else (lowest if kind == NORMAL and not _BYTE.fullmatch(token) else 0.0)
        for token, kind in zip(tokens, types, strict=True)
    ]


def _space_prefix(state: dict[str, Any], chat_opens_with_bos: bool) -> bool:
    normal: Any = state["normalizer"]
    before: Any = state["pre_tokenizer"]
    steps: list[dict[str, Any]] = [] if normal is None else normal.get("normalizers", [normal])
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    if before is None:
        if steps == [{"type": "Prepend", "prepend": _SPACE}, replaces]:
            return True
        if steps == [replaces]:
            return False
    elif normal is None and before.get("type") == "Metaspace":
        # "first" puts a space before the first text only. A chat that begins with the BOS token therefore gets none.
        nowhere = ("never", "first") if chat_opens_with_bos else ("never",)
        if before["replacement"] == _SPACE and not before["split"] and before["prepend_scheme"] in nowhere:
            return False
    raise _OtherIdsError(
        f"it prepares text by {json.dumps({'normalizer': normal, 'pre_tokenizer': before}, ensure_ascii=False)[:300]}"
    )


def _chat(tokenizer: Any, where: Path) -> tuple[str | None, bool]:
    """The chat template without generation markers, and whether its rendered text begins with the BOS token."""
    templates = own_templates(tokenizer)
    if not templates:
        return None, False
    source = templates.get("default")
    if source is None:
        raise ModelError(
            f"the tokenizer has several chat templates, {', '.join(sorted(templates))}, and none is called default",
            where=str(where),
            hint="keep one in chat_template.jinja: a GGUF file holds one",
        )
    if _GENERATION.search(source):
        source = Template.load(tokenizer).source
    from jinja2 import TemplateError as JinjaError

    try:
        with quiet():
            text: str = tokenizer.apply_chat_template(
                [{"role": "user", "content": "x"}], chat_template=source, tokenize=False, add_generation_prompt=True
            )
    except (JinjaError, TypeError, KeyError, ValueError) as error:
        raise ModelError(
            f"the chat template cannot be rendered: {error}",
            where=str(where.with_name("chat_template.jinja")),
            hint="choose another template in the recipe (model.template)",
        ) from error
    bos: Any = tokenizer.bos_token
    return source, bool(bos) and text.startswith(bos)


def _ends(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer adds the BOS token before a text, and whether it adds the EOS token after it."""
    inner = tokenizer("x", add_special_tokens=False)["input_ids"]
    whole = tokenizer("x", add_special_tokens=True)["input_ids"]
    extra = len(whole) - len(inner)
    first = extra > 0 and whole[0] == tokenizer.bos_token_id and whole[:1] != inner[:1]
    return first, extra > int(first) and whole[-1] == tokenizer.eos_token_id
