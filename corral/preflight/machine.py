"""What this machine has for a run: memory, as far as processes and containers are limited, and free disk space."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from corral.errors import CorralError
from corral.system import proc_bytes, process_limit, total_memory

_UNLIMITED = 2**60  # cgroups of the first version write "no limit" as a huge number
_CGROUPS = Path("/sys/fs/cgroup")


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


def cpu_memory() -> MemoryLimit:
    """Main memory: the machine's, or less where this process or its container (cgroup) is limited.

    Raises:
        CorralError: the system does not say how much memory there is.
    """
    total = total_memory()
    if total is None:
        raise CorralError(
            "this operating system does not say how much memory it has", hint="plan on Linux or macOS, or give --device"
        )
    limits = [MemoryLimit(proc_bytes("meminfo", "MemAvailable") or total, total, "this machine"), *cgroup_limits()]
    for limit in (process_limit("DATA"), process_limit("AS")):
        if limit is not None:
            limits.append(MemoryLimit(limit, limit, "limit of a process (ulimit)"))
    return min(limits, key=lambda limit: limit.free)


def gpu_memory() -> MemoryLimit:
    """Memory of the GPU that torch uses."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return MemoryLimit(free, total, torch.cuda.get_device_name())


def free_disk(path: Path) -> tuple[int, Path]:
    """Free bytes where a path is or will be, and the nearest folder that exists."""
    folder = next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())
    return shutil.disk_usage(folder).free, folder


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
