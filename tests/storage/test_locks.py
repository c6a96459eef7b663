"""Locks let one process in at a time, and a killed one gives its lock back."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from corral.storage import file_lock


def test_a_lock_lets_one_process_in_at_a_time(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from corral.storage import file_lock
folder = Path(sys.argv[1])
for _ in range(20):
    with file_lock(folder / "lock"):
        number = int((folder / "number").read_text())
        time.sleep(0.001)
        (folder / "number").write_text(str(number + 1))
"""
    (tmp_path / "number").write_text("0")
    children = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0]
    assert (tmp_path / "number").read_text() == "60"


def test_a_lock_that_is_held_is_not_waited_for_on_request_and_a_killed_process_gives_it_back(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from corral.storage import file_lock
with file_lock(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(TimeoutError), file_lock(tmp_path / "lock", wait=False):
        pass
    holder.communicate()
    assert holder.returncode == -signal.SIGKILL
    with file_lock(tmp_path / "lock", wait=False):
        pass
