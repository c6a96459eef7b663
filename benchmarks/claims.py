"""Claims with goals, which all benchmarks print as a table and write as JSON.

`python benchmarks/NAME.py [--json FILE]` exits with 0 if every claim is met, else with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Claim:
    """A measured value and its goal; `direction` says on which side of the goal the value must be."""

    name: str
    value: float
    unit: str
    goal: float
    direction: Literal[">=", "<="] = ">="

    @property
    def met(self) -> bool:
        return self.value >= self.goal if self.direction == ">=" else self.value <= self.goal

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "goal": self.goal,
            "direction": self.direction,
            "met": self.met,
        }


def parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser with `--json`, to which a benchmark adds its own options."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "--json", type=Path, metavar="FILE", help="write claims, raw figures, versions and machine here"
    )
    return options


def report(claims: Sequence[Claim], raw: Any, packages: Sequence[str], json_file: Path | None) -> int:
    """Print the table, and write `json_file` if it is given. Returns: the exit code."""
    width = max(len(claim.name) for claim in claims)
    print(f"\n{'claim':<{width}}  {'value':>10}  {'goal':>10}  met")
    for claim in claims:
        goal = f"{claim.direction} {claim.goal:g}"
        print(f"{claim.name:<{width}}  {claim.value:>10.4g}  {goal:>10}  {'yes' if claim.met else 'NO '}  {claim.unit}")
    if json_file:
        content = {
            "claims": [claim.to_json() for claim in claims],
            "raw": raw,
            "versions": {name: version(name) for name in sorted(packages)},
            "machine": machine(),
        }
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0 if all(claim.met for claim in claims) else 1


def machine() -> dict[str, Any]:
    """The hardware and system that the figures depend on; nothing that identifies the machine or its owner."""
    return {
        "cpu": _cpu_field("model name") or platform.processor() or platform.machine(),
        "full_width_avx512": has_full_width_avx512(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "os": _os_name(),
        "python": platform.python_version(),
    }


def has_full_width_avx512() -> bool:
    """Whether the units for AVX-512 have 512 bits: on Intel's processors with it, and from AMD's fifth generation of Zen on,
    the first that intersects vectors."""
    flags = _cpu_field("flags").split()
    return "avx512f" in flags and (_cpu_field("vendor_id") == "GenuineIntel" or "avx512_vp2intersect" in flags)


def _cpu_field(name: str) -> str:
    """A field of Linux's first processor; empty if it is not known."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return f"{platform.system()} {platform.release()}"
