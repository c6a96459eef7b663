"""A file of prompts → a file of answers, in the same order, whatever happens on the way.

Knows what is done, what is left and how far it is; does not know how answers come about, nor what is in the files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from corral.batch.journal import Journal, Totals, all_rows_bad, open_journal
from corral.batch.local_worker import KeepRow
from corral.batch.prompts import Prompt, PromptFile
from corral.errors import DataError
from corral.interrupts import Interrupts, Stopped
from corral.progress import Progress

Answering: TypeAlias = Callable[[Iterator[Prompt], KeepRow], None]
"""Answers prompts and hands over each row as soon as it is done, in any order."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a batch came to.

    Args:
        out: the output.
        figures: of the whole output.
        answered: rows that this call answered; the others were there already.
        seconds: they took, without loading.
        prompts_per_second, tokens_per_second: from when the model was loaded; 0 where nothing was left to do.
        saved: candidates that a vote ended early, as a share of those drawn now.
    """

    out: Path
    figures: Totals
    answered: int = 0
    seconds: float = 0.0
    prompts_per_second: float = 0.0
    tokens_per_second: float = 0.0
    saved: float = 0.0


def answer_file(
    source: str, out: Path, made_of: Mapping[str, Any], answering: Answering, progress: Progress
) -> Outcome:
    """Answer every row of a source that has no answer yet, and write the output once all have.

    Args:
        source: of the prompts; see `PromptFile`.
        out: where the answers go: a line of JSON for each row, in order.
        made_of: what the answers depend on besides the prompts, as JSON values.
        answering: what computes them.

    Raises:
        DataError: the prompts cannot be read, or were changed meanwhile.
        InputError: every row is bad; or the output, or what there is of it, was made of something else.
        StorageError: the disk is full; what was finished is kept.
        Stopped: by a signal; the same call goes on.
        CorralError: what `answering` raises; what was finished is kept.
    """
    interrupts = Interrupts()
    with interrupts:
        try:
            return _answer_file(source, out, made_of, answering, progress)
        except KeyboardInterrupt as stop:
            raise stop if isinstance(stop, Stopped) else Stopped(interrupts.signal) from None
        finally:
            progress.stop()


def _answer_file(
    source: str, out: Path, made_of: Mapping[str, Any], answering: Answering, progress: Progress
) -> Outcome:
    prompts = PromptFile(source, progress)
    digest = prompts.digest()
    with open_journal(out, {"prompts": digest, **made_of}) as journal:
        if isinstance(journal, Totals):
            return Outcome(out, journal)
        progress.start("Reading prompts", None)
        survey = prompts.survey()
        if survey.bad == survey.rows:
            journal.discard()
            raise all_rows_bad(survey.bad, survey.faults, source)
        if survey.ignored:
            progress.say(f"keys without meaning here: {', '.join(survey.ignored)}")
        if journal.count:
            progress.say(f"{journal.count:,} of {survey.rows:,} rows are done already")
        meter = _Meter(journal, progress, survey.rows)
        answering(_left(prompts, journal, meter), meter.keep)
        if prompts.digest() != digest:
            raise DataError(
                "the prompts changed while they were answered",
                where=source,
                hint=f"remove {journal.path} and start again",
            )
        return meter.outcome(journal.finish(survey.rows))


def _left(prompts: PromptFile, journal: Journal, meter: _Meter) -> Iterator[Prompt]:
    """The prompts that are still to be answered; of faulty ones the journal is told at once."""
    meter.begin()
    for prompt in prompts:
        if prompt.index in journal:
            continue
        if prompt.fault is not None:
            meter.keep(prompt.error_row(prompt.fault))
        else:
            yield prompt


class _Meter:
    """Between what computes rows and the journal: how many, how fast."""

    def __init__(self, journal: Journal, progress: Progress, rows: int) -> None:
        self._journal = journal
        self._progress = progress
        self._began = self._last = time.monotonic()
        self._rows = self._tokens = self._candidates = self._cancelled = 0
        progress.start(f"Answering {rows - journal.count:,} prompts", rows - journal.count)

    def begin(self) -> None:
        """What computes is ready, and asks for the first prompt."""
        self._began = self._last = time.monotonic()

    def keep(self, row: Mapping[str, Any]) -> None:
        """Take a finished row. Raises: StorageError."""
        self._journal.add(row)
        self._rows += 1
        self._tokens += row.get("tokens", 0)
        finishes: list[str] = row.get("finishes", [])
        self._candidates += len(finishes)
        self._cancelled += finishes.count("cancelled")
        self._last = time.monotonic()
        self._progress.update(self._rows, self._note())

    def outcome(self, figures: Totals) -> Outcome:
        """What it came to, once the output is there."""
        return Outcome(self._journal.out, figures, self._rows, self._last - self._began, *self._speeds(), self._saved())

    def _speeds(self) -> tuple[float, float]:
        """(prompts, tokens) a second."""
        seconds = max(self._last - self._began, 1e-9)
        return self._rows / seconds, self._tokens / seconds

    def _saved(self) -> float:
        return self._cancelled / self._candidates if self._candidates else 0.0

    def _note(self) -> str:
        prompts, tokens = self._speeds()
        saved = f", {self._saved():.0%} of candidates saved" if self._cancelled else ""
        return f"{prompts:.3g} prompts/s, {tokens:,.0f} tokens/s{saved}"
