"""Runs the programs in `programs/`, each in the environment that has its client."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

CLIENTS_PYTHON = Path(__file__).parents[2] / ".venv-clients" / "bin" / "python"
"""Of the environment that the Makefile makes for them."""
_PROGRAMS = Path(__file__).with_name("programs")
CLIENTS = sorted(path.stem.removeprefix("use_") for path in _PROGRAMS.glob("use_*.py"))


def run_program(client: str, address: str, *scenarios: str) -> dict[str, str | None]:
    """Run the scenarios of a client, or all.

    Args:
        address: of the server, ending in `/v1`; `{}` in it is replaced by the scenario's name.

    Returns: scenario → None, or what went wrong.
    """
    # lm-eval needs torch, so it is installed with corral.
    python = sys.executable if client == "lm_eval" else CLIENTS_PYTHON
    command = [str(python), str(_PROGRAMS / f"use_{client}.py"), address, *scenarios]
    # No proxy, key or setting of the user who runs this.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "PYTHON"))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{client}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
