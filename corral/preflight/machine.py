"""What this machine has for a run: memory, as far as processes and containers are limited, and space on disk.

Knows nothing about what a run needs.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED = 2**60  # cgroups of the first version write "no limit" as a huge number
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """Memory for a run.

    Args:
        free: bytes that it can still have.
        total: bytes that there are.
        reason: what sets the limit, in words.
    """

    free: int
    total: int
    reason: str


def cpu_memory() -> MemoryLimit:
    """Of the machine, or less where this process or its container (cgroup) may have less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [MemoryLimit(_available() or total, total, "this machine"), *cgroup_limits()]
    for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            limits.append(MemoryLimit(limit, limit, "limit of a process (ulimit)"))
    return min(limits, key=lambda limit: limit.free)


def gpu_memory() -> MemoryLimit:
    """Of the GPU that torch uses."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return MemoryLimit(free, total, torch.cuda.get_device_name())


def free_disk(path: Path) -> tuple[int, Path]:
    """Free bytes where a path is or will be, and the nearest folder that exists."""
    place = next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())
    return shutil.disk_usage(place).free, place


def _available() -> int | None:
    """What Linux says can be had without swapping."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    return None


def cgroup_limits(root: Path = _CGROUPS, listing: Path = Path("/proc/self/cgroup")) -> Iterator[MemoryLimit]:
    """The limits of the cgroups that this process is in, of either version; none where they cannot be read."""
    with contextlib.suppress(OSError):
        for line in listing.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                base = root / "memory" if controllers else root
                # In a container the path may be the host's, which is not there: its own limit stands at the root.
                inside = base / path.lstrip("/")
                for folder in (inside, *inside.parents):
                    if folder == base or base in folder.parents:
                        yield from _cgroup_limit(folder, "memory.limit_in_bytes" if controllers else "memory.max")


def _cgroup_limit(folder: Path, name: str) -> Iterator[MemoryLimit]:
    with contextlib.suppress(OSError, ValueError):
        limit = int((folder / name).read_text())  # "max" is no number, and no limit
        if limit < _UNLIMITED:
            used = int((folder / ("memory.current" if name == "memory.max" else "memory.usage_in_bytes")).read_text())
            figures = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            # Files that were read count as used, and are given back when memory is wanted.
            files = int(figures.get("total_inactive_file", figures.get("inactive_file", 0)))
            yield MemoryLimit(max(0, limit - used + files), limit, "memory limit of this container (cgroup)")
