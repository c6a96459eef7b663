"""Answers and log-probabilities of one variant on held-out rows, kept as they come.

Each row is written to a JSONL file as soon as it is done, so an interrupted evaluation goes on where it was. This module
does not know which variants there are or how rows are scored.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corral.answerer import Answerer
from corral.engines.base import Sampling
from corral.errors import CorralError
from corral.messages import Conversation
from corral.storage import storage_errors

AT_ONCE = 64  # rows handed to the engine together; it batches as it sees fit


@dataclass(frozen=True, slots=True)
class Item:
    """A held-out row: its id and a conversation that ends with the reference answer."""

    id: str
    conversation: Conversation


class RowFile:
    """A JSONL file of finished rows, keyed by variant and id; a half-written last line does not count."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple[str, str], dict[str, Any]] = {}
        self._whole_bytes: int | None = None
        if path.exists():
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            self._whole_bytes = len(whole) if whole != data else None
            for line in whole.splitlines():
                row: dict[str, Any] = json.loads(line)
                self.rows[row["variant"], row["id"]] = row

    def add(self, row: dict[str, Any]) -> None:
        """Keep a finished row."""
        with storage_errors(self.path):
            if self._whole_bytes is not None:
                os.truncate(self.path, self._whole_bytes)
                self._whole_bytes = None
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.rows[row["variant"], row["id"]] = row

    def of(self, variant: str) -> Mapping[str, dict[str, Any]]:
        """Finished rows of one variant, by id."""
        return {id_: row for (name, id_), row in self.rows.items() if name == variant}


async def score_items(
    answerer: Answerer, variant: str, items: Sequence[Item], into: RowFile, on_done: Callable[[int], None]
) -> None:
    """Add `{"variant", "id", "nll", "tokens"}` for each item not yet in the file."""

    async def one(item: Item) -> None:
        score = await answerer.score(item.conversation)
        into.add({"variant": variant, "id": item.id, "nll": score.nll, "tokens": score.tokens})
        on_done(len(into.of(variant)))

    await _each(items, variant, into, one)


async def answer_items(
    answerer: Answerer,
    variant: str,
    items: Sequence[Item],
    sampling: Sampling,
    into: RowFile,
    on_done: Callable[[int], None],
) -> None:
    """Add `{"variant", "id", "prompt", "reference", "answer", "finish", "tokens", "seconds"}` for each item not yet in."""

    async def one(item: Item) -> None:
        began = time.perf_counter()
        prompt, reference = item.conversation.split_answer()
        answer = await answerer.answer(prompt, sampling)
        (completion,) = answer.completions
        into.add(
            {
                "variant": variant,
                "id": item.id,
                "prompt": prompt.to_json()["messages"],
                "reference": reference,
                "answer": answer.text,
                "finish": completion.finish,
                "tokens": len(completion.ids),
                "seconds": round(time.perf_counter() - began, 3),
            }
        )
        on_done(len(into.of(variant)))

    await _each(items, variant, into, one)


async def _each(items: Sequence[Item], variant: str, into: RowFile, work: Callable[[Item], Any]) -> None:
    done = into.of(variant)
    limit = asyncio.Semaphore(AT_ONCE)

    async def limited(item: Item) -> None:
        async with limit:
            await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            for item in items:
                if item.id not in done:
                    group.create_task(limited(item))
    except* CorralError as errors:
        # Many rows fail alike; one error is what a person can read.
        raise _first(errors) from None


def _first(errors: BaseExceptionGroup[CorralError]) -> CorralError:
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
