from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.data.encoding import FITS, EncodedRow, RowEncoder, cut_record, encode_record, encode_rows
from corral.errors import DataError, ModelError, TemplateError
from corral.messages import Conversation, Feedback, Preference, Record, Text
from corral.recipe import Data, Source
from corral.template import Template
from tests.data.conftest import dialogue

WORDS = st.text(st.sampled_from("abc 鯨\n"), min_size=1, max_size=60)
ASKED = st.builds(lambda q: Conversation.from_turns(("user", q)), WORDS)
RECORD = st.one_of(
    st.builds(lambda c, a: c.add("assistant", a), ASKED, WORDS),
    st.builds(Preference, ASKED, WORDS, WORDS),
    st.builds(Feedback, ASKED, WORDS, st.just(0.5)),
    st.builds(Text, WORDS),
)


def settings(limit: int, **others: Any) -> Data:
    return Data(sources=(Source(path="a.jsonl"),), max_length=limit, **others)


def encode(template: Template, record: Record, limit: int, **others: Any) -> EncodedRow:
    (row,) = RowEncoder(template, settings(limit, **others)).encode_all([record])
    return row


def trained_text(template: Template, row: EncodedRow) -> list[str]:
    return [template.decode([i for i, t in zip(s.ids, s.trained, strict=True) if t]) for s in row.sequences]


@given(st.lists(RECORD, max_size=8), st.integers(16, 80))
def test_columns_hold_each_rows_sequences_cut_at_the_limit(
    template: Template, records: list[Record], limit: int
) -> None:
    found = encode_rows(records, template, settings(limit, overlong="truncate"))
    for i, record in enumerate(records):
        sequences, flags = found["ids"][i].as_py(), found["trained"][i].as_py()
        whole = encode_record(record, template)
        if FITS[found["fit"][i]] == "fully masked":
            assert min(sum(s.trained[1:limit]) for s in whole) == 0
            continue
        if FITS[found["fit"][i]] == "dropped":  # nothing to prefer is left
            assert len(whole) == 2
            assert whole[0].ids[:limit] == whole[1].ids[:limit]
            assert found["reason"][i].as_py().endswith("chosen and rejected are the same")
            continue
        assert [*map(len, sequences)] == [*map(len, flags)]
        assert all(len(sequence) <= limit for sequence in sequences)
        assert found["reason"][i].as_py() == ""
        assert found["trained_tokens"][i] == sum(sum(sequence[1:]) for sequence in flags)
        if isinstance(record, Text):
            assert found["trained_tokens"][i] == sum(whole[0].trained[1:])
            assert not found["lost_end"][i]
            continue
        assert sequences == [list(s.ids[:limit]) for s in whole]
        assert flags == [list(s.trained[:limit]) for s in whole]
        assert found["tokens"][i] == sum(len(s.ids) for s in whole)
        assert found["lost_end"][i] == any(any(s.trained[limit:]) for s in whole)


def test_rows_that_the_template_refuses_are_empty_and_say_why(template: Template) -> None:
    good = Conversation.from_turns(("user", "a"), ("assistant", "b"))
    bad = [Conversation.from_turns(("user", "a"), ("assistant", "\ufdd0")), Text("\ud800")]
    found = encode_rows([good, bad[0], good, bad[1], bad[0]], template, settings(50))
    reasons = found["reason"].to_pylist()
    assert [reason != "" for reason in reasons] == [False, True, False, True, True]
    assert "U+FDD0" in reasons[1] == reasons[4]
    assert "Unicode" in reasons[3]
    assert [len(sequences) for sequences in found["ids"].to_pylist()] == [1, 0, 1, 0, 0]
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
    encode_rows([good], template, settings(80))
    with pytest.raises(ModelError, match=rf"the token 'kubectl' with id {rows + 1}, .* has {rows} rows") as caught:
        encode_rows([good, record], template, settings(80))
    assert "resize_token_embeddings" in str(caught.value)
    encode_rows([good, record], Template.load(tokenizer, "chatml", embedding_rows=rows + 2), settings(80))


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


@given(
    exchanges=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=8),
    system=st.sampled_from(["", "Be brief."]),
    limit=st.integers(40, 200),
)
def test_a_split_conversation_trains_each_exchange_once_in_windows_that_fit(
    template: Template, exchanges: list[tuple[int, int]], system: str, limit: int
) -> None:
    turns: list[tuple[Any, str]] = [("system", system)] if system else []
    for i, (asked, said) in enumerate(exchanges):
        turns += [("user", f"{i}?" + " so" * asked), ("assistant", f"{i}!" + " yes" * said)]
    whole = Conversation.from_turns(*turns)
    row = encode(template, whole, limit)
    alone = [
        len(template.encode(Conversation.from_turns(*turns[: bool(system)], *turns[i : i + 2])).ids)
        for i in range(bool(system), len(turns), 2)
    ]
    fitting = [i for i, length in enumerate(alone) if length <= limit]
    if len(template.encode(whole).ids) <= limit:
        assert (row.fit, row.parts) == ("kept", ((0, 0),))
        return
    if not fitting:
        assert (row.fit, row.reason) == ("dropped", f"longer than {limit} tokens")
        return
    if len(exchanges) > 1:
        assert row.fit == ("split" if len(fitting) == len(exchanges) else "trimmed")
    assert [i for start, end in row.parts for i in range(start // 2, end // 2)] == fitting
    for sequence, (start, end) in zip(row.sequences, row.parts, strict=True):
        window = cut_record(whole, start, end)
        assert isinstance(window, Conversation)
        assert (window.messages[0].role == "system") == bool(system)
        assert template.encode(window) == sequence
        assert len(sequence.ids) <= limit
        # No window could have taken the next exchange.
        longer = cut_record(whole, start, end + 2)
        if end // 2 < len(exchanges) and end // 2 in fitting:
            assert isinstance(longer, Conversation)
            assert len(template.encode(longer).ids) > limit - 2


def test_truncating_ends_at_an_answers_end_if_one_fits(template: Template) -> None:
    whole = Conversation.from_json(dialogue(4, 10, system="Be brief."))
    two = cut_record(whole, 0, 4)
    assert isinstance(two, Conversation)
    ids = template.encode(two).ids
    cut = encode(template, whole, len(ids) + 5, overlong="truncate")
    assert (cut.fit, cut.sequences[0].ids, cut.lost_end) == ("truncated", ids, False)
    asked = len(template.prompt(Conversation(whole.messages[:2])))
    short = encode(template, whole, asked + 3, overlong="truncate")
    assert (short.fit, len(short.sequences[0].ids), short.lost_end) == ("truncated", asked + 3, True)
    assert encode(template, whole, len(ids), overlong="drop").reason == f"longer than {len(ids)} tokens"


def test_an_answer_that_is_not_to_be_trained_is_context(template: Template) -> None:
    turns = dialogue(3, 2)["messages"]
    turns[1]["trained"] = False
    whole = Conversation.from_json({"messages": turns})
    assert trained_text(template, encode(template, whole, 500)) == [turns[3]["content"] + turns[5]["content"]]
    plain = Conversation.from_json(dialogue(3, 2))
    assert template.encode(whole).ids == template.encode(plain).ids
    assert trained_text(template, encode(template, plain, 500, train_on="last_answer")) == [turns[5]["content"]]
    for turn in turns:
        turn["trained"] = False
    masked = encode(template, Conversation.from_json({"messages": turns}), 500)
    assert (masked.fit, masked.reason) == ("fully masked", "fully masked: none of its tokens is trained")
    split = encode(template, Conversation.from_json(dialogue(12, 20)), 400, train_on="last_answer")
    assert (split.fit, len(split.sequences)) == ("trimmed", 1)
    assert len(split.sequences[0].ids) > 250, "with as much context as fits"
    assert trained_text(template, split)[0].startswith("11!")


@given(st.text(st.sampled_from("abc 鯨🙂\n"), min_size=1, max_size=400))
def test_the_windows_of_a_text_are_named_by_characters_that_join_to_it(template: Template, text: str) -> None:
    row = encode(template, Text(text), 20)
    if row.fit == "kept":
        assert row.parts == ((0, 0),)
        return
    assert row.fit == "split"
    assert all(len(s.ids) <= 20 for s in row.sequences)
    pieces = [cut_record(Text(text), start, end) for start, end in row.parts]
    assert "".join(piece.content for piece in pieces if isinstance(piece, Text)) == text


def test_the_templates_system_message_is_in_every_window_and_counts(tiny_tokenizer: Any) -> None:
    bearing = Template.load(tiny_tokenizer, "chatml", system="Be kind.")
    plain = Template.load(tiny_tokenizer, "chatml")
    talk = Conversation.from_json(dialogue(5, 3))
    stated = Conversation((*Conversation.from_turns(("system", "Be kind.")).messages, *talk.messages))
    for limit in (60, 90, 400):
        row = encode(bearing, talk, limit)
        assert row.sequences == encode(plain, stated, limit).sequences
        assert row.parts == encode(plain, stated, limit).parts
    windows = encode(bearing, talk, 90).sequences
    assert len(windows) > 1
    led = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n"
    assert all(tiny_tokenizer.decode(list(window.ids)).startswith(led) for window in windows)


@pytest.mark.parametrize("overlong", ["split", "truncate", "drop"])
def test_a_system_message_that_leaves_no_room_is_an_error(overlong: str, tiny_tokenizer: Any) -> None:
    bearing = Template.load(tiny_tokenizer, "chatml", system="Be kind. " * 20)
    talk = Conversation.from_turns(("user", "a"), ("assistant", "b"))
    with pytest.raises(DataError, match=r"the shortest prompt has \d{2,3} tokens, and .* may have 40") as caught:
        encode(bearing, talk, 40, overlong=overlong)
    assert caught.value.where == "data.max_length, data.system"
    assert encode(bearing, Text("a"), 40).fit == "kept"
    stated = Conversation((*Conversation.from_turns(("system", "Be kind.")).messages, *talk.messages))
    assert encode(bearing, stated, 60, overlong=overlong).fit == "kept", "a row with its own needs no other"
