"""What the operating system says about this machine and process: memory, cores, processor, limits.

Where a system does not say (Windows has no `resource` module), the answer is None.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from pathlib import Path
from typing import Literal


def peak_memory() -> int | None:
    """The most bytes of memory that this process has held."""
    try:
        import resource
    except ModuleNotFoundError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def process_limit(kind: Literal["DATA", "AS", "NOFILE"]) -> int | None:
    """The soft limit that `ulimit` sets for this process: bytes of data or address space, or number of open files."""
    try:
        import resource
    except ModuleNotFoundError:
        return None
    limit = resource.getrlimit(getattr(resource, f"RLIMIT_{kind}"))[0]
    return None if limit == resource.RLIM_INFINITY else limit


def proc_bytes(file: str, name: str) -> int | None:
    """A field of a file of Linux's `/proc` that counts kB, such as `MemAvailable` of `meminfo`, in bytes."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc", file).read_text().splitlines()
        return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024
    return None


def total_memory() -> int | None:
    """Bytes of memory of this machine."""
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_cores() -> int | None:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def processor_name() -> str:
    """The processor's model name, or else its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
