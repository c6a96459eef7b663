"""Text of a stream of ids: the tokenizer's own, however the ids are cut."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

from corral.template.decoding import StreamDecoder, TokenBytes

SENTENCE_PIECE = {
    "Llama-2": decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
    "no first space": decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    "Metaspace": decoders.Metaspace(),
}


def streamed(backend: Tokenizer, ids: list[int], size: int) -> str:
    decoder = StreamDecoder(TokenBytes(backend))
    return "".join(decoder.push(ids[i : i + size]) for i in range(0, len(ids), size)) + decoder.finish()


@given(ids=st.lists(st.integers(0, 399), max_size=40), size=st.integers(1, 9))
def test_any_ids_of_a_byte_level_tokenizer_stream_to_what_it_decodes(
    ids: list[int], size: int, tiny_tokenizer: Any
) -> None:
    backend = tiny_tokenizer.backend_tokenizer
    assert streamed(backend, ids, size) == backend.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", SENTENCE_PIECE)
@given(text=st.lists(st.sampled_from(["▁", "a", "▁ab", "é", "🙂", "▁東"]), max_size=20), size=st.integers(1, 9))
def test_text_of_a_sentencepiece_tokenizer_streams_to_what_it_decodes(kind: str, text: list[str], size: int) -> None:
    vocabulary = {"<unk>": 0, "▁": 1, "a": 2, "▁ab": 3} | {f"<0x{i:02X}>": 4 + i for i in range(256)}
    backend = Tokenizer(BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = SENTENCE_PIECE[kind]
    ids: list[int] = []
    for piece in text if kind != "Metaspace" else [p for p in text if p in vocabulary]:
        ids += [vocabulary[piece]] if piece in vocabulary else [4 + byte for byte in piece.replace("▁", " ").encode()]
    assert streamed(backend, ids, size) == backend.decode(ids)


def test_a_tokenizer_of_another_kind_is_decoded_id_by_id() -> None:
    backend = Tokenizer(BPE({"a": 0, "b": 1}, []))
    backend.decoder = decoders.Fuse()
    assert streamed(backend, [0, 1, 1, 7], 1) == "abb"
