"""A child process that is kept running: JSON lines in and out, a heartbeat, and a restart when it ends or hangs.

A thread sends the child pings, which it answers between two steps of its work; any line of the child is a heartbeat. A child
that is silent for too long is killed. When one has ended, another is started; the requests that it had are lost. After
MOST_FAILURES children in a row that ended within a minute and before they answered anything, no other is started.

Too long are 10 s in which the child used no processor time, as when it is stopped or its threads wait for each other; else the
time that a step may take. Only time in which this process ran itself counts, so that a program that was suspended as a whole
goes on afterwards.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, TypeAlias, cast

from corral.errors import CorralError, EngineError, EngineUnavailableError

Event: TypeAlias = list[Any]
"""A list that begins with the kind of event. ["ready"] and ["pong"] are for this module."""

MOST_FAILURES = 5
"""Children in a row that ended soon, before they answered a request; then no other is started."""
_PROVEN_SECONDS = 60.0  # after which a child did not end soon
_TICK_SECONDS = 1.0
_IDLE_SECONDS = 10.0  # of silence without any processor time: what computes, loads or swaps uses some
_LONGEST_PAUSE = 8.0  # between two starts
_DOWN_RETRY_SECONDS = 60.0
_LAST_WORDS_SECONDS = 10.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Outage:
    """There is no child that computes."""

    fault: str
    words: str
    """The child's last words, or the error that kept it from being started: for who runs this program, not for clients."""
    retry_seconds: float


class ChildProcess:
    """Keeps one child process running until it is closed.

    Args:
        name: of the engine, for messages and the log.
        command: returns the child's command line; called for each start.
        environment: of the child.
        handle_events: called by a thread with the answers in one line of the child.
        handle_loss: called by a thread with the error for all requests that were sent and not answered, before another child
            is ready.
        longest_step: seconds of silence after which a child that computes counts as hung; or, if that is longer, ten times as
            long as the first start took.

    Raises:
        EngineError: the first child ended before it was ready.
    """

    _process: _Process
    """The present child, or the last one."""

    def __init__(
        self,
        name: str,
        command: Callable[[], Sequence[str]],
        environment: Mapping[str, str],
        handle_events: Callable[[list[Event]], None],
        handle_loss: Callable[[EngineUnavailableError], None],
        *,
        longest_step: float,
    ) -> None:
        self._name = name
        self._command = command
        self._environment = environment
        self._handle_events = handle_events
        self._handle_loss = handle_loss
        self._lock = threading.Lock()
        self._outage: _Outage | None = None
        self._has_answered = False
        """Whether the present child has answered a request."""
        self._closing = threading.Event()
        self.restarts = 0
        """How often a child was started again."""
        began = time.monotonic()
        self._start()
        try:
            self._process.begun.wait()
            if self._process.ended.is_set():
                raise EngineError(": ".join(filter(None, self._process.end)))
        except BaseException:
            self._process.close()
            raise
        self._start_seconds = time.monotonic() - began
        self._longest_silence = max(longest_step, 10 * self._start_seconds)
        self._thread = threading.Thread(target=self._supervise, name=f"corral-{name}-supervisor", daemon=True)
        self._thread.start()

    @property
    def fault(self) -> str | None:
        """Why there is no child that computes; None if there is one. It quotes nothing that the child wrote."""
        outage = self._outage
        return None if outage is None else outage.fault

    @property
    def pid(self) -> int:
        """Of the present child, or of the last one."""
        return self._process.process.pid

    def send(self, command: list[Any]) -> None:
        """Send a command to the child. Raises: EngineUnavailableError (there is none that computes)."""
        with self._lock:
            if self._outage is not None:
                raise self._error(self._outage)
            self._process.send(command)

    def close(self) -> None:
        """Kill the child, which has nothing to save, and wait for its end. Closing twice is allowed."""
        self._closing.set()
        self._process.kill()
        self._thread.join()

    def _start(self) -> _Process:
        command = self._command()
        with self._lock:  # its reader waits until it is the present one
            self._process = _Process(command, self._environment, self._receive)
            self._has_answered = False
        return self._process

    def _receive(self, process: _Process, events: list[Event]) -> None:
        """Called by the reader of a process, which may be one that was given up."""
        with self._lock:
            if process is not self._process or process.given_up:
                return
            if ["ready"] in events and self._outage is not None:
                self._outage = None
                _log.warning("engine %r can compute again", self._name)
        answers = [event for event in events if event[0] not in ("ready", "pong")]
        if answers:
            self._has_answered = True
            self._handle_events(answers)

    def _supervise(self) -> None:
        """Watch the child, and start another one when it has ended or was given up."""
        failures = 0
        process: _Process | None = self._process
        while True:
            proven = False
            try:
                process = process or self._start_again()
                fault, words = self._watch(process)
                proven = self._has_answered or process.ready_seconds > _PROVEN_SECONDS
            except (CorralError, OSError) as error:
                fault, words = "it cannot be started", str(error)
            if self._closing.is_set():
                break
            failures = 0 if proven else failures + 1
            self._begin_outage(fault, words, failures)
            self._process.close()
            pause = min(2.0 ** (failures - 1), _LONGEST_PAUSE) if failures else 0.0
            if failures == MOST_FAILURES or self._closing.wait(pause):
                break
            process = None
        self._process.close()

    def _start_again(self) -> _Process:
        self.restarts += 1
        self._has_answered = False
        return self._start()

    def _watch(self, process: _Process) -> tuple[str, str]:
        """Wait until the child ends or hangs. Returns: what happened, and the child's last words."""
        silent = idle = used = 0.0
        process.send(["ping"])
        while not process.ended.wait(_TICK_SECONDS):
            if self._closing.is_set():
                break
            if process.take_heartbeat():
                silent = idle = 0.0
                process.send(["ping"])
                continue
            before, used = used, process.cpu_seconds()
            silent += _TICK_SECONDS
            idle = idle + _TICK_SECONDS if used == before else 0.0
            if idle >= min(_IDLE_SECONDS, self._longest_silence):
                return f"it was silent for {silent:.0f} s and computed nothing", ""
            if silent >= self._longest_silence:
                return f"it computed one step for {silent:.0f} s", ""
        return process.end

    def _begin_outage(self, fault: str, words: str, failures: int) -> None:
        """Refuse requests from now on, and fail those that were sent. `failures`: children in a row that answered none."""
        if failures == MOST_FAILURES:
            end = f"failed {failures} times in a row ({fault}), and is not started again: restart this program"
            outage = _Outage(f"its process {end}", words, _DOWN_RETRY_SECONDS)
        else:
            outage = _Outage(f"its process is being started again: {fault}", words, self._start_seconds + 1)
        with self._lock:
            self._process.given_up = True
            self._outage = outage
        _log.error("engine %r: %s%s", self._name, outage.fault, f", saying: {words}" if words else "")
        self._handle_loss(self._error(outage))

    def _error(self, outage: _Outage) -> EngineUnavailableError:
        words = f", saying: {outage.words}" if outage.words else ""
        return EngineUnavailableError(
            f"engine {self._name!r}: {outage.fault}{words}", hint="ask again later", retry_seconds=outage.retry_seconds
        )


class _Process:
    """One child, and the two threads that write to it and read from it.

    Writing has a thread of its own, as the pipe may be full while the child computes: no caller must wait for that.
    """

    given_up = False
    """What it still writes is not read."""
    end: tuple[str, str] = ("", "")
    """How it ended, and its last line of errors, once it has."""

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        receive: Callable[[_Process, list[Event]], None],
    ) -> None:
        self.begun = threading.Event()
        """It has loaded its model, or ended."""
        self.ended = threading.Event()
        self._receive = receive
        self._has_written = False
        self._ready_at: float | None = None
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the child)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, env=environment
        )
        self._stdin, self._stdout = cast("IO[bytes]", self.process.stdin), cast("IO[bytes]", self.process.stdout)
        self._commands: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._write, self._read)]
        for thread in self._threads:
            thread.start()

    def send(self, command: list[Any]) -> None:
        self._commands.put(json.dumps(command).encode() + b"\n")

    def take_heartbeat(self) -> bool:
        """Whether it has written something since this was called last."""
        has_written, self._has_written = self._has_written, False
        return has_written

    @property
    def ready_seconds(self) -> float:
        """For how long it has been ready, or is."""
        return 0.0 if self._ready_at is None else time.monotonic() - self._ready_at

    def cpu_seconds(self) -> float:
        """Processor time that it has used."""
        import psutil

        with contextlib.suppress(psutil.Error):
            times = psutil.Process(self.process.pid).cpu_times()
            return times.user + times.system
        return -1.0

    def kill(self) -> None:
        self.process.kill()

    def close(self) -> None:
        """Kill it and wait for its end."""
        self.process.kill()
        for thread in self._threads:
            thread.join()

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # the reader notices that the child has ended
            while (line := self._commands.get()) is not None:
                self._stdin.write(line)
                self._stdin.flush()
        with contextlib.suppress(OSError):
            self._stdin.close()

    def _read(self) -> None:
        try:
            for line in self._stdout:
                if line.endswith(b"\n"):
                    self._has_written = True
                    self._receive(self, json.loads(line))
                    if not self.begun.is_set():
                        self._ready_at = time.monotonic()
                        self.begun.set()
        finally:
            code = self._wait()
            self._stdout.close()
            self.end = (
                f"it ended with signal {-code}" if code < 0 else f"it ended with exit code {code}",
                self._last_words(),
            )
            self._commands.put(None)
            self.ended.set()
            self.begun.set()

    def _wait(self) -> int:
        """Wait for the end of a process that has closed its output, and may still write its last words."""
        try:
            return self.process.wait(_LAST_WORDS_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def _last_words(self) -> str:
        with self._errors as file:
            file.seek(max(0, file.seek(0, 2) - 4000))
            lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
        return lines[-1] if lines else ""
