from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.data.encoding import encode_record, encode_rows
from corral.errors import ModelError, TemplateError
from corral.messages import Conversation, Feedback, Preference, Record, Text
from corral.template import Template

WORDS = st.text(st.sampled_from("abc 鯨\n"), min_size=1, max_size=60)
ASKED = st.builds(lambda q: Conversation.from_turns(("user", q)), WORDS)
RECORD = st.one_of(
    st.builds(lambda c, a: c.add("assistant", a), ASKED, WORDS),
    st.builds(Preference, ASKED, WORDS, WORDS),
    st.builds(Feedback, ASKED, WORDS, st.just(0.5)),
    st.builds(Text, WORDS),
)


@given(st.lists(RECORD, max_size=8), st.integers(16, 80))
def test_columns_hold_each_rows_sequences_cut_at_the_limit(
    template: Template, records: list[Record], limit: int
) -> None:
    found = encode_rows(records, template, limit)
    for i, record in enumerate(records):
        ids = found["ids"][found["token_ends"][i] : found["token_ends"][i + 1]]
        trained = found["trained"][found["token_ends"][i] : found["token_ends"][i + 1]]
        lengths = found["sequence_lengths"][found["sequence_ends"][i] : found["sequence_ends"][i + 1]]
        whole = encode_record(record, template)
        assert lengths.sum() == len(ids) == len(trained)
        assert (lengths <= limit).all()
        assert found["reason"][i] == -1
        starts = np.cumsum(lengths) - lengths
        counted = trained.sum() - trained[starts].sum()
        assert found["trained_tokens"][i] == counted
        if isinstance(record, Text):
            assert found["trained_tokens"][i] == sum(whole[0].trained[1:])
            assert not found["lost_end"][i]
            continue
        assert ids.tolist() == [token for s in whole for token in s.ids[:limit]]
        assert trained.tolist() == [flag for s in whole for flag in s.trained[:limit]]
        assert found["tokens"][i] == sum(len(s.ids) for s in whole)
        assert found["longest"][i] == max(len(s.ids) for s in whole)
        assert found["least_trained"][i] == min(sum(s.trained[1:limit]) for s in whole)
        assert found["lost_end"][i] == any(any(s.trained[limit:]) for s in whole)


def test_rows_that_the_template_refuses_are_empty_and_say_why(template: Template) -> None:
    good = Conversation.from_turns(("user", "a"), ("assistant", "b"))
    bad = [Conversation.from_turns(("user", "a"), ("assistant", "\ufdd0")), Text("\ud800")]
    found = encode_rows([good, bad[0], good, bad[1], bad[0]], template, 50)
    reasons = json.loads(found["reasons"].tobytes())
    assert found["reason"].tolist() == [-1, 0, -1, 1, 0]
    assert "U+FDD0" in reasons[0]
    assert "Unicode" in reasons[1]
    assert np.diff(found["token_ends"])[[1, 3, 4]].tolist() == [0, 0, 0]
    for record in bad:
        with pytest.raises(TemplateError):
            encode_record(record, template)


@pytest.mark.parametrize(
    "record",
    [
        Conversation.from_turns(("user", "Name a kubectl verb."), ("assistant", "get")),
        Conversation.from_turns(("user", "a"), ("assistant", "kubectl")),
        Preference(Conversation.from_turns(("user", "a")), "b", "kubectl"),
        Feedback(Conversation.from_turns(("user", "a")), "kubectl", 0.5),
        Text("Use kubectl."),
    ],
    ids=["conversation", "answer", "preference", "feedback", "text"],
)
def test_a_row_with_a_token_that_the_embedding_lacks_is_an_error(record: Record, tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["unused", "kubectl"])
    good = Conversation.from_turns(("user", "a"), ("assistant", "b"))
    rows = len(tiny_tokenizer)
    template = Template.load(tokenizer, "chatml", embedding_rows=rows)
    encode_rows([good], template, 80)
    with pytest.raises(ModelError, match=rf"the token 'kubectl' with id {rows + 1}, .* has {rows} rows") as caught:
        encode_rows([good, record], template, 80)
    assert "resize_token_embeddings" in str(caught.value)
    encode_rows([good, record], Template.load(tokenizer, "chatml", embedding_rows=rows + 2), 80)


def test_rows_are_encoded_anew_for_a_model_with_fewer_tokens(tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["kubectl"])

    def fingerprint(rows: int | None) -> str:
        return Template.load(tokenizer, "chatml", embedding_rows=rows).fingerprint

    size = len(tokenizer)
    assert fingerprint(None) == fingerprint(size) == fingerprint(size + 64)
    assert fingerprint(size - 1) != fingerprint(size)


def test_answers_within_a_prompt_are_context_in_a_preference_and_trained_in_a_conversation(template: Template) -> None:
    asked = Conversation.from_turns(("user", "a"), ("assistant", "first"), ("user", "b"))
    (conversation,) = encode_record(asked.add("assistant", "yes"), template)
    chosen, rejected = encode_record(Preference(asked, "yes", "no"), template)
    assert chosen.ids == conversation.ids
    assert sum(conversation.trained) > sum(chosen.trained)
    assert template.decode([i for i, t in zip(chosen.ids, chosen.trained, strict=True) if t]) == "yes"
    assert template.decode([i for i, t in zip(rejected.ids, rejected.trained, strict=True) if t]) == "no"
    (judged,) = encode_record(Feedback(asked, "yes", 0.1), template)
    assert judged == chosen
