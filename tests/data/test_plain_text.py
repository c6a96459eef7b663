"""Documents as ids: every token trained, special strings as text, and pieces that predict every token once."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corral.data.plain_text import PlainTextEncoder, split_windows
from corral.errors import TemplateError
from corral.template import Encoded, Template
from tests.template import real

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
PIECES = st.lists(
    TEXT | st.sampled_from(["<|im_end|>", "<|im_start|>", "<|endoftext|>", "</s>", "<s>", " ", "\n"]), max_size=5
)


@settings(deadline=None, max_examples=60)
@given(text=PIECES.map("".join))
def test_a_document_is_encoded_as_its_text_and_an_end_token_all_trained(text: str, template: Template) -> None:
    encoded = PlainTextEncoder(template).encode(text)
    assert encoded.ids[-1] == template.tokenizer.eos_token_id
    assert not set(encoded.ids[:-1]) & set(template.special_ids)
    assert template.decode(encoded.ids[:-1]) == text
    assert all(encoded.trained)


def test_half_a_surrogate_pair_is_refused(template: Template) -> None:
    with pytest.raises(TemplateError, match="not valid Unicode"):
        PlainTextEncoder(template).encode("a\ud800")


@pytest.mark.parametrize(
    ("name", "begin", "end"),
    [
        ("llama-2", "<s>", "</s>"),
        ("llama-3", "<|begin_of_text|>", "<|end_of_text|>"),
        ("smollm2", "", "<|im_end|>"),
    ],
)
def test_a_document_begins_and_ends_as_each_real_model_was_trained(name: str, begin: str, end: str) -> None:
    template = real.template(name)
    tokenizer: Any = template.tokenizer
    plain = PlainTextEncoder(template)
    text = f"Once{end} upon {begin}a time.\n\n Grüße 東京 🙂<|eot_id|>"
    encoded = plain.encode(text)
    special = [i for i in encoded.ids if i in tokenizer.all_special_ids]
    assert tokenizer.convert_ids_to_tokens(special) == [token for token in (begin, end) if token]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=True) == text
    assert encoded.trained == (not begin,) + (True,) * (len(encoded.ids) - 1)
    once = "Once upon a time."
    assert list(plain.encode(once).ids[bool(begin) : -1]) == tokenizer(once, add_special_tokens=False)["input_ids"]


@given(count=st.integers(1, 60), limit=st.integers(2, 20), begins=st.booleans())
def test_windows_are_short_enough_and_predict_every_token_once(count: int, limit: int, begins: bool) -> None:
    whole = Encoded(tuple(range(count)), (begins,) + (True,) * (count - 1))
    pieces = split_windows(whole, limit)
    assert all(2 <= len(piece.ids) <= limit or len(pieces) == 1 for piece in pieces)
    predicted = [i for p in pieces for i, trained in zip(p.ids[1:], p.trained[1:], strict=True) if trained]
    assert predicted == list(range(1, count))
    assert pieces[0].trained[0] == begins
    assert not any(piece.trained[0] for piece in pieces[1:])
