"""Shows prepared rows in colour, in the terminal and as a page: which tokens are trained on, which are context, which were
cut off. The ledger, the row lengths and some rows that were left out are shown with them.

The tokens are those that the stored arrays hold. Only what was cut off a truncated row is encoded again.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from corral.data import length_histogram
from corral.data.example_store import Example, ExampleStore
from corral.data.ledger import FATES, LEDGER_FILE, USED_FATES, Fate, format_reason, format_summary, source_notes
from corral.data.mixture import SIDES, Side
from corral.data.prepare import Prepared, encode_record
from corral.template import Encoded, Template

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.text import Text

TokenKind: TypeAlias = Literal["trained", "context", "cut"]

_MEANING: dict[TokenKind, str] = {
    "trained": "trained on",
    "context": "context only",
    "cut": "cut off: longer than allowed",
}
# Neighbouring tokens alternate between the two, so that their borders are visible.
_STYLES: dict[TokenKind, tuple[str, str]] = {
    "trained": ("green", "bright_green"),
    "context": ("grey50", "grey66"),
    "cut": ("red strike", "bright_red strike"),
}
_EXCERPT = 300  # characters of a dropped row in the terminal
# They change the direction of the text around them, and so could disguise a row.
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@dataclass(frozen=True, slots=True)
class Piece:
    """The fewest tokens that make whole characters: one, except where a character spans several.

    Args:
        text: what they decode to; for a special token its name.
        kind: trained, context, or `cut` if any of them is cut off.
        special: whether it is a special token.
        tokens: how many tokens it is.
    """

    text: str
    kind: TokenKind
    special: bool
    tokens: int


@dataclass(frozen=True, slots=True)
class PreviewRow:
    """One row to show: its source, its fate, token counts by kind, and the pieces of each sequence."""

    side: Side
    fate: Fate
    source: str
    index: int | str
    tokens: Mapping[TokenKind, int]
    sequences: tuple[tuple[Piece, ...], ...]

    @property
    def title(self) -> str:
        """`recipes row 12 · kept · 37 context tokens, 120 trained`."""
        cut = f", {self.tokens['cut']} cut off" if self.tokens["cut"] else ""
        counts = f"{self.tokens['context']} context tokens, {self.tokens['trained']} trained{cut}"
        return f"{_visible(self.source)} row {self.index} · {self.fate} · {counts}"


def pick_rows(prepared: Prepared, template: Template, rows: int) -> list[PreviewRow]:
    """The first `rows` examples of each side and fate, in the side's order."""
    special = frozenset({*template.special_ids, *template.tokenizer.all_special_ids})
    picked: list[PreviewRow] = []
    for side in SIDES:
        examples = prepared.side(side)
        for fate in USED_FATES:
            indices = (examples.fates == FATES.index(fate)).nonzero()[0]
            distinct = islice(_distinct_examples(examples, indices), rows)
            picked += [_preview_row(example, side, fate, template, special) for example in distinct]
    return picked


def _distinct_examples(examples: ExampleStore, indices: NDArray[np.int64]) -> Iterator[Example]:
    """The examples at these indices, each repeated one once."""
    seen: set[str] = set()
    for index in indices:
        example = examples[int(index)]
        if example.key not in seen:
            seen.add(example.key)
            yield example


def _preview_row(example: Example, side: Side, fate: Fate, template: Template, special: frozenset[int]) -> PreviewRow:
    whole = encode_record(example.record, template) if fate == "truncated" else example.sequences
    # The stored ids come first: they are shown as they are even if the template has changed since.
    joined = [
        Encoded(kept.ids + full.ids[len(kept.ids) :], kept.trained + full.trained[len(kept.ids) :])
        for kept, full in zip(example.sequences, whole, strict=True)
    ]
    kept_tokens = sum(len(s.ids) for s in example.sequences)
    trained = sum(sum(s.trained) for s in example.sequences)
    tokens: dict[TokenKind, int] = {
        "trained": trained,
        "context": kept_tokens - trained,
        "cut": sum(len(s.ids) for s in joined) - kept_tokens,
    }
    sequences = tuple(
        tuple(split_pieces(full, len(kept.ids), template, special))
        for kept, full in zip(example.sequences, joined, strict=True)
    )
    return PreviewRow(side, fate, example.source, example.index, tokens, sequences)


def split_pieces(encoded: Encoded, kept: int, template: Template, special: frozenset[int]) -> Iterator[Piece]:
    """The tokens of a sequence as text, in order; those from index `kept` on are cut off.

    The pieces that are not special tokens, joined, are the text, also where characters span tokens.
    """

    def text_piece(text: str) -> Piece:
        return Piece(text, "cut" if "cut" in pending else pending[0], False, len(pending))

    decoder = template.stream_decoder()
    pending: list[TokenKind] = []
    for index, (token, is_trained) in enumerate(zip(encoded.ids, encoded.trained, strict=True)):
        kind: TokenKind = "cut" if index >= kept else "trained" if is_trained else "context"
        if token in special:
            if pending:
                yield text_piece(decoder.finish())
            yield Piece(str(template.tokenizer.convert_ids_to_tokens(token)), kind, True, 1)
            decoder, pending = template.stream_decoder(), []
            continue
        pending.append(kind)
        if text := decoder.push([token]):
            yield text_piece(text)
            pending = []
    if pending:
        yield text_piece(decoder.finish())


def _visible(text: str) -> str:
    """Text with invisible and control characters written out; line breaks are marked and kept."""
    return "".join("↵\n" if c == "\n" else f"⟨U+{ord(c):04X}⟩" if _hidden(c) else c for c in text)


def _hidden(character: str) -> bool:
    return character in _BIDI or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


def _left_out(prepared: Prepared, rows: int) -> Iterator[tuple[str, str]]:
    """(title, text) of the first `rows` rows of each fate, source and reason that are on no side."""

    def group_key(row: Mapping[str, Any]) -> tuple[int, str, str]:
        return FATES.index(row["fate"]), row["source"], row["reason"] or ""

    ordered = sorted(prepared.left_out, key=group_key)
    for _, group in groupby(ordered, key=group_key):
        for row in islice(group, rows):
            reason = f" · {row['reason']}" if row["reason"] else ""
            yield _visible(f"{row['fate']} · {row['source']} row {row['index']}{reason}"), row["text"]


def to_terminal(prepared: Prepared, template: Template, rows: int = 2) -> Text:
    """The ledger, then up to `rows` rows of each side and fate, for `rich` to print."""
    from rich.text import Text

    page = Text(
        "\n".join([format_summary(prepared.ledger), "", *length_histogram.to_lines(_histogram(prepared)), "", ""])
    )
    for kind, meaning in _MEANING.items():
        page.append("■ ", _STYLES[kind][0].removesuffix(" strike"))
        page.append(meaning, _STYLES[kind][0])
        page.append("  ")
    page.append(" special token \n", "reverse")
    for row in pick_rows(prepared, template, rows):
        page.append(f"\n{row.side} · {row.title}\n", "bold")
        for sequence in row.sequences:
            for number, piece in enumerate(sequence):
                style = _STYLES[piece.kind][number % 2]
                page.append(_visible(piece.text), f"{style} reverse" if piece.special else style)
            if not page.plain.endswith("\n"):
                page.append("\n")
    for title, text in _left_out(prepared, rows):
        page.append(f"\n{title}\n", "bold")
        excerpt = text if len(text) <= _EXCERPT else f"{text[:_EXCERPT]} …"
        page.append(_visible(excerpt) + "\n", "grey50")
    return page


def _histogram(prepared: Prepared) -> list[length_histogram.Bin]:
    return length_histogram.read_histogram(prepared.folder / LEDGER_FILE)


def to_html(prepared: Prepared, template: Template, rows: int = 2) -> str:
    """The same as one self-contained page, without scripts or requests, light or dark as the reader's system is."""
    preview_rows = pick_rows(prepared, template, rows)
    parts = [_HEAD, "<h1>What is trained on</h1>", _ledger_table(prepared.ledger), *_source_sections(prepared.ledger)]
    parts += ["<h2>lengths</h2>", f'<div class="lengths">{length_histogram.to_html(_histogram(prepared))}</div>']
    legend = " ".join(f'<span class="{kind}">{html.escape(meaning)}</span>' for kind, meaning in _MEANING.items())
    parts.append(f'<p class="legend">{legend} <span class="context special">special token</span>')
    parts.append("Thin lines divide tokens.</p>")
    for side in SIDES:
        on_side = [row for row in preview_rows if row.side == side]
        parts.append(f"<h2>{side}</h2>" if on_side else f"<h2>{side}</h2><p>no rows</p>")
        for row in on_side:
            parts.append(f"<h3>{html.escape(row.title)}</h3>")
            parts += [f'<pre class="tokens">{"".join(map(_piece_html, sequence))}</pre>' for sequence in row.sequences]
    if left_out := list(_left_out(prepared, rows)):
        parts.append("<h2>left out</h2>")
    for title, text in left_out:
        parts.append(f"<h3>{html.escape(title)}</h3>")
        parts.append(f'<pre class="dropped">{html.escape(_visible(text))}</pre>')
    return "\n".join([*parts, "</body>", "</html>", ""])


def _piece_html(piece: Piece) -> str:
    classes = f"{piece.kind} special" if piece.special else piece.kind
    several = f' title="{piece.tokens} tokens"' if piece.tokens > 1 else ""
    return f'<span class="{classes}"{several}>{html.escape(_visible(piece.text))}</span>'


def _ledger_table(ledger: Mapping[str, Any]) -> str:
    fates = [fate for fate in FATES if ledger["fates"][fate]]
    heads = "".join(f"<th>{name}</th>" for name in ("source", "rows", *fates))
    heads += "".join(f'<th class="side">{side}</th>' for side in SIDES)
    body = [
        _ledger_row(label, [s["rows"], *(s["fates"][f] for f in fates)], [s["sides"][side] for side in SIDES])
        for label, s in ledger["sources"].items()
    ]
    if len(body) > 1:
        on_sides = [sum(s["sides"][side] for s in ledger["sources"].values()) for side in SIDES]
        body.append(_ledger_row("all", [ledger["rows"], *(ledger["fates"][f] for f in fates)], on_sides))
    return f'<div class="wide"><table class="ledger"><tr>{heads}</tr>{"".join(body)}</table></div>'


def _ledger_row(label: str, figures: Sequence[int], on_sides: Sequence[int]) -> str:
    cells = [*((figure, "count") for figure in figures), *((figure, "side") for figure in on_sides)]
    written = "".join(f'<td class="{kind if figure else kind + " none"}">{figure:,}</td>' for figure, kind in cells)
    return f"<tr><th>{html.escape(_visible(label))}</th>{written}</tr>"


def _source_sections(ledger: Mapping[str, Any]) -> Iterator[str]:
    """Notes on each source, and why its rows were left out."""
    for label, source in ledger["sources"].items():
        yield f"<h3>{html.escape(_visible(label))}</h3>"
        yield _list_html(source_notes(source))
        if source["reasons"]:
            yield "<p>Why rows were left out:</p>"
            yield _list_html([format_reason(reason, entry) for reason, entry in source["reasons"].items()])


def _list_html(lines: Sequence[str]) -> str:
    items = "".join(f"<li>{html.escape(_visible(line))}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>corral inspect</title>
<style>
:root { color-scheme: light dark; --text: #1d2127; --page: #fff; --faint: #6a7280; --line: #d9dde3; --box: #f6f7f9;
  --trained: #0b6b2f; --trained-on: #d9f5e1; --cut: #b3201c; --cut-on: #fde4e2; --cut-line: #d98a86; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7ec; --page: #15181d; --faint: #98a1ae; --line: #333a44;
  --box: #1c2027; --trained: #7fe3a0; --trained-on: #12381f; --cut: #ff9a94; --cut-on: #471a18;
  --cut-line: #a8524c; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; overflow-wrap: anywhere; } ul { margin: .3rem 0; } p { margin: .6rem 0; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; font-weight: normal; }
th:first-child { text-align: left; } tr:first-child th { color: var(--faint); }
.ledger { width: 100%; } .ledger td, .ledger th { padding: .25rem .4rem; }
.ledger tr:first-child th { font-size: .8rem; line-height: 1.2; vertical-align: bottom; }
.ledger th:first-child { min-width: 9rem; overflow-wrap: anywhere; } .ledger .none { color: var(--faint); }
.ledger .side { background: var(--box); }
.lengths th { white-space: nowrap; }
.lengths tr:first-child th:nth-child(2) { color: var(--trained); }
.lengths tr:first-child th:nth-child(3) { color: var(--cut); }
pre { font: 13px/1.75 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; background: var(--box);
  border: 1px solid var(--line); border-radius: 6px; padding: .7rem .9rem; margin: 0; }
.tokens span, .legend span { box-shadow: inset 1px 0 var(--line); border-radius: 2px; }
.legend { position: sticky; top: 0; background: var(--page); padding: .5rem 0; font-size: .9rem; line-height: 2; }
.legend span { padding: .15rem .5rem; margin-right: .3rem; white-space: nowrap; }
.context { color: var(--faint); }
.trained { color: var(--trained); background: var(--trained-on); }
.cut { color: var(--cut); background: var(--cut-on); text-decoration: line-through 1px var(--cut-line); }
.bar { width: 16rem; height: .8rem; display: block; } .bar .trained { fill: var(--trained); }
.bar .cut { fill: var(--cut); } .bar .out { fill: var(--faint); }
.special { font-weight: 600; outline: 1px solid currentColor; outline-offset: -1px; padding: 0 2px 1px; }
</style>
</head>
<body>"""
