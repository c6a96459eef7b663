"""Batches with a scripted engine that records its prompts, in this process or in one that is killed.

An answer depends on the prompt, the seed and the choice, so that equal outputs mean equal prompts and equal seeds.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from corral.answering.answerer import Answerer
from corral.answering.consensus import Consensus
from corral.batch import BatchResult, answer_file
from corral.batch.journal import Journal
from corral.batch.local_worker import answer_locally
from corral.engines.base import Sampling
from corral.engines.scripted import ScriptedEngine
from corral.errors import EngineError
from corral.interrupts import Stopped
from corral.model.loading import load_tokenizer
from corral.progress import Progress
from corral.template import Template
from tests import forked

IDENTITY: dict[str, Any] = {"model": "scripted"}


def write_prompts(path: Path, rows: Iterable[Mapping[str, Any] | str]) -> Path:
    """A `.jsonl` file of rows; text is written as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def question(number: int) -> str:
    return f"What is {number} plus {number}?"


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@dataclass(frozen=True)
class Batch:
    """A file of prompts, its output, a folder with a tokenizer, and the file in which the engine records its prompts."""

    prompts: Path
    out: Path
    tokenizer: Path
    calls: Path
    consensus: Consensus | None = None
    delay_seconds: float = 0.0
    breaks_at: str | None = None
    """Text of a prompt on which the engine fails, with all requests in flight."""

    def open(self) -> Answerer:
        template = Template.load(load_tokenizer(self.tokenizer))

        def reply(ids: Sequence[int], sampling: Sampling, choice: int) -> list[int]:
            with self.calls.open("a") as file:
                file.write(json.dumps(list(ids)) + "\n")
            if self.breaks_at is not None and self.breaks_at in template.tokenizer.decode(list(ids)):
                for request in list(engine._requests):
                    request.generation.fail(EngineError("the engine is broken"))
            word = f"{sampling.seed} {choice // 2} {len(ids)}"
            return template.tokenizer.encode(word, add_special_tokens=False)

        engine = ScriptedEngine(reply, chunk=64, delay_seconds=self.delay_seconds)
        return Answerer(engine, template, Sampling(64), consensus=self.consensus)

    def run(self, identity: Mapping[str, Any] = IDENTITY, progress: Progress | None = None) -> BatchResult:
        choices = self.consensus.n if self.consensus else 1
        answering = partial(answer_locally, self.open, choices, 7)
        return answer_file(str(self.prompts), self.out, identity, answering, progress or Progress())

    def prompts_sent(self) -> list[str]:
        """The prompts that the engine got since the last call."""
        if not self.calls.exists():
            return []
        lines: list[Any] = read_rows(self.calls)
        self.calls.unlink()
        tokenizer = load_tokenizer(self.tokenizer)
        return [tokenizer.decode(ids) for ids in lines]


Dying = Callable[[], None]


def _die_within(statement: str, nth: int) -> None:
    """Die in the transaction of the nth such SQL statement."""
    connect, count = sqlite3.connect, 0

    class Watched(sqlite3.Connection):
        def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
            nonlocal count
            count += sql.startswith(statement)
            if sql.startswith(statement) and count == nth:
                if not self.in_transaction:
                    super().execute("BEGIN")
                super().execute(sql, *values)
                os.kill(os.getpid(), signal.SIGKILL)
            return super().execute(sql, *values)

    sqlite3.connect = partial(connect, factory=Watched)


def _die_before(owner: Any, name: str, nth: int = 1) -> None:
    original = getattr(owner, name)
    count = 0

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, watched)


INSTANTS: dict[str, Dying] = {
    "while the journal is created": partial(_die_within, "INSERT INTO batch", 1),
    "while the first row is written": partial(_die_within, "INSERT INTO rows", 1),
    "while a row is written": partial(_die_within, "INSERT INTO rows", 100),
    "before a row is written": partial(_die_before, Journal, "add", 150),
    "while the output is put in order": partial(_die_before, os, "fsync"),
    "before the record is there": partial(_die_before, os, "replace", 1),
    "before the output is there": partial(_die_before, os, "replace", 2),
    "before the journal is removed": partial(_die_before, os, "unlink", 1),
}


def _run(batch: Batch, instant: str | None) -> None:
    if instant is not None:
        INSTANTS[instant]()
    try:
        batch.run()
    except Stopped as stop:
        os._exit(128 + stop.signal)
    os._exit(0)


def start_process(batch: Batch, instant: str | None = None) -> Any:
    """A process that runs the batch, and kills itself at the instant."""
    return forked.start(_run, batch, instant)


def finished_rows(out: Path) -> set[int]:
    """The rows in the journal of an output, read from a copy, as a running batch keeps it locked."""
    with tempfile.TemporaryDirectory() as folder:
        for suffix in ("", "-wal"):
            with suppress(FileNotFoundError):
                shutil.copy(f"{out}.partial{suffix}", f"{folder}/copy{suffix}")
        with closing(sqlite3.connect(f"{folder}/copy")) as database, suppress(sqlite3.DatabaseError):
            return {index for (index,) in database.execute("SELECT position FROM rows")}
    return set()


def wait_for_rows(batch: Batch, rows: int) -> None:
    """Until so many are finished."""
    while len(finished_rows(batch.out)) < rows:
        time.sleep(0.005)
