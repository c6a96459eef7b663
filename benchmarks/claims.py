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
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "os": _os_name(),
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return f"{platform.system()} {platform.release()}"
