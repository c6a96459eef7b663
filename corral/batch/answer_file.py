"""A file of prompts → a file of answers in the same order; finished rows are never computed again."""

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
from corral.interrupts import Interrupts
from corral.progress import Progress

AnswerPrompts: TypeAlias = Callable[[Iterator[Prompt], KeepRow], None]
"""Answers prompts, and passes on each row as soon as it is finished, in any order."""


@dataclass(frozen=True, slots=True)
class BatchResult:
    """The result of a batch.

    Args:
        out: the output.
        figures: totals of the whole output.
        answered: rows that this call answered; the others were finished before.
        prompts_per_second, tokens_per_second: of this call, since the model was loaded; 0 if nothing was left to do.
        saved: the share of the candidates that a vote ended early, of those of this call.
    """

    out: Path
    figures: Totals
    answered: int = 0
    prompts_per_second: float = 0.0
    tokens_per_second: float = 0.0
    saved: float = 0.0


def answer_file(
    source: str, out: Path, identity: Mapping[str, Any], answer_prompts: AnswerPrompts, progress: Progress
) -> BatchResult:
    """Answer every row of a source that has no answer yet, and write the output when all are finished.

    Args:
        source: of the prompts; see `PromptFile`.
        out: the file of answers: a line of JSON for each row, in order.
        identity: what the answers depend on besides the prompts, as JSON values.
        answer_prompts: computes the answers.

    Raises:
        DataError: the prompts cannot be read, or changed while they were answered.
        InputError: every row is bad; or the output or its journal is that of another batch.
        StorageError: the disk is full; finished rows are kept.
        Stopped: by a signal; calling again resumes.
        CorralError: `answer_prompts` failed; finished rows are kept.
    """
    with Interrupts():
        try:
            return _answer_file(source, out, identity, answer_prompts, progress)
        finally:
            progress.stop()


def _answer_file(
    source: str, out: Path, identity: Mapping[str, Any], answer_prompts: AnswerPrompts, progress: Progress
) -> BatchResult:
    prompts = PromptFile(source, progress)
    digest = prompts.digest()
    with open_journal(out, {"prompts": digest, **identity}) as journal:
        if isinstance(journal, Totals):
            return BatchResult(out, journal)
        progress.start("Reading prompts", None)
        survey = prompts.survey()
        if survey.bad == survey.rows:
            journal.remove()
            raise all_rows_bad(survey.bad, survey.faults, source)
        if survey.unknown_keys:
            progress.say(f"keys that have no meaning here: {', '.join(survey.unknown_keys)}")
        if journal.count:
            progress.say(f"{journal.count:,} of {survey.rows:,} rows are done already")
        throughput = _Throughput(journal, progress, survey.rows)
        answer_prompts(_unanswered(prompts, journal, throughput), throughput.keep)
        if prompts.digest() != digest:
            raise DataError(
                "the prompts changed while they were answered",
                where=source,
                hint=f"remove {journal.path} and start again",
            )
        return throughput.result(journal.finish(survey.rows))


def _unanswered(prompts: PromptFile, journal: Journal, throughput: _Throughput) -> Iterator[Prompt]:
    """The prompts that have no answer yet; faulty ones go into the journal at once."""
    throughput.begin()
    for prompt in prompts:
        if prompt.index in journal:
            continue
        if prompt.fault is not None:
            throughput.keep(prompt.error_row(prompt.fault))
        else:
            yield prompt


class _Throughput:
    """Keeps finished rows in the journal, and measures how many and how fast."""

    def __init__(self, journal: Journal, progress: Progress, rows: int) -> None:
        self._journal = journal
        self._before = journal.seconds
        self._progress = progress
        self._began = self._last = time.monotonic()
        self._rows = self._tokens = self._candidates = self._cancelled = 0
        progress.start(f"Answering {rows - journal.count:,} prompts", rows - journal.count)

    def begin(self) -> None:
        """Start measuring: the model is loaded, and the first prompt is requested."""
        self._began = self._last = time.monotonic()

    def keep(self, row: Mapping[str, Any]) -> None:
        """Keep a finished row. Raises: StorageError."""
        self._last = time.monotonic()
        self._journal.add(row, self._before + self._last - self._began)
        self._rows += 1
        self._tokens += row.get("tokens", 0)
        finishes: list[str] = row.get("finishes", [])
        self._candidates += len(finishes)
        self._cancelled += finishes.count("cancelled")
        prompts, tokens = self._speeds()
        saved = f", {self._saved():.0%} of candidates saved" if self._cancelled else ""
        self._progress.update(self._rows, f"{prompts:.3g} prompts/s, {tokens:,.0f} tokens/s{saved}")

    def result(self, totals: Totals) -> BatchResult:
        """The result, once the output is written."""
        return BatchResult(self._journal.out, totals, self._rows, *self._speeds(), self._saved())

    def _speeds(self) -> tuple[float, float]:
        """(prompts, tokens) per second."""
        seconds = max(self._last - self._began, 1e-9)
        return self._rows / seconds, self._tokens / seconds

    def _saved(self) -> float:
        return self._cancelled / self._candidates if self._candidates else 0.0
