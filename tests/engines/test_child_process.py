"""Real child processes: small programs that answer, end, stop or spin as a command says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import psutil
import pytest

from corral.engines import child_process
from corral.engines.child_process import MOST_FAILURES, ChildProcess
from corral.errors import EngineError, EngineUnavailableError
from tests.engines.conformance import wait_for

PROGRAM = """
import json, os, sys
print('[["ready"]]', flush=True)
for line in sys.stdin:
    command, *arguments = json.loads(line)
    if command == "ping":
        print('[["pong"]]', flush=True)
    elif command == "echo":
        print(json.dumps([["echo", *arguments]]), flush=True)
    elif command == "end":
        sys.exit("no memory is left")
    elif command == "spin":
        while True:
            pass
"""


class Watched:
    """A child, and what came of it."""

    def __init__(self, program: str = PROGRAM, longest_step: float = 3600.0) -> None:
        self.executable, self.program = sys.executable, program
        self.events: list[Any] = []
        self.losses: list[EngineUnavailableError] = []
        self.child = ChildProcess(
            "watched",
            lambda: [self.executable, "-S", "-c", self.program],
            os.environ,
            self.events.extend,
            self.losses.append,
            longest_step=longest_step,
        )

    def echo(self, number: int) -> None:
        """Send a number, and wait for it to come back."""
        self.child.send(["echo", number])
        wait_for(lambda: ["echo", number] in self.events)

    def wait_for_restart(self, count: int) -> None:
        wait_for(lambda: self.child.restarts == count and self.child.fault is None)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Generator[Callable[..., Watched]]:
    """Starts children, and watches them in a twentieth of the time."""
    monkeypatch.setattr(child_process, "_TICK_SECONDS", 0.05)
    monkeypatch.setattr(child_process, "_LONGEST_PAUSE", 0.05)
    started: list[Watched] = []

    def start(*arguments: Any, **options: Any) -> Watched:
        started.append(Watched(*arguments, **options))
        return started[-1]

    yield start
    for each in started:
        each.child.close()


@pytest.mark.parametrize("command", ["end", "kill"])
def test_a_child_that_ends_is_started_again_and_what_it_had_is_lost(
    command: str, watch: Callable[..., Watched], caplog: pytest.LogCaptureFixture
) -> None:
    watched = watch()
    watched.echo(1)
    pid = watched.child.pid
    if command == "end":
        watched.child.send(["end"])
    else:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: len(watched.losses) == 1)
    watched.wait_for_restart(1)
    assert watched.child.pid != pid
    assert not psutil.pid_exists(pid)
    watched.echo(2)
    (loss,) = watched.losses
    end = "exit code 1, saying: no memory is left" if command == "end" else "signal 9"
    assert f"it ended with {end}" in str(loss)
    assert (loss.retry_seconds or 0) >= 1
    assert end in caplog.text, "who runs the program finds it in the log"


def test_a_stopped_child_is_killed_and_another_one_works(
    watch: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_process, "_IDLE_SECONDS", 0.5)
    watched = watch()
    pid = watched.child.pid
    os.kill(pid, signal.SIGSTOP)
    watched.child.send(["echo", 1])
    wait_for(lambda: len(watched.losses) == 1)
    assert "computed nothing" in str(watched.losses[0])
    watched.wait_for_restart(1)
    assert not psutil.pid_exists(pid)
    watched.echo(2)
    assert ["echo", 1] not in watched.events


def test_a_child_whose_step_does_not_end_is_killed(watch: Callable[..., Watched]) -> None:
    watched = watch(longest_step=1.0)
    watched.child.send(["spin"])
    wait_for(lambda: len(watched.losses) == 1)
    watched.wait_for_restart(1)
    watched.echo(1)


def test_a_child_that_computes_for_less_than_its_longest_step_is_left_alone(
    watch: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_process, "_IDLE_SECONDS", 3.0)
    watched = watch()
    pid = watched.child.pid
    watched.child.send(["spin"])
    used = psutil.Process(pid).cpu_times().user
    wait_for(lambda: psutil.Process(pid).cpu_times().user > used + 1)
    assert (watched.child.pid, watched.child.restarts, watched.losses) == (pid, 0, [])


def test_nothing_can_be_sent_until_another_child_is_ready(watch: Callable[..., Watched], tmp_path: Path) -> None:
    fifo = tmp_path / "go on"
    os.mkfifo(fifo)
    watched = watch()
    watched.program = f"open({str(fifo)!r}).read()" + PROGRAM
    os.kill(watched.child.pid, signal.SIGKILL)
    wait_for(lambda: watched.child.restarts == 1)
    fault = watched.child.fault
    assert fault == "its process is being started again: it ended with signal 9"
    with pytest.raises(EngineUnavailableError, match="signal 9"):
        watched.child.send(["echo", 1])
    fifo.write_text("")
    watched.wait_for_restart(1)
    watched.echo(2)


def test_a_child_that_fails_each_time_stays_down_and_the_reason_is_known_but_not_quoted(
    watch: Callable[..., Watched],
) -> None:
    watched = watch()
    watched.program = "import sys; sys.exit('the weights are gone')"
    os.kill(watched.child.pid, signal.SIGKILL)
    wait_for(lambda: len(watched.losses) == MOST_FAILURES)
    assert watched.child.restarts == MOST_FAILURES - 1
    fault = str(watched.child.fault)
    assert "restart this program" in fault
    assert "exit code 1" in fault
    assert "weights" not in fault
    with pytest.raises(EngineUnavailableError, match="the weights are gone"):
        watched.child.send(["echo", 1])


def test_after_a_child_that_ran_long_too_one_that_cannot_be_started_is_given_up(
    watch: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_process, "_PROVEN_SECONDS", 0.0)
    watched = watch()
    watched.executable = "/no/such/program"
    os.kill(watched.child.pid, signal.SIGKILL)
    wait_for(lambda: "restart this program" in str(watched.child.fault))
    assert watched.child.restarts == MOST_FAILURES


def test_a_child_that_answers_between_its_ends_is_always_started_again(watch: Callable[..., Watched]) -> None:
    watched = watch()
    for number in range(MOST_FAILURES + 1):
        watched.echo(number)
        os.kill(watched.child.pid, signal.SIGKILL)
        watched.wait_for_restart(number + 1)


@pytest.mark.parametrize("before", ["", "import os, time; os.close(1); time.sleep(0.5); "])
def test_a_first_child_that_ends_is_an_error_with_its_last_words(before: str, watch: Callable[..., Watched]) -> None:
    with pytest.raises(EngineError, match="exit code 1: the weights are gone"):
        watch(f"{before}import sys; sys.exit('the weights are gone')")


@pytest.mark.parametrize("how", ["waiting", "stopped", "down"])
def test_closing_leaves_no_process_and_no_thread(how: str, watch: Callable[..., Watched]) -> None:
    threads, children = threading.active_count(), psutil.Process().children()
    watched = watch()
    pid = watched.child.pid
    if how == "stopped":
        os.kill(pid, signal.SIGSTOP)
    if how == "down":
        watched.program = "import sys; sys.exit('the weights are gone')"
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: len(watched.losses) == MOST_FAILURES)
    watched.child.close()
    watched.child.close()
    assert threading.active_count() == threads
    assert psutil.Process().children() == children
    assert watched.child.restarts == (MOST_FAILURES - 1 if how == "down" else 0)


SUSPENDED = """
import os, sys, time
from corral.engines import child_process
from tests.engines.test_child_process import Watched

child_process._IDLE_SECONDS = 2.0
watched = Watched()
print(watched.child.pid, flush=True)
sys.stdin.readline()
watched.echo(1)
print(watched.child.restarts, flush=True)
watched.child.close()
"""


def test_a_program_that_is_suspended_as_a_whole_goes_on_with_its_child() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SUSPENDED],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as program:
        assert program.stdout is not None
        child = psutil.Process(int(program.stdout.readline()))
        os.killpg(program.pid, signal.SIGSTOP)
        wait_for(lambda: child.status() == psutil.STATUS_STOPPED)
        threading.Event().wait(3.0)
        os.killpg(program.pid, signal.SIGCONT)
        assert program.communicate("go on\n")[0].strip() == "0"
