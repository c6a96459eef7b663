"""Ctrl-C and SIGTERM, turned into an orderly stop where one is possible. Knows nothing about what is being stopped."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import Self


class Stopped(KeyboardInterrupt):
    """Work was stopped by a signal, in good order; the same command goes on from there."""

    def __init__(self, number: int | None) -> None:
        super().__init__()
        self.signal = number or signal.SIGINT


class Interrupts:
    """While entered, SIGINT and SIGTERM raise KeyboardInterrupt; inside `gently` the first one only asks to stop.

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
    def gently(self) -> Generator[Callable[[], bool]]:
        """Yields a question to ask at good moments: has a stop been asked for?"""
        self._gentle = True
        try:
            yield lambda: self._asked
        finally:
            self._gentle = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if self._gentle and not self._asked:
            self._asked = True
            self._on_request()
            return
        raise KeyboardInterrupt

    def __enter__(self) -> Self:
        # Python delivers signals to the main thread only; elsewhere the caller's handlers stand.
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
