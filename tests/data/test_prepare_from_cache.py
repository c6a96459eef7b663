"""What was done once is not done again, and nothing of that shows in the result."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from corral.data import row_store
from corral.data.prepare import Prepared, prepare
from corral.errors import DataError
from corral.progress import Progress
from corral.recipe import Data, Split
from corral.storage import tree_hashes
from corral.template import Template
from tests.data.conftest import Listener, chat, chats, source, start_script, write_rows

Prepare = Callable[..., Prepared]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_store, "CHUNK_ROWS", 10)


def kinds(cache: Path) -> dict[str, int]:
    """How many folders of each kind a cache holds."""
    names = [path.name.partition("-")[0] for path in cache.iterdir() if path.is_dir()]
    return {name: names.count(name) for name in sorted(set(names))}


def files(cache: Path) -> set[str]:
    return {path.relative_to(cache).as_posix() for path in cache.rglob("tokens-*/*.arrow")}


def mixed_sources(tmp_path: Path) -> tuple[Any, Any]:
    rows = [*chats(70), {"messages": []}, chat("Long?", "yes " * 90), *chats(5), chat("What is 3 plus 3?!", "It is 6.")]
    return (
        source(write_rows(tmp_path / "a.jsonl", rows), rows=60),
        source(write_rows(tmp_path / "b.jsonl", chats(40, start=50)), repeat=2),
    )


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("duplicates", ["exact", "near", "keep"])
def test_any_number_of_workers_gives_the_same_bytes(prepared: Prepare, tmp_path: Path, duplicates: str) -> None:
    sources = mixed_sources(tmp_path)
    hashes = []
    for workers in (1, 2, 3):
        into, cache = tmp_path / f"out-{workers}", tmp_path / f"cache-{workers}"
        settings = {"duplicates": duplicates, "overlong": "truncate", "max_length": 90}
        prepared(*sources, into=into, cache=cache, workers=workers, **settings)
        hashes.append(tree_hashes(into))
    assert hashes[0] == hashes[1] == hashes[2]


@pytest.mark.usefixtures("small_chunks")
def test_the_result_does_not_depend_on_the_state_of_the_cache(prepared: Prepare, tmp_path: Path) -> None:
    a, b = mixed_sources(tmp_path)
    for cap in (20, 45, 7):
        prepared(a.model_copy(update={"rows": cap}), b, seed=cap)
    prepared(a, b, into=tmp_path / "after")
    prepared(a, b, into=tmp_path / "fresh", cache=tmp_path / "empty")
    assert tree_hashes(tmp_path / "after") == tree_hashes(tmp_path / "fresh")


@pytest.mark.usefixtures("small_chunks")
def test_another_cap_encodes_only_rows_that_were_not_encoded_and_another_split_none(
    prepared: Prepare, tmp_path: Path
) -> None:
    path, cache = write_rows(tmp_path / "a.jsonl", chats(100)), tmp_path / "cache"

    def encoded(cap: int | None, split: Split, seed: int = 0) -> int | None:
        listener = Listener()
        prepared(source(path, rows=cap), split=split, seed=seed, cache=cache, progress=listener)
        return dict(listener.starts).get("Encoding rows")

    usual = Split(validation=0.2, test=0.2)
    assert encoded(40, usual) == 40
    assert encoded(70, usual) == 30
    assert encoded(25, usual) is None
    assert encoded(70, Split(validation=5, test=0.1)) is None
    assert encoded(None, usual, seed=9) == 30
    assert kinds(cache) == {"rows": 1, "tokens": 1, "words": 1}


def test_another_template_or_length_makes_new_tokens_only(
    prepared: Prepare, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "a.jsonl", chats(40))
    cache = tmp_path / "cache"
    prepared(source(path), cache=cache)
    before = files(cache)
    prepared(source(path), cache=cache, max_length=500)
    assert kinds(cache) == {"rows": 1, "tokens": 2, "words": 1}
    source_text = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
    source_text += "{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
    prepared(source(path), cache=cache, template=Template(tiny_tokenizer, source_text, "plain"))
    assert kinds(cache) == {"rows": 1, "tokens": 3, "words": 1}
    led = Template.load(tiny_tokenizer, "chatml", system="Be kind.")
    prepared(source(path), cache=cache, template=led, system="Be kind.")
    assert kinds(cache) == {"rows": 1, "tokens": 4, "words": 1}
    prepared(source(path), cache=cache, template=led, system_override="Be kind.")
    assert kinds(cache) == {"rows": 2, "tokens": 5, "words": 2}
    assert before < files(cache)


def test_other_content_or_format_is_read_again_and_another_name_or_path_is_not(
    prepared: Prepare, tmp_path: Path
) -> None:
    path, cache = write_rows(tmp_path / "a.jsonl", chats(40)), tmp_path / "cache"
    prepared(source(path), cache=cache)
    moved = Path(shutil.copy(path, tmp_path / "moved.jsonl"))
    renamed = prepared(source(moved, name="other"), cache=cache)
    assert kinds(cache)["rows"] == 1
    assert {e.source for e in renamed.train} == {"other"}
    prepared(source(path, format="messages"), cache=cache)
    assert kinds(cache)["rows"] == 2
    write_rows(path, chats(41))
    prepared(source(path), cache=cache)
    assert kinds(cache)["rows"] == 3


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_run_continues_from_its_finished_chunks(
    template: Template, tmp_path: Path, workers: int
) -> None:
    data = Data(sources=(source(write_rows(tmp_path / "a.jsonl", chats(100))),))
    cache, out = tmp_path / "cache", tmp_path / "out"
    out.mkdir()

    class Impatient(Progress):
        title = ""

        def start(self, title: str, total: int | None) -> None:
            self.title = title
            totals[title] = total

        def update(self, done: int, note: str = "") -> None:
            if self.title == "Encoding rows" and done >= 40 and not totals.get("stopped"):
                totals["stopped"] = done
                raise KeyboardInterrupt

    totals: dict[str, int | None] = {}
    with pytest.raises(KeyboardInterrupt):
        prepare(data, template, out, 0, Impatient(), cache=cache, workers=workers)
    assert totals["Encoding rows"] == 100
    assert list(out.iterdir()) == []
    finished = 10 * len(files(cache))
    assert 40 <= finished < 100
    prepare(data, template, out, 0, Impatient(), cache=cache, workers=workers)
    assert totals["Encoding rows"] == 100 - finished
    (tmp_path / "whole").mkdir()
    prepare(data, template, tmp_path / "whole", 0, cache=tmp_path / "other")
    assert tree_hashes(out) == tree_hashes(tmp_path / "whole")


def test_damaged_rows_in_the_cache_are_read_again(prepared: Prepare, tmp_path: Path) -> None:
    a = source(write_rows(tmp_path / "a.jsonl", chats(40)))
    cache = tmp_path / "cache"
    prepared(a, cache=cache, into=tmp_path / "first")
    for name in ("*.arrow", "meta.json"):
        path = next(cache.glob(f"rows-*/{name}"))
        path.write_bytes(path.read_bytes()[:-5])
        prepared(a, cache=cache, into=tmp_path / "again")
        assert tree_hashes(tmp_path / "first") == tree_hashes(tmp_path / "again")


@pytest.mark.parametrize("kind", ["rows", "tokens", "words"])
def test_one_flipped_byte_in_the_cache_is_found_and_that_part_made_again(
    prepared: Prepare, tmp_path: Path, kind: str
) -> None:
    a = source(write_rows(tmp_path / "a.jsonl", chats(60)))
    first = prepared(a)
    (folder,) = (tmp_path / "cache").glob(f"{kind}-*")
    for path in sorted(folder.glob("*.arrow")):
        content = bytearray(path.read_bytes())
        content[len(content) // 3] ^= 1
        path.write_bytes(content)
        listener = Listener()
        again = prepared(a, progress=listener)
        assert any("damaged" in message and "again" in message for message in listener.messages), path.name
        assert tree_hashes(again.folder) == tree_hashes(first.folder), path.name


def test_two_processes_may_prepare_the_same_rows_at_the_same_time(tiny_folder: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", chats(600))
    code = "prepare(Data(sources=(Source(path='a.jsonl'),)), template, Path(sys.argv[2]), 0, cache=Path('cache'))"
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    running = [start_script(code, tiny_folder, tmp_path, name) for name in ("one", "two")]
    for process in running:
        process.communicate()
    assert [process.returncode for process in running] == [0, 0]
    assert tree_hashes(tmp_path / "one") == tree_hashes(tmp_path / "two")
    assert kinds(tmp_path / "cache") == {"rows": 1, "tokens": 1, "words": 1}


def test_a_source_that_cannot_be_read_leaves_nothing_in_the_cache(prepared: Prepare, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n\n")
    with pytest.raises(DataError):
        prepared(source(path), cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("rows-*"))
