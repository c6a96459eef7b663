"""Ctrl-C, SIGTERM and a closed terminal, turned into an orderly stop where one is possible.

Knows nothing about what is being stopped. Signals are the main thread's affair: it learns of them between two of its
instructions, and a call that takes long is not cut short. Child processes get a terminal's signals themselves.
"""

from __future__ import annotations

import errno
import os
import signal
import termios
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Self


class Stopped(KeyboardInterrupt):
    """Work was stopped by a signal, in good order; the same command goes on from there."""

    def __init__(self, number: int | None) -> None:
        super().__init__()
        self.signal = number or signal.SIGINT


class Interrupts:
    """While entered, SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt; inside `deferred` the first one only asks to stop.

    SIGHUP, which a closed terminal or a lost connection sends, stops as the others do, so that a checkpoint is written; under
    `nohup`, where it is ignored, it stays ignored.

    Args:
        on_request: called when a gentle stop is first asked for.
    """

    def __init__(self, on_request: Callable[[], None] = lambda: None) -> None:
        self.signal: int | None = None
        """The signal that stopped the work, if one did."""
        self._on_request = on_request
        self._gentle = False
        self._asked = False
        self._before: dict[int, object] = {}

    @contextmanager
    def deferred(self) -> Generator[Callable[[], bool]]:
        """Yields a question to ask at good moments: has a stop been asked for?"""
        self._gentle = True
        try:
            yield lambda: self._asked
        finally:
            self._gentle = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if number == signal.SIGHUP:
            _let_go_of_closed_terminal()
        if self._gentle and not self._asked:
            self._asked = True
            # It tells the user: not worth failing for where nobody listens, or where the signal came in the middle of telling.
            with suppress(OSError, RuntimeError):
                self._on_request()
            return
        raise KeyboardInterrupt

    def __enter__(self) -> Self:
        # Python delivers signals to the main thread only; elsewhere the caller's handlers stand.
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                numbers.append(signal.SIGHUP)
            self._before = {n: signal.signal(n, self._handle) for n in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]


def _let_go_of_closed_terminal() -> None:
    """Send to nowhere what would be written to a terminal that is no longer there: each write would be an error."""
    for stream in (1, 2):
        try:
            termios.tcgetattr(stream)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream)
                os.close(nowhere)
