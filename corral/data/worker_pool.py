"""The processes that compute what the cache lacks.

A `WorkerPool` forks as many as are worth their start, and stores what they compute chunk by chunk.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

from corral.data.row_store import Column, Ints, RowStore
from corral.errors import CorralError
from corral.messages import Record
from corral.progress import Progress
from corral.system import available_cores

if TYPE_CHECKING:
    from corral.data.source_rows import SourceRows
    from corral.recipe import Source

ComputeColumns: TypeAlias = "Callable[[Iterable[Record]], dict[str, Column]]"
Item = TypeVar("Item")
Result = TypeVar("Result")

_ROWS_PER_WORKER = 2000  # rows that are worth the start of a process


class RowsOfSource(Protocol):
    """The usable rows of a source, and the source, by whose label the progress names it."""

    source: Source
    rows: SourceRows


@dataclass(frozen=True)
class WorkerPool:
    """Processes that compute, and the progress they report to. By default as many `workers` as are worth their start."""

    progress: Progress
    workers: int | None = None

    def compute_missing(
        self, title: str, work: Sequence[tuple[RowsOfSource, RowStore, Ints]], function: ComputeColumns
    ) -> None:
        """Compute and store columns for the rows at these positions that the stores lack.

        Finished chunks stay in the cache if this is interrupted.
        """
        for plan, store, _ in work:
            for path in store.damaged:
                self.progress.say(f"cached rows of {plan.source.label} are damaged ({path.name}): they are made again")
                path.unlink(missing_ok=True)
            store.damaged.clear()
        pieces = [
            (n, piece)
            for n, (plan, store, positions) in enumerate(work)
            for piece in plan.rows.split(store.select_missing(positions))
        ]
        total = sum(len(part) for _, part in pieces)
        if not total:
            return
        self.progress.start(title, total)

        def compute_piece(piece: tuple[int, Ints]) -> tuple[str, int]:
            number, positions = piece
            plan, store, _ = work[number]
            with _collection_paused():
                store.save(positions, function(plan.rows.records(positions)))
            return plan.source.label, len(positions)

        workers = self.workers or min(available_cores() or 1, max(1, total // _ROWS_PER_WORKER))
        started, done = time.perf_counter(), 0
        for label, count in map_in_processes(compute_piece, pieces, workers):
            done += count
            self.progress.update(done, f"{label}, {done / (time.perf_counter() - started):,.0f} rows/s")
        for _, store, _ in work:
            store.reload()


@contextmanager
def _collection_paused() -> Generator[None]:
    """Without Python's cyclic garbage collector, which looks at every token id of a chunk again and again and frees nothing: a
    seventh of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def map_in_processes(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Yield `function(item)` for each item in any order, as results come in; with one worker, compute in this process.

    Workers are forked, so the function may hold anything. It must not use torch or threads of libraries. Where a fork is
    not safe (macOS, Windows) this process computes everything.

    Raises what the function raises, and CorralError if a worker was killed. If the caller stops early, items that have
    begun are finished first.
    """
    if workers <= 1 or sys.platform != "linux":
        yield from map(function, items)
        return
    remaining = iter(items)
    context = multiprocessing.get_context("fork")
    # The tokenizers library warns about a fork after it used threads, unless it is told not to use them.
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # A collection writes to every object it looks at: the workers would no longer share this process's memory.
    gc.collect()
    gc.freeze()
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(function,))
    try:
        running: set[Future[Any]] = {executor.submit(_run_item, item) for item in islice(remaining, 2 * workers)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            running |= {executor.submit(_run_item, item) for item in islice(remaining, len(done))}
            for future in done:
                yield future.result()
    except BrokenProcessPool:
        raise CorralError(
            "a worker process was killed while it prepared rows",
            where=f"{workers} worker processes",
            hint="most often memory ran out: free some and run again; finished chunks are kept",
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)
        gc.unfreeze()
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


_function: Callable[[Any], Any] = print


def _start_worker(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    # The parent receives Ctrl-C and lets chunks that have begun be finished.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run_item(item: Any) -> Any:
    return _function(item)
