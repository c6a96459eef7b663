"""The verbs serve and keys."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from corral.cli.terminal import show
from corral.errors import InputError

if TYPE_CHECKING:
    from corral.serving.api_keys import Key, KeyUsage


def add_serve(sub: Any, *, models: str, engines: tuple[str, ...], positive: Any) -> None:
    """Add the arguments of `corral serve`."""
    sub.add_argument("model", nargs="+", help=f"{models}; or NAME=MODEL to choose the name that clients use")
    sub.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: 127.0.0.1, this machine)")
    sub.add_argument("--port", type=int, default=8000, help="default: 8000; 0 takes any free port")
    engine = "the engine that computes answers (default: the best one for this machine)"
    sub.add_argument("--engine", choices=engines, help=engine)
    sub.add_argument("--name", help="the name that clients use, for a single model (default: the run's name)")
    url = "an endpoint that serves the models and computes in place of this machine; can be repeated, for replicas"
    sub.add_argument("--url", action="append", default=[], help=url)
    sub.add_argument("--embeddings", action="store_true", help="also serve /v1/embeddings")
    _add_database(sub, "of keys and conversations", "; `none`: keep neither")
    sub.add_argument(
        "--insecure", action="store_true", help="allow an address that other machines can reach although no key exists"
    )
    cors = "allow requests from pages of this origin, e.g. https://chat.example.org; can be repeated"
    sub.add_argument("--cors", action="append", default=[], metavar="ORIGIN", help=cors)
    sub.add_argument("--at-once", type=positive, metavar="N", help="requests that are processed at once (default: 128)")
    sub.add_argument("--waiting", type=int, metavar="N", help="requests that may wait in the queue (default: 512)")
    seconds = "the longest a request may take, including the queue (default: 600)"
    sub.add_argument("--max-seconds", type=float, metavar="S", help=seconds)


def add_keys(sub: Any, *, positive: Any) -> None:
    """Add the arguments of `corral keys`."""
    sub.add_argument("action", choices=("add", "list", "revoke"), nargs="?", default="list", help="default: list")
    sub.add_argument("name", nargs="?", help="the name of the key to add; the name or id of the key to revoke")
    sub.add_argument(
        "--requests-per-minute", type=positive, metavar="N", help="the most requests per minute (default: no limit)"
    )
    day = "the most tokens of prompts and answers per day, UTC (default: no limit)"
    sub.add_argument("--tokens-per-day", type=positive, metavar="N", help=day)
    sub.add_argument("--at-once", type=positive, metavar="N", help="the most requests at once (default: no limit)")
    sub.add_argument("--days", type=positive, metavar="N", help="days until it expires (default: never)")
    _add_database(sub, "of the server", "")


def _add_database(sub: Any, what: str, more: str) -> None:
    file = f"the database {what} (default: a SQLite file in ~/.local/share/corral{more})"
    sub.add_argument("--database", metavar="URL", help=file)


def serve(args: argparse.Namespace) -> None:
    """Serve models over HTTP with the OpenAI protocol."""
    from corral.serving.admission import ServerLimits
    from corral.serving.database import default_url
    from corral.serving.server import ListenOptions, ModelOptions
    from corral.serving.server import serve as listen

    given = {"at_once": args.at_once, "waiting": args.waiting, "max_seconds": args.max_seconds}
    for name, value in given.items():
        if value is not None and (value < 0 or value != value or (value == 0 and name == "max_seconds")):
            raise InputError(
                f"{value} is not allowed", where=f"--{name.replace('_', '-')}", hint="give a greater number"
            )
    listen(
        ModelOptions(args.model, args.engine, args.url, args.name, args.embeddings),
        ListenOptions(args.host, args.port, args.insecure, args.cors),
        ServerLimits(**{name: value for name, value in given.items() if value is not None}),
        None if args.database == "none" else args.database or default_url(),
    )


def keys(args: argparse.Namespace) -> dict[str, Any]:
    """Add, list or revoke API keys of a server."""
    from corral.serving.api_keys import KeyStore, today
    from corral.serving.database import Database, default_url

    quotas = (args.requests_per_minute, args.tokens_per_day, args.at_once, args.days)
    if args.action != "add" and any(value is not None for value in quotas):
        raise InputError(
            "the limits of a key are given when it is added", where=f"keys {args.action}", hint="corral keys add NAME …"
        )
    if (args.action == "list") == bool(args.name):
        what = f"{args.name!r} is given, and `list` takes no name" if args.name else "no key is named"
        raise InputError(what, where=f"keys {args.action}", hint="corral keys add NAME, or corral keys revoke NAME")
    with contextlib.closing(Database(args.database or default_url())) as database:
        held = KeyStore(database)
        match args.action:
            case "add":
                return _add(held, args)
            case "revoke":
                key = held.revoke(args.name)
                print(f"revoked {key.name} ({key.id}); running servers refuse it within seconds")
                return {"revoked": key.id, "name": key.name}
            case _:
                return _list(held.all(), held.usage_on(today()))


def _add(held: Any, args: argparse.Namespace) -> dict[str, Any]:
    from corral.serving.api_keys import Quota

    quota = Quota(args.requests_per_minute, args.tokens_per_day, args.at_once)
    expires = None if args.days is None else int(time.time()) + args.days * 86400
    key, secret = held.add(args.name, quota, expires=expires)
    if not args.json:
        print(
            f"{key.name} ({key.id}): this is shown only once and not stored; send it as `Authorization: Bearer KEY`",
            file=sys.stderr,
        )
        print(secret)
        if len(held.all()) == 1:
            what = "from now on a server with this database refuses requests without a key; conversations and responses"
            print(f"{what} begun without a key belong to no key and cannot be read any more", file=sys.stderr)
    return {"name": key.name, "id": key.id, "key": secret}


def _list(api_keys: list[Key], used: dict[str, KeyUsage]) -> dict[str, Any]:
    from rich.table import Table

    from corral.serving.api_keys import KeyUsage

    rows: list[dict[str, Any]] = [
        {
            "name": key.name,
            "id": key.id,
            "created": key.created,
            "expires": key.expires,
            "revoked": key.revoked,
            "works": key.is_active,
            **asdict(key.quota),
            "tokens_today": used.get(key.id, KeyUsage()).tokens,
        }
        for key in api_keys
    ]
    table = Table("name", "id", "state", "a minute", "tokens a day", "at once", "tokens today", box=None)
    for row in rows:
        state = "works" if row["works"] else "revoked" if row["revoked"] else "expired"
        limits = (row["requests_per_minute"], row["tokens_per_day"], row["at_once"])
        figures = ("–" if limit is None else f"{limit:,}" for limit in limits)
        table.add_row(row["name"], row["id"], state, *figures, f"{row['tokens_today']:,}")
    show(table)
    return {"keys": rows}
