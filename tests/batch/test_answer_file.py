"""A whole batch: order, bad rows, kills, stops, and memory."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from corral.answering.consensus import Consensus
from corral.errors import DataError, InputError
from corral.progress import Progress
from tests.batch.work import INSTANTS, Batch, finished_rows, question, read_rows, start_process, wait_for_rows

ROWS = 300


def questions(batch: Batch) -> list[int]:
    """The numbers of the questions that the engine got, sorted."""
    numbers = {question(i): i for i in range(ROWS)}
    matches = [[n for words, n in numbers.items() if words in text] for text in batch.prompts_sent()]
    assert all(len(each) == 1 for each in matches)
    return sorted(each[0] for each in matches)


def exit_code(running: Any) -> int:
    running.join()
    return running.exitcode


def test_answers_are_in_the_order_of_their_prompts(make_batch: Callable[..., Batch]) -> None:
    batch = make_batch(ROWS)
    outcome = batch.run()
    rows = read_rows(batch.out)
    assert [(row["index"], row["id"]) for row in rows] == [(i, f"q{i}") for i in range(ROWS)]
    assert len({row["answer"] for row in rows}) > ROWS / 2, "each row has its own seed"
    assert outcome.answered == outcome.figures.rows == ROWS
    assert outcome.figures.tokens == sum(row["tokens"] for row in rows)
    assert questions(batch) == list(range(ROWS))
    again = batch.run()
    assert (again.answered, again.figures) == (0, outcome.figures)
    assert not batch.calls.exists()


def test_bad_rows_have_an_error_in_their_place(make_batch: Callable[..., Batch]) -> None:
    batch = make_batch([{"prompt": "a"}, "no json", "", {"prompt": "b", "id": 1}, {"id": 2}, {"prompt": "c " * 9000}])
    figures = batch.run().figures
    rows = read_rows(batch.out)
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 4]
    assert ["error" in row for row in rows] == [False, True, False, True, True]
    assert [row.get("id") for row in rows] == [None, None, 1, 2, None]
    assert (figures.rows, figures.bad) == (5, 3)
    assert [fault.partition(":")[0] for fault in figures.faults] == ["row 1", "row 3", "row 4"]


def test_if_all_rows_are_bad_no_model_is_loaded_and_no_file_is_left(make_batch: Callable[..., Batch]) -> None:
    batch = make_batch(["{", {"prompt": ""}])
    with pytest.raises(InputError, match="all 2 rows are bad") as refused:
        replace(batch, tokenizer=batch.out).run()
    assert "line 2: prompt is empty" in refused.value.what
    assert [path.name for path in batch.out.parent.iterdir()] == ["prompts.jsonl"]


def test_votes_are_reproducible(make_batch: Callable[..., Batch]) -> None:
    batch = make_batch(60, consensus=Consensus("rouge-l", n=5))
    outcome = batch.run()
    rows = read_rows(batch.out)
    assert all(len(row["candidates"]) == 5 and row["answer"] == row["candidates"][row["winner"]] for row in rows)
    assert 0 <= outcome.saved < 1
    again = replace(batch, out=batch.out.with_name("again.jsonl"))
    again.run()
    assert [row["answer"] for row in read_rows(again.out)] == [row["answer"] for row in rows]


def test_a_batch_killed_at_any_instant_loses_no_row_and_answers_none_twice(make_batch: Callable[..., Batch]) -> None:
    batch = make_batch(ROWS)
    batch.run()
    expected = batch.out.read_bytes()
    for name in INSTANTS:
        batch.calls.unlink(missing_ok=True)
        killed = replace(batch, out=batch.out.with_name(f"{name}.jsonl"))
        assert exit_code(start_process(killed, name)) == -signal.SIGKILL, name
        finished = set(range(ROWS)) if killed.out.exists() else finished_rows(killed.out)
        batch.calls.unlink(missing_ok=True)
        killed.run()
        assert questions(killed) == sorted(set(range(ROWS)) - finished), name
        assert killed.out.read_bytes() == expected, name
        assert not list(killed.out.parent.glob("*.partial*")), name


@pytest.mark.full
def test_a_batch_killed_at_random_ends_with_the_same_output(make_batch: Callable[..., Batch]) -> None:
    batch = make_batch(ROWS * 20)
    batch.run()
    slow = replace(batch, out=batch.out.with_name("slow.jsonl"), delay_seconds=0.02)
    generator = random.Random(0)
    kills = 0
    while kills < 20 and not slow.out.exists():
        running = start_process(slow)
        running.join(generator.uniform(0.2, 0.8))
        running.kill()
        kills += exit_code(running) != 0
    slow.run()
    assert kills >= 3
    assert slow.out.read_bytes() == batch.out.read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_batch_stopped_by_a_signal_resumes(number: signal.Signals, make_batch: Callable[..., Batch]) -> None:
    batch = make_batch(ROWS * 20)
    running = start_process(replace(batch, delay_seconds=0.02))
    wait_for_rows(batch, 10)
    os.kill(running.pid, number)
    assert exit_code(running) == 128 + number
    left = ROWS * 20 - len(finished_rows(batch.out))
    assert 0 < left < ROWS * 20
    batch.calls.unlink()
    outcome = batch.run()
    assert outcome.answered == left
    assert outcome.figures.seconds > left / outcome.prompts_per_second, "with those of the call before"
    assert batch.run().figures == outcome.figures
    assert len(batch.prompts_sent()) == left
    assert len(read_rows(batch.out)) == ROWS * 20


def test_prompts_that_change_while_they_are_answered_are_an_error(make_batch: Callable[..., Batch]) -> None:
    batch = make_batch(ROWS)

    class Changes(Progress):
        def update(self, done: int, note: str = "") -> None:
            if done == 1:
                with batch.prompts.open("a") as file:
                    file.write('{"prompt": "one more"}\n')

    with pytest.raises(DataError, match="changed while"):
        batch.run(progress=Changes())
    assert not batch.out.exists()
    with pytest.raises(InputError, match="other prompts"):
        batch.run()


def test_progress_shows_the_rows_that_are_left_and_the_speed(make_batch: Callable[..., Batch]) -> None:
    batch = make_batch(ROWS)
    assert exit_code(start_process(batch, "before a row is written")) == -signal.SIGKILL

    messages: list[str] = []
    started: list[tuple[str, int | None]] = []

    class Recorder(Progress):
        def say(self, text: str) -> None:
            messages.append(text)

        def start(self, title: str, total: int | None) -> None:
            started.append((title, total))

        def update(self, done: int, note: str = "") -> None:
            assert "prompts/s" in note
            assert "tokens/s" in note

    outcome = batch.run(progress=Recorder())
    assert messages == ["149 of 300 rows are done already"]
    assert started[-1] == ("Answering 151 prompts", 151)
    assert outcome.answered == 151
    assert outcome.prompts_per_second > 0


MEMORY = """
import os, sys, pathlib, threading, time, psutil
from tests.batch.work import Batch
batch = Batch(*map(pathlib.Path, sys.argv[1:]))
batch.run()  # of few rows: what is loaded once
os.rename(batch.prompts.with_name("many"), batch.prompts)
batch.out.unlink()
me = psutil.Process()
before = me.memory_info().rss
most = 0
def watch():
    global most
    while True:
        most = max(most, me.memory_info().rss)
        time.sleep(0.02)
threading.Thread(target=watch, daemon=True).start()
batch.run()
print(most - before)
"""


@pytest.mark.full
def test_ten_thousand_long_rows_take_no_more_memory_than_a_few(make_batch: Callable[..., Batch]) -> None:
    filler = "word " * 1000  # 5 kB a row, 50 MB in all
    # Questions over again: a template remembers new words up to a bound of its own, which is not what is measured here.
    batch = make_batch({"prompt": question(i % 500), "filler": filler} for i in range(10_000))
    os.rename(batch.prompts, batch.prompts.with_name("many"))
    batch = make_batch(500)
    paths = map(str, (batch.prompts, batch.out, batch.tokenizer, batch.calls))
    done = subprocess.run([sys.executable, "-c", MEMORY, *paths], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 25e6
    assert len(read_rows(batch.out)) == 10_000
