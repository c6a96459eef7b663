"""The document on security names a test for each rule: they are all there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs/security.md").read_text("utf-8")


def test_every_test_named_in_the_document_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", DOCUMENT)
    assert len(named) > 40
    functions: dict[str, set[str]] = {}
    for path, name in named:
        if path not in functions:
            tree = ast.parse((ROOT / path).read_text("utf-8"))
            functions[path] = {
                node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            }
        assert name in functions[path], f"{path}::{name}"


def test_every_rule_has_a_test() -> None:
    rules = [line for line in DOCUMENT.splitlines() if line.startswith("| ") and "| rule |" not in line]
    held = [line for line in rules if line.count("|") == 4 and "::" in line]
    dependencies = DOCUMENT.partition("## Dependencies")[2]
    assert len(held) == len([line for line in rules if line not in dependencies]) > 20
