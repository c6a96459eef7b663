"""Documents of every kind are read with their headings, tables and places; what cannot be read is refused clearly."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import docx
import pypdf
import pytest
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

from corral.errors import DataError
from corral.retrieval.collection import RefusedDocument, find_document_files, read_documents
from corral.retrieval.documents import Block, Document
from corral.retrieval.readers import word

HTML = """<html><head><title>Leave &amp; pay</title><style>p{}</style></head><body>
<nav>Home</nav><div class="toc">Contents</div><h1>Leave &amp; pay</h1><p>All of us<br>may rest.
<h2>Days<a class="headerlink">¶</a></h2><ul><li>Full time: <b>30</b><ul><li>of them 10 fixed</li></ul></li>
<li>Part time: 15</li></ul>
<table><tr><th>Kind</th><th>Days</th></tr><tr><td>Sick | ill</td><td>10</td></tr></table>
<h2>FAQ</h2><dl><dt>May I carry days over?</dt><dd>Yes, five.</dd></dl><p>Ask us.</p>
<pre>if tired:
    rest()</pre><script>evil()</script></body></html>"""
MARKDOWN = """---
title: "Travel"
---
# Trips

Book **early**, see [the list](https://a.example).

## Costs

1. Train
   - second class
2. Bus

| Kind | Limit |
|------|-------|
| Hotel | 90 |

```
cost = 90
```
"""


def make_pdf(pages: list[str], *, outline: dict[str, int] | None = None, password: str | None = None) -> bytes:
    writer = pypdf.PdfWriter()
    font = DictionaryObject()
    font.update({NameObject("/Type"): NameObject("/Font"), NameObject("/Subtype"): NameObject("/Type1")})
    font[NameObject("/BaseFont")] = NameObject("/Helvetica")
    for text in pages:
        page = writer.add_blank_page(400, 400)
        fonts = DictionaryObject({NameObject("/F1"): font})
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
        stream = DecodedStreamObject()
        lines = "".join(f"({line}) Tj T* " for line in text.split("\n"))
        stream.set_data(f"BT /F1 12 Tf 14 TL 20 350 Td {lines}ET".encode())
        page[NameObject("/Contents")] = writer._add_object(stream)  # pyright: ignore[reportPrivateUsage]
    for title, number in (outline or {}).items():
        writer.add_outline_item(title, number)
    writer.add_metadata({"/Title": "Rules"})
    if password:
        writer.encrypt(password)
    writer.write(buffer := io.BytesIO())
    return buffer.getvalue()


def make_scan() -> bytes:
    writer = pypdf.PdfWriter()
    page = writer.add_blank_page(100, 100)
    image = DecodedStreamObject()
    image.set_data(b"\0")
    image.update({NameObject("/Type"): NameObject("/XObject"), NameObject("/Subtype"): NameObject("/Image")})
    objects = DictionaryObject({NameObject("/I"): writer._add_object(image)})  # pyright: ignore[reportPrivateUsage]
    page[NameObject("/Resources")] = DictionaryObject({NameObject("/XObject"): objects})
    writer.write(buffer := io.BytesIO())
    return buffer.getvalue()


def make_docx() -> bytes:
    document = docx.Document()
    document.add_paragraph("Handbook", style="Title")
    document.add_heading("Work", 1)
    document.add_paragraph("Start at nine.")
    document.add_paragraph("Bring tea", style="List Bullet")
    document.add_paragraph("Bring cake", style="List Bullet")
    document.add_heading("Pay", 2)
    table = document.add_table(2, 2)
    for cell, text in zip((c for row in table.rows for c in row.cells), ["Who", "How much", "All", "100"], strict=True):
        cell.text = text
    document.save(buffer := io.BytesIO())
    return buffer.getvalue()


def read(path: Path, content: bytes | str) -> Document:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (document,) = read_documents(find_document_files([str(path)]))
    assert isinstance(document, Document), document
    for block in document.blocks:
        assert document.text[block.start :][: len(block.text)] == block.text
    assert document.text == "\n\n".join(block.text for block in document.blocks)
    return document


def outline(document: Document) -> list[tuple[tuple[str, ...], str, str, int | None]]:
    return [(block.headings, block.kind, block.text, block.page) for block in document.blocks]


def test_html_gives_headings_lists_tables_and_code_without_navigation(tmp_path: Path) -> None:
    document = read(tmp_path / "a.html", HTML)
    assert document.title == "Leave & pay"
    assert outline(document) == [
        ((), "text", "All of us\nmay rest.", None),
        (("Days",), "text", "- Full time: 30\n  - of them 10 fixed\n- Part time: 15", None),
        (("Days",), "table", "| Kind | Days |\n| --- | --- |\n| Sick \\| ill | 10 |", None),
        (("FAQ", "May I carry days over?"), "text", "Yes, five.", None),
        (("FAQ",), "text", "Ask us.", None),
        (("FAQ",), "code", "if tired:\n    rest()", None),
    ]


def test_only_the_main_part_of_a_page_is_read(tmp_path: Path) -> None:
    page = "<title>T</title><div>menu</div><main><h1>Real</h1><p>text</main><div>end</div>"
    assert outline(read(tmp_path / "a.html", page)) == [(("Real",), "text", "text", None)]


def test_markdown_gives_plain_text_under_its_headings(tmp_path: Path) -> None:
    document = read(tmp_path / "a.md", MARKDOWN)
    assert document.title == "Travel"
    assert outline(document) == [
        (("Trips",), "text", "Book early, see the list.", None),
        (("Trips", "Costs"), "text", "1. Train\n  - second class\n2. Bus", None),
        (("Trips", "Costs"), "table", "| Kind | Limit |\n| --- | --- |\n| Hotel | 90 |", None),
        (("Trips", "Costs"), "code", "cost = 90", None),
    ]


def test_a_first_heading_of_level_one_is_the_title(tmp_path: Path) -> None:
    document = read(tmp_path / "a.md", "# Trips\n\nBook.\n\n## Costs\n\nFew.\n")
    assert document.title == "Trips"
    assert [block.headings for block in document.blocks] == [(), ("Costs",)]


def test_text_is_split_at_blank_lines(tmp_path: Path) -> None:
    document = read(tmp_path / "a.txt", "One\r\nline. \r\n\r\n \r\nTwo.\r\n")
    assert document.title == "a.txt"
    assert document.blocks == (Block("One\nline.", (), 0), Block("Two.", (), 11))


def test_a_pdf_gives_pages_and_the_headings_of_its_outline(tmp_path: Path) -> None:
    pdf = make_pdf(["Before\nFirst part\nHello there.", "Second page."], outline={"First part": 0, "Last": 1})
    document = read(tmp_path / "a.pdf", pdf)
    assert document.title == "Rules"
    assert outline(document) == [
        ((), "text", "Before", 1),
        (("First part",), "text", "Hello there.", 1),
        (("Last",), "text", "Second page.", 2),
    ]


def test_word_files_give_headings_lists_and_tables(tmp_path: Path) -> None:
    document = read(tmp_path / "a.docx", make_docx())
    assert document.title == "Handbook"
    assert outline(document) == [
        (("Work",), "text", "Start at nine.", None),
        (("Work",), "text", "- Bring tea\n- Bring cake", None),
        (("Work", "Pay"), "table", "| Who | How much |\n| --- | --- |\n| All | 100 |", None),
    ]


def test_each_row_of_a_jsonl_file_is_a_document_and_a_bad_row_is_refused_alone(tmp_path: Path) -> None:
    rows = [{"body": "A.\n\nB.", "title": "T"}, {"text": 3}, {"body": "C."}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{broken\n")
    first, second, third, fourth = read_documents(find_document_files([str(tmp_path)]), columns=["body"])
    assert isinstance(first, Document)
    assert (first.name, first.title, first.text) == ("a.jsonl#1", "T", "A.\n\nB.")
    assert isinstance(second, RefusedDocument)
    assert "no text in the column 'body'" in second.error.what
    assert isinstance(third, Document)
    assert isinstance(fourth, RefusedDocument)


def zip_bomb() -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as package:
        package.writestr("word/document.xml", b" " * 3_000_000)
    return buffer.getvalue()


REFUSED: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "encrypted": ("a.pdf", lambda: make_pdf(["x"], password="secret"), "is encrypted"),
    "scanned": ("a.pdf", make_scan, "its pages are images"),
    "broken PDF": ("a.pdf", lambda: b"%PDF-1.7\n" + bytes(99), "the PDF cannot be read"),
    "PDF named .txt": ("a.txt", lambda: make_pdf(["x"]), "a PDF, not text"),
    "binary named .txt": ("a.txt", lambda: bytes(range(256)) * 9, "not"),
    "Windows-1252": ("a.md", lambda: "Grüße".encode("cp1252"), "line 1: not UTF-8 text"),
    "unknown encoding": ("a.html", lambda: b'<meta charset="klingon"><p>x', "'klingon'"),
    "no Word file": ("a.docx", lambda: b"hello", "no Word file"),
    "old Word": ("a.docx", lambda: b"\xd0\xcf\x11\xe0" + bytes(600), "encrypted, or of Word before 2007"),
    "zip bomb": ("a.docx", zip_bomb, "3,000,000 of them in one part"),
    "nested HTML": ("a.html", lambda: b"<div>" * 6_000 + b"x", "more than 5,000 tags within each other"),
    "nested Markdown": ("a.md", lambda: b"> " * 500 + b"x", "nests deeper than 60 levels"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_cannot_be_read_is_refused_and_the_next_is_read(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(word, "MAX_PART", 2_000_000)
    name, make, message = REFUSED[case]
    (tmp_path / name).write_bytes(make())
    (tmp_path / "b.txt").write_text("Good.")
    refused, good = read_documents(find_document_files([str(tmp_path)]))
    assert isinstance(refused, RefusedDocument)
    assert message in refused.error.what
    assert refused.error.where == str(tmp_path / name)
    assert refused.error.hint
    assert isinstance(good, Document)


def test_hostile_nesting_of_html_is_read_without_recursion(tmp_path: Path) -> None:
    document = read(tmp_path / "a.html", "<div>" * 1_200 + "<table><tr><td>" * 100 + "<p>deep")
    assert document.text == "| deep |\n| --- |"


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.html"])
def test_a_document_without_text_has_no_blocks(name: str, tmp_path: Path) -> None:
    assert read(tmp_path / name, " \n").blocks == ()


def test_files_are_found_sorted_once_and_others_are_reported(tmp_path: Path) -> None:
    for name in ("b.txt", "a/c.md", ".hidden/x.txt", "logo.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    files = find_document_files([str(tmp_path), str(tmp_path / "b.txt")])
    assert [file.name for file in files] == ["a/c.md", "b.txt"]
    with pytest.raises(DataError, match=r"'\.png' is no kind of document"):
        find_document_files([str(tmp_path / "logo.png")])
    with pytest.raises(DataError, match=r"there is no file or folder 'b\.text'") as caught:
        find_document_files([str(tmp_path / "b.text")])
    assert "did you mean 'b.txt'?" in (caught.value.hint or "")


def test_two_files_of_one_name_are_named_by_their_paths(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text(folder)
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert [file.name for file in find_document_files(folders)] == [f"{folder}/x.txt" for folder in folders]
