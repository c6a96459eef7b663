"""A template on the tiny tokenizer, and functions that write rows and prepare them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from corral.data.example_store import Example, ExampleStore, ExampleWriter
from corral.data.ledger import FATES
from corral.data.prepare import Prepared, prepare
from corral.data.row_store import list_column
from corral.data.selection import SourcePlan
from corral.data.source_rows import load_source_rows
from corral.data.word_hashes import Words, record_words
from corral.messages import Text, record_to_json
from corral.progress import Progress
from corral.recipe import Data, Source, Split
from corral.template import Template

NONE_HELD_OUT = Split(validation=0, test=0)


@dataclass
class Listener(Progress):
    """Records what work reports: the pieces that start, their updates, and messages."""

    starts: list[tuple[str, int | None]] = field(default_factory=list[tuple[str, int | None]])
    updates: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])
    messages: list[str] = field(default_factory=list[str])

    @property
    def titles(self) -> list[str]:
        return [title for title, _ in self.starts]

    def say(self, text: str) -> None:
        self.messages.append(text)

    def start(self, title: str, total: int | None) -> None:
        self.starts.append((title, total))

    def update(self, done: int, note: str = "") -> None:
        self.updates.append((done, note))


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def chats(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [chat(f"What is {i} plus {i}?", f"It is {2 * i}." + " Yes." * (i % 5)) for i in range(start, start + count)]


def dialogue(exchanges: int, words: int, system: str = "") -> dict[str, Any]:
    """A conversation in which each question and each answer has its own number, and so many words."""
    turns = [{"role": "system", "content": system}] if system else []
    for i in range(exchanges):
        turns += chat(f"{i}? " + "so " * words, f"{i}! " + "yes " * words)["messages"]
    return {"messages": turns}


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


def write_examples(
    folder: Path, examples: Iterable[Example], truncated: Container[int] = (), seed: int = 0, repeat: int = 1
) -> ExampleStore:
    """Store examples; `truncated` has the indices of those that are cut."""
    writer = ExampleWriter(folder, seed)
    for example in examples:
        tokens, bounds = [0, *(len(s.ids) for s in example.sequences)], np.array([0, len(example.sequences)])
        ids = np.array([i for s in example.sequences for i in s.ids], np.uint32)
        trained = np.array([t for s in example.sequences for t in s.trained], np.bool_)
        columns = {
            "key": pa.array([example.key]),
            "source": pa.array([example.source]),
            "file": pa.array([None], pa.string()),
            "row": pa.array([example.index]),
            "record": pa.array([json.dumps(record_to_json(example.record)).encode()]),
            "ids": list_column(list_column(ids, np.cumsum(tokens)), bounds),
            "trained": list_column(list_column(trained, np.cumsum(tokens)), bounds),
        }
        fate = "truncated" if example.index in truncated else "kept"
        writer.add(columns, np.array([FATES.index(fate)], np.int8), repeat)
    writer.finish()
    return ExampleStore(folder)


def start_script(code: str, tiny_folder: Path, cwd: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Another Python that runs `code` in `cwd`; it has `template`, `prepare`, Data, Source and Path."""
    setup = (
        "import sys; from pathlib import Path; from transformers import PreTrainedTokenizerFast\n"
        "from corral.data.prepare import prepare; from corral.errors import StorageError\n"
        "from corral.recipe import Data, Source; from corral.template import Template\n"
        "template = Template.load(PreTrainedTokenizerFast.from_pretrained(sys.argv[1]))\n"
    )
    command = [sys.executable, "-c", setup + code, str(tiny_folder), *arguments]
    env = os.environ | environment
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="session")
def template(tiny_tokenizer: Any) -> Template:
    return Template.load(tiny_tokenizer, "chatml")


@pytest.fixture
def prepared(template: Template, tmp_path: Path) -> Callable[..., Prepared]:
    """`prepared(source, …, split=…, seed=…, into=…)`: prepare the sources in a new folder."""
    count = 0

    def prepare_sources(
        *sources: Source,
        split: Split | None = None,
        seed: int = 0,
        into: Path | None = None,
        cache: Path | None = None,
        workers: int | None = None,
        template: Template = template,
        progress: Progress | None = None,
        **settings: Any,
    ) -> Prepared:
        nonlocal count
        count += 1
        folder = into or tmp_path / f"prepare-{count}"
        folder.mkdir(exist_ok=True)
        data = Data(sources=sources, split=split or Split(validation=0.2, test=0.2), **settings)
        return prepare(data, template, folder, seed, progress, cache=cache or tmp_path / "cache", workers=workers)

    return prepare_sources


@pytest.fixture
def planned(template: Template, tmp_path: Path) -> Callable[..., list[SourcePlan]]:
    """`planned(source, …, max_length=…, …)`: plans of the sources, every fate undecided."""

    def plan_sources(*sources: Source, **settings: Any) -> list[SourcePlan]:
        cache, data = tmp_path / "cache", Data(sources=sources, **settings)
        rows = [load_source_rows(source, cache, Progress()) for source in sources]
        return [
            SourcePlan.from_source(source, source_rows, template, data, cache)
            for source, source_rows in zip(sources, rows, strict=True)
        ]

    return plan_sources
