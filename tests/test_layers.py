"""Imports point down, or sideways without a circle; heavy packages are not paid for by those who do not use them."""

from __future__ import annotations

import ast
import builtins
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tests.forked import Forked

ROOT = Path(__file__).parent.parent
LAYERS = {
    0: ["errors", "formatting", "messages", "progress", "interrupts", "system"],
    1: ["storage", "export_forms", "assets", "metrics", "recipe", "run", "template"],
    2: ["data", "engines", "model", "prompting", "retrieval"],
    3: ["answering", "export", "training"],
    4: ["batch", "evaluation", "preflight", "pipeline", "report"],
    5: ["chat", "serving"],
    6: ["cli", "__main__"],
}
POSIX_ONLY = {"fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"}
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names}


@cache
def modules() -> dict[str, ast.Module]:
    files = sorted((ROOT / "corral").rglob("*.py"))
    names = {f: ".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for f in files}
    return {names[f]: ast.parse(f.read_text("utf-8")) for f in files}


def imports(tree: ast.Module, known: set[str]) -> set[str]:
    imported_names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported_names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            imported_names |= {
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in known else node.module for a in node.names
            }
    return {name for name in imported_names if name.startswith("corral.")}


def top(name: str) -> str:
    return name.split(".")[1]


def test_every_module_has_a_layer_and_imports_point_down_or_sideways() -> None:
    trees = modules()
    assert set(LAYER_OF) == {top(name) for name in trees if name != "corral"}
    for name, tree in trees.items():
        if name == "corral":
            continue
        for imported in imports(tree, set(trees)):
            assert LAYER_OF[top(imported)] <= LAYER_OF[top(name)], f"{name} imports {imported}, which is above it"


def assert_no_circle(graph: dict[str, set[str]]) -> None:
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, f"circle: {' → '.join([*path, name])}"
        if name in done:
            return
        for imported in sorted(graph.get(name, ())):
            visit(imported, [*path, name])
        done.add(name)

    for name in graph:
        visit(name, [])


def test_modules_import_each_other_without_a_circle() -> None:
    trees = modules()
    assert_no_circle({name: imports(tree, set(trees)) - {name} for name, tree in trees.items()})


def test_packages_import_each_other_without_a_circle() -> None:
    trees = modules()
    graph: dict[str, set[str]] = {}
    for name, tree in trees.items():
        if name != "corral":
            graph.setdefault(top(name), set()).update(top(i) for i in imports(tree, set(trees)) if i != "corral")
    assert_no_circle({name: imported_names - {name} for name, imported_names in graph.items()})


def test_every_module_has_a_docstring_and_at_most_eight_files_are_outside_packages() -> None:
    trees = modules()
    assert [name for name, tree in trees.items() if not ast.get_docstring(tree)] == []
    assert len([path for path in (ROOT / "corral").glob("*.py") if not path.stem.startswith("_")]) <= 8


def test_help_needs_no_heavy_package() -> None:
    code = (
        "import sys; from corral.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'matplotlib', 'sacrebleu', 'pydantic', 'fastapi'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_module_is_imported_where_posix_only_modules_are_missing() -> None:
    """As on Windows. Other packages have their own ways there, so that only imports by corral are refused."""
    names = [name for name in modules() if name != "corral.__main__" and ".migrations" not in name]
    done = Forked(import_as_on_windows, names).finish()
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{len(names)} imported\n"


def import_as_on_windows(names: Sequence[str]) -> None:
    """Import the modules anew without the modules of POSIX, and use what asks the system."""
    original: Any = builtins.__import__

    def refuse(name: str, variables: Any = None, *others: Any, **options: Any) -> Any:
        importer = (variables or {}).get("__name__", "")
        if name in POSIX_ONLY and importer.startswith("corral."):
            raise ModuleNotFoundError(f"{importer} imports {name}", name=name)
        return original(name, variables, *others, **options)

    for name in [name for name in sys.modules if name.partition(".")[0] == "corral"]:
        del sys.modules[name]
    builtins.__import__ = refuse
    for name in names:
        importlib.import_module(name)
    for module, attributes in ((os, ("geteuid", "sched_getaffinity", "sysconf")), (signal, ("SIGHUP", "SIGKILL"))):
        for attribute in attributes:
            delattr(module, attribute)
    interrupts, system, directory = map(
        importlib.import_module, ("corral.interrupts", "corral.system", "corral.run.directory")
    )
    assert system.peak_memory() is system.total_memory() is system.process_limit("NOFILE") is None
    assert directory.environment()["memory_bytes"] is None
    with importlib.reload(interrupts).Interrupts():
        print(len(names), "imported")
