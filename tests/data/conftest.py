"""A template on the tiny tokenizer, and functions that write rows and prepare them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from corral.data.prepare import Prepared, prepare
from corral.data.selection import SourcePlan
from corral.data.source_rows import load_source_rows
from corral.data.word_hashes import Words, record_words
from corral.messages import Text
from corral.progress import Progress
from corral.recipe import Data, Source, Split
from corral.template import Template

# What a first call imports would count against one example; how fast a machine is does not make a test fail.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def chats(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [chat(f"What is {i} plus {i}?", f"It is {2 * i}." + " Yes." * (i % 5)) for i in range(start, start + count)]


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def prose_words(seed: int, length: int = 60) -> list[str]:
    """Words of a vocabulary of 400, in an order that the seed decides."""
    return random.Random(seed).choices([f"w{i}" for i in range(400)], k=length)


def prose(seed: int, length: int = 40) -> str:
    return " ".join(prose_words(seed, length))


def word_hashes(text: str) -> Words:
    return np.array(record_words(Text(text))[0], np.uint32)


def source(path: Path, **settings: Any) -> Source:
    return Source(path=str(path), **{"name": path.stem} | settings)


@pytest.fixture(scope="session")
def template(tiny_tokenizer: Any) -> Template:
    return Template.load(tiny_tokenizer, "chatml")


@pytest.fixture
def prepared(template: Template, tmp_path: Path) -> Callable[..., Prepared]:
    """`prepared(source, …, split=…, seed=…, into=…)`: prepare the sources in a new folder."""
    made = 0

    def make(
        *sources: Source,
        split: Split | None = None,
        seed: int = 0,
        into: Path | None = None,
        cache: Path | None = None,
        workers: int | None = None,
        **settings: Any,
    ) -> Prepared:
        nonlocal made
        made += 1
        folder = into or tmp_path / f"prepare-{made}"
        folder.mkdir(exist_ok=True)
        split = split or Split(validation=0.2, test=0.2)
        data = Data(sources=sources, split=split, **settings)
        return prepare(data, template, folder, seed, cache=cache or tmp_path / "cache", workers=workers)

    return make


@pytest.fixture
def planned(template: Template, tmp_path: Path) -> Callable[..., list[SourcePlan]]:
    """`planned(source, …, max_length=…)`: the sources are read, and every fate is open."""

    def make(*sources: Source, max_length: int = 1024) -> list[SourcePlan]:
        cache = tmp_path / "cache"
        return [
            SourcePlan.from_source(s, load_source_rows(s, cache, Progress()), template, max_length, cache)
            for s in sources
        ]

    return make
