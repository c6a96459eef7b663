"""The verbs serve and keys."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin

from corral.cli.terminal import show
from corral.errors import InputError

if TYPE_CHECKING:
    from corral.recipe.serve import Serve
    from corral.serving.database import Database
    from corral.serving.keys import Key, KeyStore, KeyUsage


def add_serve(sub: argparse.ArgumentParser, models: str) -> None:
    """Add the arguments of `corral serve`: the models, and a flag for each setting of `[serve]`."""
    from corral.recipe.serve import Serve

    sub.add_argument("model", nargs="+", help=f"{models}; or NAME=MODEL to choose the name that clients use")
    for name, field in Serve.model_fields.items():
        default = "" if field.default in (None, False, ()) else f" (default: {field.default or 'none'})"
        text = f"{' '.join((field.description or '').split())}{default}".replace("%", "%%")
        sub.add_argument(_flag(name), dest=name, help=text, **_argument_type(field.annotation))
    file = "a file of further keys, a line NAME=SECRET each, read again when it changes; also in CORRAL_API_KEYS"
    sub.add_argument("--keys-file", type=Path, metavar="FILE", help=file)


def _flag(setting: str) -> str:
    return f"--{setting.replace('_', '-')}"


def _argument_type(annotation: Any) -> dict[str, Any]:
    """How argparse reads a setting of this type. What is not given is None, and pydantic checks the rest."""
    if annotation is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(annotation) is tuple:
        return {"action": "append", "metavar": "TEXT"}
    kinds = [kind for kind in get_args(annotation) or (annotation,) if kind is not type(None)]
    if choices := [choice for kind in kinds for choice in get_args(kind) or (kind,) if isinstance(choice, str)]:
        return {"choices": choices}
    kind = next((kind for kind in kinds if kind in (int, float)), str)
    return {"type": kind, "metavar": {int: "N", float: "SECONDS", str: "TEXT"}[kind]}


def add_keys(sub: Any, *, positive: Any) -> None:
    """Add the arguments of `corral keys`."""
    sub.add_argument(
        "action", choices=("add", "list", "revoke", "delete"), nargs="?", default="list", help="default: list"
    )
    sub.add_argument(
        "name", nargs="?", help="the name of the key to add; the name or id of the key to revoke or delete"
    )
    sub.add_argument(
        "--requests-per-minute", type=positive, metavar="N", help="the most requests per minute (default: no limit)"
    )
    day = "the most tokens of prompts and answers per day, UTC (default: no limit)"
    sub.add_argument("--tokens-per-day", type=positive, metavar="N", help=day)
    sub.add_argument("--at-once", type=positive, metavar="N", help="the most requests at once (default: no limit)")
    sub.add_argument("--days", type=positive, metavar="N", help="days until it expires (default: never)")
    sub.add_argument("--admin", action="store_true", default=None, help="it may read metrics and load adapters")
    _add_database(sub, "of the server", "")


def _add_database(sub: Any, what: str, more: str) -> None:
    file = f"the database {what} (default: a SQLite file in ~/.local/share/corral{more})"
    sub.add_argument("--database", metavar="URL", help=file)


def serve(args: argparse.Namespace) -> None:
    """Serve models over HTTP with the OpenAI protocol."""
    from corral.serving.admission import ServerLimits
    from corral.serving.database import default_url
    from corral.serving.model_loading import ModelOptions
    from corral.serving.protocol import RequestLimits
    from corral.serving.server import ListenOptions
    from corral.serving.server import serve as listen

    settings = _serve_settings(args)
    listen(
        ModelOptions(
            args.model,
            settings.engine,
            settings.url,
            settings.name,
            settings.alias,
            embeddings=settings.embeddings,
            follow=settings.follow,
            adapters=Path(settings.adapters) if settings.adapters is not None else None,
            limits=RequestLimits(strict=settings.strict),
        ),
        ListenOptions(
            settings.host,
            settings.port,
            settings.insecure,
            settings.cors,
            allowed_hosts=settings.allowed_host,
            root_path=settings.root_path,
            log_level=settings.log_level,
            keys_file=args.keys_file,
        ),
        ServerLimits(
            at_once=settings.at_once,
            waiting=settings.waiting,
            max_seconds=settings.max_seconds,
            keep_alive_seconds=settings.keep_alive,
        ),
        None if settings.database == "none" else settings.database or default_url(),
    )


def _serve_settings(args: argparse.Namespace) -> Serve:
    """`[serve]` of the only model's run, if it is a run's, with the flags in its place. Raises: InputError."""
    from pydantic import ValidationError

    from corral.answering.settings import find_run
    from corral.recipe.serve import Serve
    from corral.serving.model_loading import split_name

    given = {name: value for name in Serve.model_fields if (value := getattr(args, name)) is not None}
    run = find_run(split_name(args.model[0])[1]) if len(args.model) == 1 else None
    settings = run.recipe.serve if run else Serve()
    if run and (changes := settings.changes()):
        kept = [f"{name} = {value!r}" for name, value in changes.items() if name not in given]
        print(f"[serve] of {run.path}: {', '.join(kept) or 'replaced by flags'}", file=sys.stderr)
    try:
        return settings.with_flags(given)
    except ValidationError as error:
        first = error.errors()[0]
        name, own = str(first["loc"][0]), first.get("ctx", {}).get("error")
        raise InputError(
            f"{first['input']!r}: {first['msg']}" if own is None else str(own),
            where=_flag(name),
            hint="`corral serve --help` says what it takes",
        ) from None


def keys(args: argparse.Namespace) -> dict[str, Any]:
    """Add, list, revoke or delete API keys of a server."""
    from corral.serving.database import Database, default_url
    from corral.serving.keys import KeyStore, today

    quotas = (args.requests_per_minute, args.tokens_per_day, args.at_once, args.days, args.admin)
    if args.action != "add" and any(value is not None for value in quotas):
        raise InputError(
            "the limits of a key are given when it is added", where=f"keys {args.action}", hint="corral keys add NAME …"
        )
    if (args.action == "list") == bool(args.name):
        what = f"{args.name!r} is given, and `list` takes no name" if args.name else "no key is named"
        raise InputError(what, where=f"keys {args.action}", hint="corral keys add NAME, or revoke NAME, or delete NAME")
    with contextlib.closing(Database(args.database or default_url())) as database:
        held = KeyStore(database)
        match args.action:
            case "add":
                return _add(held, args)
            case "revoke":
                key = held.revoke(args.name)
                print(f"revoked {key.name} ({key.id}); running servers refuse it within seconds")
                return {"revoked": key.id, "name": key.name}
            case "delete":
                return _delete(held, database, args.name)
            case _:
                return _list(held.all(), held.usage_on(today()))


def _add(held: KeyStore, args: argparse.Namespace) -> dict[str, Any]:
    from corral.serving.keys import Quota

    quota = Quota(args.requests_per_minute, args.tokens_per_day, args.at_once)
    expires = None if args.days is None else int(time.time()) + args.days * 86400
    key, secret = held.add(args.name, quota, expires=expires, is_admin=bool(args.admin))
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


def _delete(held: KeyStore, database: Database, name: str) -> dict[str, Any]:
    from corral.serving.conversation_store import ConversationStore

    key = held.find_inactive(name)
    conversations, responses = ConversationStore(database).delete_all(key.id)
    held.delete(key)  # last, so that a deletion that was interrupted can be repeated
    print(f"deleted {key.name} ({key.id}), its usage, {conversations} conversations and {responses} other responses")
    if not held.all():
        print("no key is left, so a server that starts with this database needs none", file=sys.stderr)
    return {"deleted": key.id, "name": key.name, "conversations": conversations, "responses": responses}


def _list(api_keys: list[Key], used: dict[str, KeyUsage]) -> dict[str, Any]:
    from rich.table import Table

    from corral.serving.keys import KeyUsage

    rows: list[dict[str, Any]] = [
        {
            "name": key.name,
            "id": key.id,
            "created": key.created,
            "expires": key.expires,
            "revoked": key.revoked,
            "works": key.is_active,
            "admin": key.is_admin,
            **asdict(key.quota),
            "tokens_today": used.get(key.id, KeyUsage()).tokens,
        }
        for key in api_keys
    ]
    table = Table("name", "id", "state", "a minute", "tokens a day", "at once", "tokens today", box=None)
    for row in rows:
        state = "revoked" if row["revoked"] else "expired" if not row["works"] else "admin" if row["admin"] else "works"
        limits = (row["requests_per_minute"], row["tokens_per_day"], row["at_once"])
        figures = ("–" if limit is None else f"{limit:,}" for limit in limits)
        table.add_row(row["name"], row["id"], state, *figures, f"{row['tokens_today']:,}")
    show(table)
    return {"keys": rows}
