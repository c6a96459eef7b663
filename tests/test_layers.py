"""Imports point down, or sideways without a circle; heavy packages are not paid for by those who do not use them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAYERS = {
    0: ["errors", "extras", "messages", "progress", "interrupts"],
    1: [
        "rouge",
        "extraction",
        "storage",
        "forms",
        "assets",
        "decoding",
        "template",
        "recipe",
        "reference",
        "run",
        "wire",
    ],
    2: ["consensus", "prompting", "embedding", "engines", "data", "model"],
    3: [
        "answerer",
        "blocking",
        "batch",
        "asking",
        "composing",
        "votes",
        "opening",
        "contract",
        "evaluation",
        "export",
        "training",
        "preflight",
    ],
    4: ["stages", "evaluating", "pipeline", "report", "chat", "client", "serving", "terminal"],
    5: ["cli", "__main__"],
}
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names}


def modules() -> dict[str, ast.Module]:
    files = sorted((ROOT / "corral").rglob("*.py"))
    names = {f: ".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for f in files}
    return {names[f]: ast.parse(f.read_text("utf-8")) for f in files}


def imports(tree: ast.Module, known: set[str]) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found |= {
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in known else node.module for a in node.names
            }
    return {name for name in found if name.startswith("corral.")}


def top(name: str) -> str:
    return name.split(".")[1]


def test_every_module_has_a_layer_and_imports_point_down_or_sideways() -> None:
    trees = modules()
    assert len(trees) > 30
    for name, tree in trees.items():
        if name == "corral":
            continue
        for imported in imports(tree, set(trees)):
            assert LAYER_OF[top(imported)] <= LAYER_OF[top(name)], f"{name} imports {imported}, which is above it"


def test_no_circles() -> None:
    trees = modules()
    graph = {name: imports(tree, set(trees)) - {name} for name, tree in trees.items()}
    state: dict[str, int] = {}

    def visit(name: str, path: list[str]) -> None:
        assert state.get(name) != 1, f"circle: {' → '.join([*path, name])}"
        if state.get(name) == 2:
            return
        state[name] = 1
        for imported in sorted(graph.get(name, ())):
            visit(imported, [*path, name])
        state[name] = 2

    for name in graph:
        visit(name, [])


def test_every_module_says_what_it_does_and_what_it_does_not_know() -> None:
    for name, tree in modules().items():
        text = ast.get_docstring(tree)
        assert text, name
        if not name.endswith("__init__") and len(ast.dump(tree)) > 2000:
            words = (
                "not know",
                "knows nothing",
                "know nothing",
                "nothing about",
                "knows no",
                "does not",
                "nor ",
                "nothing",
            )
            assert any(word in text.lower() for word in words), f"{name} does not say what it does not know"


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
