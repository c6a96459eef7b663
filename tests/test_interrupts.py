"""Signals, in processes that really get them: an orderly stop at the first, an end at once at the second."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from corral.interrupts import Interrupts

WORK = """
import os, signal, sys, time
from corral.interrupts import Interrupts

def say(text):
    print(text, flush=True)

def work(deferred, seconds=30.0, on_request=lambda: say("requested")):
    interrupts = Interrupts(on_request)
    with interrupts:
        try:
            if not deferred:
                say("ready")
                time.sleep(seconds)
            with interrupts.deferred() as should_stop:
                say("ready")
                until = time.monotonic() + seconds
                while not should_stop() and time.monotonic() < until:
                    time.sleep(0.01)
                time.sleep(0.3)
                say("checkpoint")
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            say("stopped")
            sys.exit(128 + interrupts.signal)
"""


def start(code: str, **kwargs: object) -> subprocess.Popen[str]:
    """A process that has said that it is ready."""
    command = [sys.executable, "-c", WORK + code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **kwargs)  # type: ignore[call-overload]
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(("deferred", "output"), [(True, "requested\ncheckpoint\nstopped\n"), (False, "stopped\n")])
def test_a_signal_stops_the_work_at_once_or_if_deferred_in_order(
    deferred: bool, output: str, number: signal.Signals
) -> None:
    process = start(f"work(deferred={deferred})")
    process.send_signal(number)
    assert process.communicate()[0] == output
    assert process.returncode == 128 + number


def test_the_second_signal_stops_at_once() -> None:
    process = start("work(deferred=True)")
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert process.stdout.readline() == "requested\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate()[0] == "stopped\n", "no checkpoint"
    assert process.returncode == 130


def test_under_nohup_a_closed_terminal_stops_nothing() -> None:
    process = start("work(deferred=True, seconds=0.5)", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.communicate()[0] == "requested\ncheckpoint\nstopped\n"


@pytest.mark.parametrize("fault", ["OSError('nobody listens')", "RuntimeError('reentrant call')"])
def test_a_request_that_cannot_be_reported_still_stops_the_work(fault: str) -> None:
    process = start(f"def fail(): raise {fault}\nwork(deferred=True, on_request=fail)")
    process.send_signal(signal.SIGTERM)
    assert process.communicate()[0] == "checkpoint\nstopped\n"
    assert process.returncode == 143


def test_when_its_terminal_is_closed_the_work_ends_in_order_and_can_still_write(tmp_path: Path) -> None:
    """The child writes to the terminal until it is gone, as progress does, and what it has done to a file."""
    code = f"""
def note(text):
    with open({str(tmp_path / "log")!r}, "a") as file:
        file.write(text + chr(10))
original = say
def say(text):
    original(text)
    note(text)
work(deferred=True)
"""
    child, master = pty.fork()
    if child == 0:
        os.chdir(Path(__file__).parent.parent)
        os.execv(sys.executable, [sys.executable, "-c", WORK + code])
    log = tmp_path / "log"
    while not log.exists() or "ready" not in log.read_text():
        time.sleep(0.01)
    os.close(master)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 129
    assert log.read_text() == "ready\nrequested\ncheckpoint\nstopped\n"


def test_a_worker_thread_is_not_interrupted_and_the_main_thread_is() -> None:
    code = """
import threading
def count():
    time.sleep(0.6)
    say("counted")
thread = threading.Thread(target=count)
thread.start()
try:
    work(deferred=False)
finally:
    thread.join()
"""
    process = start(code)
    process.send_signal(signal.SIGTERM)
    assert process.communicate()[0] == "stopped\ncounted\n"
    assert process.returncode == 143


def handlers() -> dict[int, object]:
    return {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}


def test_afterwards_the_handlers_are_those_from_before() -> None:
    before = handlers()
    with Interrupts():
        assert all(signal.getsignal(n) != handler for n, handler in before.items())
    assert handlers() == before


def test_in_another_thread_handlers_are_left_alone() -> None:
    seen: list[dict[int, object]] = []

    def enter() -> None:
        with Interrupts():
            seen.append(handlers())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [handlers()]
