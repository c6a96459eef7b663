from __future__ import annotations

import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from corral.data.ledger import FATES
from corral.data.prepare import Prepared
from corral.data.preview import Piece, pick_rows, split_pieces, to_html, to_terminal
from corral.errors import TemplateError
from corral.messages import Conversation
from corral.template import Template
from tests.data.conftest import NONE_HELD_OUT, chat, chats, dialogue, source, write_rows

Prepare = Callable[..., Prepared]


def pieces_of(template: Template, conversation: Conversation, kept: int = 10**6) -> list[Piece]:
    return list(split_pieces(template.encode(conversation), kept, template, frozenset(template.special_ids)))


@given(st.text(min_size=1, max_size=40), st.text(min_size=1, max_size=40))
def test_the_pieces_are_the_text_also_where_a_character_spans_several_tokens(
    template: Template, question: str, answer: str
) -> None:
    conversation = Conversation.from_turns(("user", question), ("assistant", answer))
    try:
        encoded = template.encode(conversation)
    except TemplateError:
        return
    shown = pieces_of(template, conversation)
    text = "".join(piece.text for piece in shown)
    assert text == f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
    assert sum(piece.tokens for piece in shown) == len(encoded.ids)
    trained = "".join(piece.text for piece in shown if piece.kind == "trained")
    assert trained == f"{answer}<|im_end|>"


def test_a_character_of_several_tokens_is_one_piece(template: Template) -> None:
    shown = pieces_of(template, Conversation.from_turns(("user", "a"), ("assistant", "鯨x")))
    (whale,) = (piece for piece in shown if "鯨" in piece.text)
    assert whale == Piece("鯨", "trained", special=False, tokens=3)


def test_a_special_string_typed_by_a_user_is_not_shown_as_special(template: Template) -> None:
    shown = pieces_of(template, Conversation.from_turns(("user", "say <|im_end|> now"), ("assistant", "no")))
    assert sum(piece.special for piece in shown) == 4
    assert "say <|im_end|> now" in "".join(piece.text for piece in shown if not piece.special)


def test_tokens_past_the_limit_are_cut_and_a_character_cut_through_is_cut(template: Template) -> None:
    conversation = Conversation.from_turns(("user", "a"), ("assistant", "鯨鯨"))
    encoded = template.encode(conversation)
    start = encoded.trained.index(True)
    shown = pieces_of(template, conversation, kept=start + 4)
    assert [(p.text, p.kind) for p in shown if p.kind != "context"] == [
        ("鯨", "trained"),
        ("鯨", "cut"),
        ("<|im_end|>", "cut"),
        ("\n", "cut"),
    ]


@pytest.fixture
def mixed(prepared: Prepare, tmp_path: Path) -> Prepared:
    rows = [
        *chats(40),
        *[chat(f"Long {i}?", "yes " * 120) for i in range(12)],
        chat("<script>alert(1)</script> & \x1b[31m \u202e", "<b>bold</b>"),
        {"messages": [{"role": "user", "content": "<i>unanswered</i> \x1b]0;x\x07"}]},
        {"messages": [{"role": "<u>", "content": "x"}]},
    ]
    a = source(write_rows(tmp_path / "a.jsonl", rows), format="messages")
    return prepared(a, max_length=100, overlong="truncate", contamination="ignore")


def test_rows_of_each_side_and_fate_are_picked(mixed: Prepared, template: Template) -> None:
    shown = pick_rows(mixed, template, rows=2)
    for side in ("train", "validation", "test"):
        for fate in ("kept", "truncated"):
            wanted = min(2, int((mixed.side(side).fates == FATES.index(fate)).sum()))
            assert sum((row.side, row.fate) == (side, fate) for row in shown) == wanted > 0
    for row in shown:
        assert row.tokens["trained"] > 0
        assert (row.tokens["cut"] > 0) == (row.fate == "truncated")
        if row.fate == "truncated":
            assert row.tokens["trained"] + row.tokens["context"] == 100


def test_rows_of_which_a_part_is_used_are_titled_by_their_fate(
    prepared: Prepare, template: Template, tmp_path: Path
) -> None:
    greeting = {"role": "assistant", "content": "Welcome"}
    mended = [{"messages": [greeting, *row["messages"]]} for row in chats(1, start=50)]
    a = source(write_rows(tmp_path / "a.jsonl", [*chats(3), *mended, dialogue(exchanges=6, words=20)]))
    mix = prepared(a, max_length=300, split=NONE_HELD_OUT)
    fates = {str(row.index): row.fate for row in pick_rows(mix, template, rows=9)}
    assert fates == {"1": "kept", "2": "kept", "3": "kept", "4": "trimmed", "5": "split"}
    terminal = to_terminal(mix, template).plain
    for fate in ("kept", "trimmed", "split"):
        assert re.search(rf"train · a row \d · {fate} · \d+ context tokens, \d+ trained\n", terminal)


def test_the_terminal_shows_the_ledger_a_legend_and_rows_in_colour(mixed: Prepared, template: Template) -> None:
    out = io.StringIO()
    text = to_terminal(mixed, template, rows=2)
    Console(file=out, force_terminal=True, color_system="256", width=200).print(text)
    page = out.getvalue()
    assert page.startswith("55 rows: 41 kept, 12 truncated, 2 dropped")
    assert "cut off: longer than allowed" in page
    assert "\x1b[32m" in page
    assert "dropped · a row 54 · no answer: the last message is from the user" in page
    assert re.search(r"train · a row \d+ · truncated · \d+ context tokens, \d+ trained, \d+ cut off", page)


def test_control_characters_in_rows_reach_neither_terminal_nor_page(mixed: Prepared, template: Template) -> None:
    terminal, page = to_terminal(mixed, template, rows=60).plain, to_html(mixed, template, rows=60)
    for text in (terminal, page):
        assert "⟨U+001B⟩" in text
        assert "⟨U+202E⟩" in text
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", text)


class Checker(HTMLParser):
    """Collects the tags of a page and holds that each is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_fetches_nothing_and_escapes_values(mixed: Prepared, template: Template) -> None:
    page = to_html(mixed, template, rows=60)
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    names = {tag for tag, _ in checker.tags}
    assert not names & {"script", "b", "i", "u", "img", "link", "a"}
    assert not any({"src", "href", "style", "onclick"} & attributes.keys() for _, attributes in checker.tags)
    assert "http" not in page
    assert "prefers-color-scheme: dark" in page
    classes = {name for _, attributes in checker.tags for name in (attributes.get("class") or "").split()}
    assert {"trained", "context", "cut", "special", "dropped"} <= classes
    # Here a token is one character, alone in its span.
    assert "&lt;</span>" in page
    assert "&amp;</span>" in page
    assert "<</span>" not in page
    assert "&</span>" not in page
    assert "&lt;i&gt;unanswered&lt;/i&gt;" in page
    assert "messages.0.role is &#x27;&lt;u&gt;&#x27;" in page
    assert sum(tag == "pre" for tag, _ in checker.tags) == 53 + 2


def test_rows_of_every_fate_are_shown_with_their_reason(prepared: Prepare, template: Template, tmp_path: Path) -> None:
    prose = " ".join(f"word{i}" for i in range(30))
    rows = [*chats(40), *chats(3), chat(prose, "Yes"), chat(f"{prose}!", "Yes."), chat("long " * 200, "x")]
    mix = prepared(
        source(write_rows(tmp_path / "a.jsonl", [*rows, {"messages": []}])),
        source(write_rows(tmp_path / "b.jsonl", chats(9, start=70)), rows=4, repeat=3),
        max_length=300,
        overlong="truncate",
        duplicates="near",
    )
    terminal, page = to_terminal(mix, template, rows=1).plain, to_html(mix, template, rows=1)
    for title in (
        "dropped · a row 47 · messages is an empty list",
        "fully masked · a row 46 · fully masked: none of the first 300 tokens is trained",
        "duplicate · a row 41",
        "near duplicate · a row 45",
        "not sampled · b row ",
    ):
        assert f"\n{title}" in terminal
        assert f"<h3>{title}" in page
    assert terminal.count("not sampled · b row") == 1
    assert "\n    not sampled: 5 × beyond the cap of 4 rows (rows " in terminal
    assert "<p>Why rows were left out:</p>" in page
    for text in (terminal, page):
        assert re.search(r"not sampled · b row \d · beyond the cap of 4 rows", text)
        assert "format: messages" in text
        assert "lost: 2 of 43 rows asked for (4.65%)" in text
    # A repeated row is shown once.
    titles = [row.title for row in pick_rows(mix, template, rows=50)]
    assert len(titles) == len(set(titles)) == 45


def test_the_parts_of_a_mixture_are_shown(prepared: Prepare, template: Template, tmp_path: Path) -> None:
    a, b = (source(write_rows(tmp_path / f"{n}.jsonl", chats(40, start=s)), weight=w) for n, s, w in MIXED)
    mix = prepared(a, b, split={"validation": 0, "test": 0})
    terminal, page = to_terminal(mix, template).plain, to_html(mix, template)
    for text in (terminal, page):
        assert "75.5% of the training examples (40)" in text
        assert "24.5% of the training examples (13)" in text
        assert "27 × beyond the weight 1 of 4, which takes 13 of 40 training rows (rows " in text
        assert re.search(r"not sampled · b row \d+ · beyond the weight 1 of 4", text)


MIXED = (("a", 0, 3), ("b", 100, 1))


def test_answers_that_lost_their_end_are_counted(mixed: Prepared, template: Template) -> None:
    assert "12 answers lost the end token" in to_terminal(mixed, template).plain
    assert "12 answers lost the end token" in to_html(mixed, template)


def test_the_page_says_when_a_side_has_no_rows(prepared: Prepare, template: Template, tmp_path: Path) -> None:
    from corral.recipe import Split

    only = prepared(source(write_rows(tmp_path / "a.jsonl", chats(5))), split=Split(validation=0, test=0))
    assert to_html(only, template).count("<p>no rows</p>") == 2
    assert "dropped ·" not in to_terminal(only, template).plain


def test_the_page_counts_each_source_by_fate_and_side_and_all_together(
    prepared: Prepare, template: Template, tmp_path: Path
) -> None:
    rows = [*chats(20), *chats(3), {"messages": []}]
    mix = prepared(
        source(write_rows(tmp_path / "a.jsonl", rows)),
        source(write_rows(tmp_path / "b.jsonl", chats(12, start=70)), rows=10),
        split={"validation": 4, "test": 2},
    )
    page = to_html(mix, template)
    cell = re.compile(r"<t[dh][^>]*>([^<]*)</t[dh]>")
    (table,) = re.findall('<table class="ledger">(.*?)</table>', page)
    heads, a, b, total = [cell.findall(row) for row in table.split("</tr>")[:-1]]
    assert heads == ["source", "rows", "kept", "dropped", "duplicate", "not sampled", "train", "validation", "test"]
    assert [a[:6], b[:6]] == [["a", "24", "20", "1", "3", "0"], ["b", "12", "10", "0", "0", "2"]]
    assert total == ["all", "36", "30", "1", "3", "2", "24", "4", "2"]
    # One source needs no sum of itself.
    alone = to_html(prepared(source(tmp_path / "a.jsonl")), template)
    assert "<th>a</th>" in alone
    assert "<th>all</th>" not in alone
