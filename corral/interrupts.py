"""Ctrl-C, SIGTERM and a closed terminal, turned into an orderly stop where one is possible.

Python delivers signals to the main thread, between two of its instructions: a long call is not cut short. Child processes
get a terminal's signals themselves.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Self

_SIGHUP: int | None = getattr(signal, "SIGHUP", None)  # Windows has none


class Stopped(KeyboardInterrupt):
    """Work was stopped by a signal, in good order; the same command goes on from there."""

    def __init__(self, number: int | None) -> None:
        super().__init__()
        self.signal = number or signal.SIGINT


class Interrupts:
    """While entered, SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt; within `deferred` the first one only requests a stop.
    A KeyboardInterrupt leaves the block as `Stopped`.

    A closed terminal or a lost connection sends SIGHUP. It stops as the others do, so that a checkpoint is written; under
    `nohup`, where it is ignored, it stays ignored.

    Args:
        on_request: called when a deferred stop is first requested.
    """

    def __init__(self, on_request: Callable[[], None] = lambda: None) -> None:
        self.signal: int | None = None
        """The signal that stopped the work, if one did."""
        self._on_request = on_request
        self._deferred = False
        self._stop_requested = False
        self._previous_handlers: dict[int, object] = {}

    @contextmanager
    def deferred(self) -> Generator[Callable[[], bool]]:
        """Yields a function that tells whether a stop was requested; call it where the work can stop in good order."""
        self._deferred = True
        try:
            yield lambda: self._stop_requested
        finally:
            self._deferred = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if number == _SIGHUP:
            _redirect_closed_terminal()
        if self._deferred and not self._stop_requested:
            self._stop_requested = True
            # It tells the user. That may fail: the terminal is closed, or the signal came in the middle of another message.
            with suppress(OSError, RuntimeError):
                self._on_request()
            return
        raise KeyboardInterrupt

    def __enter__(self) -> Self:
        # Only the main thread may set handlers; in other threads the caller's stand.
        if threading.current_thread() is threading.main_thread():
            numbers: list[int] = [signal.SIGINT, signal.SIGTERM]
            if _SIGHUP is not None and signal.getsignal(_SIGHUP) != signal.SIG_IGN:
                numbers.append(_SIGHUP)
            self._previous_handlers = {n: signal.signal(n, self._handle) for n in numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        if isinstance(error, KeyboardInterrupt) and not isinstance(error, Stopped):
            raise Stopped(self.signal) from None


def _redirect_closed_terminal() -> None:
    """Sends output to the null device where its terminal is gone: each write would be an error."""
    import termios

    for stream in (1, 2):
        try:
            termios.tcgetattr(stream)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream)
                os.close(null)
