"""What the operating system says about this machine and process: memory, cores, processor, limits.

Where a system does not say (Windows has no `resource` module), the answer is None.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_UNLIMITED = 2**60  # cgroups of the first version write "no limit" as a huge number
_CGROUPS = Path("/sys/fs/cgroup")


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


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """Memory for a run.

    Args:
        free: bytes that it can still have.
        total: bytes in all.
        reason: what sets the limit, in words.
    """

    free: int
    total: int
    reason: str


def cpu_memory() -> MemoryLimit | None:
    """Main memory: the machine's, or less where this process or its container (cgroup) is limited.

    Returns: None if the system does not say how much memory there is.
    """
    total = total_memory()
    if total is None:
        return None
    limits = [MemoryLimit(proc_bytes("meminfo", "MemAvailable") or total, total, "this machine"), *cgroup_limits()]
    for limit in (process_limit("DATA"), process_limit("AS")):
        if limit is not None:
            limits.append(MemoryLimit(limit, limit, "limit of a process (ulimit)"))
    return min(limits, key=lambda limit: limit.free)


def cgroup_limits(root: Path = _CGROUPS, listing: Path = Path("/proc/self/cgroup")) -> Iterator[MemoryLimit]:
    """The limits of this process's cgroups, of either version; none where they cannot be read."""
    with contextlib.suppress(OSError):
        for line in listing.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                base = root / "memory" if controllers else root
                # In a container the path may be the host's, which is not there: its own limit is at the root.
                inside = base / path.lstrip("/")
                for folder in (inside, *inside.parents):
                    if folder == base or base in folder.parents:
                        yield from _cgroup_limit(folder, "memory.limit_in_bytes" if controllers else "memory.max")


def _cgroup_limit(folder: Path, name: str) -> Iterator[MemoryLimit]:
    with contextlib.suppress(OSError, ValueError):
        limit = int((folder / name).read_text())  # "max" is no number, and no limit
        if limit < _UNLIMITED:
            used = int((folder / ("memory.current" if name == "memory.max" else "memory.usage_in_bytes")).read_text())
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            # The page cache of files counts as used, and is given back when memory is wanted.
            page_cache = int(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))
            yield MemoryLimit(max(0, limit - used + page_cache), limit, "memory limit of this container (cgroup)")
