"""Sides of a training benchmark, each measured in a process of its own: `--side NAME` measures one and prints JSON."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import claims

Side = Callable[[int], dict[str, Any]]
"""From steps to figures: `tokens_per_second` and `losses`, or `flops_per_second`."""


def options(description: str | None, sides: Mapping[str, Side], steps: int, help_text: str) -> argparse.Namespace:
    """The command line, with `steps` and `json`. With `--side` it measures that side, prints its figures and exits."""
    parser = claims.parser(description)
    parser.add_argument("--steps", type=int, default=steps, help=help_text)
    parser.add_argument("--side", choices=sides, help="measure one side in this process and print JSON")
    args = parser.parse_args()
    if args.side:
        result = sides[args.side](args.steps)
        result["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(result))
        sys.exit(0)
    return args


def measure(script: str, side: str, steps: int) -> dict[str, Any]:
    """Run one side of a script in a process of its own. Returns its figures."""
    command = [sys.executable, script, "--side", side, "--steps", str(steps)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result = json.loads(output.splitlines()[-1])
    memory = result["peak_memory_bytes"] / 1e9
    if "losses" in result:
        print(
            f"{side:<15} {result['tokens_per_second']:7.1f} tokens/s  {memory:5.2f} GB  losses {result['losses'][:4]}"
        )
    else:
        print(f"{side:<15} {result['flops_per_second'] / 1e9:7.1f} GFLOP/s")
    sys.stdout.flush()
    return result
