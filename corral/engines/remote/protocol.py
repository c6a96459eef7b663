"""What all have in common who speak to an OpenAI-compatible server: its address, the key, and what its errors say.

It does not know what is asked, and imports no more than the HTTP client that it is used with.
"""

from __future__ import annotations

import ipaddress
import json
import logging
from contextlib import suppress
from typing import Any

import httpx2

from corral.errors import InputError

KEY_VARIABLE = "CORRAL_API_KEY"

_log = logging.getLogger(__name__)


def api_url(given: str) -> str:
    """The URL of an API with its `/v1`, and nothing that must not be shown. Raises: InputError."""
    try:
        url = httpx2.URL(given.strip())
    except httpx2.InvalidURL as error:
        raise InputError(f"{given!r} is not a URL: {error}", hint="give one such as http://127.0.0.1:8000/v1") from None
    if url.userinfo or url.query:
        what = "a URL of an endpoint may hold no password and no query"
        raise InputError(what, where=url.host, hint=f"put the key into {KEY_VARIABLE}")
    if url.scheme not in ("http", "https") or not url.host:
        raise InputError(f"{given!r} is no http or https URL", hint="give one such as http://127.0.0.1:8000/v1")
    return str(url.copy_with(path=url.path.rstrip("/") or "/v1", fragment=None))


def auth_header(key: str | None, *urls: str) -> dict[str, str]:
    """The header that carries a key to these URLs; it is said who gets it, where that may not be meant.

    Raises:
        InputError: the key holds what no header can.
    """
    if not key:
        return {}
    if not (key.isascii() and key.isprintable()):
        raise InputError("the key holds characters that no key has", hint=f"look at {KEY_VARIABLE}")
    parts = [httpx2.URL(url) for url in urls]
    if len(hosts := sorted({part.host for part in parts})) > 1:
        _log.warning("the one key is sent to several hosts: %s", ", ".join(hosts))
    for part in parts:
        if part.scheme == "http" and not _is_local(part.host):
            _log.warning("the key is sent to %s unencrypted; https would keep it secret", part.host)
    return {"authorization": f"Bearer {key}"}


def error_message(text: str, key: str | None = None) -> str:
    """What the body of an error says, in OpenAI's form or in those that stand in for it, on one line without the key."""
    found: Any = None
    with suppress(ValueError):
        found = json.loads(text)
    for name in ("error", "message", "detail"):
        found = found.get(name, found) if isinstance(found, dict) else found
    return one_line(found if isinstance(found, str) else text, key)


def one_line(text: str, key: str | None = None) -> str:
    """One line of it, with nothing of the key, and nothing that steers a terminal."""
    shown = "".join(c for c in text if c.isprintable() or c.isspace())
    # Before it is cut: what is left of a key is not the key any more.
    line = " ".join((shown.replace(key, "***") if key else shown).split())
    return line if len(line) <= 300 else line[:297] + "…"


def _is_local(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
