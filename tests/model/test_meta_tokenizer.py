from __future__ import annotations

import base64
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex

from corral.assets import fetch
from corral.errors import ModelError
from corral.model.meta_tokenizer import read_tokenizer
from corral.template import Template
from tests.model.meta import TOKENS, WORDS, llama_2_pieces, sentencepiece, tiktoken_lines
from tests.template.real import LLAMA_3_SPLIT, tokenizer

TEXTS = (
    "This is a test sentence.",
    "  two spaces first,\tand  in between  ",
    "Grüße aus 東京, 🙂 and किताब!\r\n\r\n\n   12345678 3.14",
    "I'LL say it's what they'd've done\n",
    "def double(x):\n        return 2 * x  # aaaaaaaaaaaaaaaaaaaaaa",
    "\x00\u200b\ufffd",
    " ",
    "",
)
BYTES = [bytes([i]) for i in range(256)]


def tiktoken_ids(text: str, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's rule in plain words: in each word, join the two neighbours that make the token of lowest rank."""
    ids: list[int] = []
    for word in regex.findall(LLAMA_3_SPLIT, text):
        whole = word.encode()
        pieces = [whole] if whole in ranks else [bytes([byte]) for byte in whole]
        while len(pieces) > 1:
            joined = [ranks.get(a + b, len(ranks)) for a, b in pairwise(pieces)]
            at = joined.index(min(joined))
            if joined[at] == len(ranks):
                break
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        ids += [ranks[piece] for piece in pieces]
    return ids


def write_file(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    return path


def test_llama_3s_own_file_gives_metas_ids() -> None:
    path = fetch("llama-3-tokenizer").files[0]
    loaded = read_tokenizer(path, scaled_rope=True)
    assert (loaded.size, loaded.bos, loaded.stops, loaded.tiktoken) == (128256, 128000, [128001, 128008, 128009], True)
    # The example in the tests of Meta's own tokenizer.
    assert loaded.fast("This is a test sentence.")["input_ids"] == [128000, 2028, 374, 264, 1296, 11914, 13]
    lines = (line.split() for line in path.read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    for text in TEXTS:
        ids = loaded.fast(text, add_special_tokens=False)["input_ids"]
        assert ids == tiktoken_ids(text, ranks), text
        assert loaded.fast.decode(ids) == text
    theirs = json.loads(tokenizer("llama-3").backend_tokenizer.to_str())["model"]
    assert json.loads(loaded.fast.backend_tokenizer.to_str())["model"] == theirs


def test_llama_2s_pieces_give_metas_ids(tmp_path: Path) -> None:
    path = fetch("llama-2-tokenizer").files[0]
    theirs = json.loads(path.read_text("utf-8"))
    words = list(theirs["model"]["vocab"])[259:]
    loaded = read_tokenizer(write_file(tmp_path, sentencepiece(llama_2_pieces(words))), scaled_rope=False)
    assert (loaded.size, loaded.bos, loaded.stops, loaded.tiktoken) == (32000, 1, [2], False)
    assert loaded.fast("Hello world")["input_ids"] == [1, 15043, 3186]
    ours = json.loads(loaded.fast.backend_tokenizer.to_str())
    assert ours["model"]["vocab"] == theirs["model"]["vocab"]
    assert [" ".join(pair) for pair in ours["model"]["merges"]] == theirs["model"]["merges"]
    reference = tokenizer("llama-2")
    for text in TEXTS:
        assert loaded.fast(text)["input_ids"] == reference(text)["input_ids"], text
    for name in ("normalizer", "pre_tokenizer", "decoder", "added_tokens"):
        assert ours[name] == theirs[name]


def test_the_names_of_special_tokens_are_those_of_the_version(tmp_path: Path) -> None:
    path = write_file(tmp_path, tiktoken_lines(BYTES + TOKENS))
    first = 256 + len(TOKENS)
    third = read_tokenizer(path, scaled_rope=False)
    later = read_tokenizer(path, scaled_rope=True)
    assert third.size == later.size == first + 256

    def names(loaded: Any) -> list[str]:
        return [loaded.fast.convert_ids_to_tokens(first + number).strip("<|>") for number in (*range(12), 255)]

    reserved = [f"reserved_special_token_{i}" for i in range(251)]
    start = ["begin_of_text", "end_of_text", *reserved[:2]]
    headers = ["start_header_id", "end_header_id"]
    assert names(third) == [*start, *reserved[2:4], *headers, reserved[4], "eot_id", *reserved[5:7], reserved[250]]
    pad, eom, python = "finetune_right_pad_id", "eom_id", "python_tag"
    assert names(later) == [*start, pad, reserved[2], *headers, eom, "eot_id", python, reserved[3], reserved[247]]
    assert third.stops == [first + 1, first + 9]
    assert later.stops == [first + 1, first + 8, first + 9]
    assert (third.fast.pad_token_id, later.fast.pad_token_id) == (None, first + 4)
    assert third.fast.eos_token_id == first + 1


def test_no_chat_template_is_made_up_and_those_that_ship_fit(tmp_path: Path) -> None:
    three = read_tokenizer(write_file(tmp_path, tiktoken_lines(BYTES)), scaled_rope=True)
    two = read_tokenizer(write_file(tmp_path, sentencepiece(llama_2_pieces(WORDS))), scaled_rope=False)
    assert three.fast.chat_template is None
    assert two.fast.chat_template is None
    assert Template.load(three.fast, "llama-3.1").stop_ids == (three.stops[0], three.stops[2])
    assert Template.load(two.fast, "llama-2").stop_ids == (2,)


def test_a_model_without_the_first_space_writes_none(tmp_path: Path) -> None:
    loaded = read_tokenizer(
        write_file(tmp_path, sentencepiece(llama_2_pieces(WORDS), add_dummy_prefix=False)), scaled_rope=False
    )
    ids = loaded.fast("in the")["input_ids"]
    assert loaded.fast.convert_ids_to_tokens(ids) == ["<s>", "in", "▁the"]
    assert loaded.fast.decode(ids, skip_special_tokens=True) == "in the"


PIECES = llama_2_pieces(WORDS)
FAULTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "the byte 0x00 has no token"),
    "a web page": (lambda: b"<!DOCTYPE html>\n<html>", r"line 1 is not a token in base64 and its rank: b'<!DOCTYPE"),
    "a git-lfs pointer": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "line 1 is not a token",
    ),
    "a rank left out": (lambda: tiktoken_lines(BYTES).replace(b" 7\n", b" 700\n"), "its 256 ranks are not 0 to 255"),
    "a rank twice": (lambda: tiktoken_lines(BYTES).replace(b" 7\n", b" 6\n"), "line 8 gives rank 6 again"),
    "a token twice": (lambda: tiktoken_lines([*BYTES, b"a"]), "a token is there twice"),
    "a byte left out": (lambda: tiktoken_lines(BYTES[:-1]), "the byte 0xFF has no token"),
    "a line cut short": (lambda: tiktoken_lines(BYTES)[:-5], "line 256 is not a token"),
    "a special token as a word": (
        lambda: tiktoken_lines([*BYTES, b"<|eot_id|>"]),
        r"the special token '<\|eot_id\|>' is an ordinary one too",
    ),
    "pieces cut short": (lambda: sentencepiece(PIECES)[:1000], "cut short"),
    "pieces without settings": (lambda: sentencepiece(PIECES).partition(b"\x12\x05")[0], "cut short|kind 1"),
    "a unigram model": (lambda: sentencepiece(PIECES, model_type=1), "kind 1, not byte-pair encoding"),
    "no bytes": (lambda: sentencepiece(PIECES[:3] + PIECES[259:]), "it has 0 byte pieces, not 256"),
    "pieces of the user's": (lambda: sentencepiece([*PIECES, ("<x>", 0.0, 4)]), "pieces of kinds"),
    "a piece twice": (lambda: sentencepiece([*PIECES, PIECES[-1]]), "a piece is there twice"),
    "squeezed spaces": (lambda: sentencepiece(PIECES, remove_extra_whitespaces=True), "rewrites text"),
    "spaces at the end": (
        lambda: sentencepiece(PIECES, treat_whitespace_as_suffix=True),
        "writes spaces in another way",
    ),
    "no end of text": (lambda: sentencepiece(PIECES, eos_id=-1), "its eos id is"),
    "another protocol buffer": (lambda: b"\n\x02\x08\x01\x12\x00", "a number where bytes belong"),
    "a score of no size": (lambda: b"\n\x05\n\x01a\x12\x00", "a score of 0 bytes"),
    "a field of no kind": (lambda: b"\n\x00\x17", "a field of kind 7 at byte 3"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_cannot_give_metas_ids_is_refused(fault: str, tmp_path: Path) -> None:
    make, message = FAULTS[fault]
    path = write_file(tmp_path, make())
    with pytest.raises(ModelError, match=message) as caught:
        read_tokenizer(path, scaled_rope=False)
    assert caught.value.where == str(path)
    assert "fetch it again" in (caught.value.hint or "")
