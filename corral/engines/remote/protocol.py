"""The address, the key and the error messages of an OpenAI-compatible server.

The chat client uses this module on machines that have neither torch nor OpenAI's package: it imports the HTTP client only.
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
CONNECT_SECONDS = 10.0
MAX_ERROR_BYTES = 2**16
"""The most that is read of the body of an error response."""
NOT_OPENAI = "is this the address of an OpenAI-compatible server? It usually ends in /v1"

_log = logging.getLogger(__name__)


def api_url(given: str) -> str:
    """The URL of an API, with `/v1` where it has no path. Raises: InputError, which does not show a password in it."""
    try:
        url = httpx2.URL(given.strip())
    except httpx2.InvalidURL as error:
        raise InputError(f"{given!r} is not a URL: {error}", hint="give one such as http://127.0.0.1:8000/v1") from None
    if url.userinfo or url.query:
        what = "a URL of an endpoint may hold no password and no query"
        raise InputError(what, where=url.host, hint=f"put the key into {KEY_VARIABLE}")
    if url.scheme not in ("http", "https") or not url.host:
        raise InputError(f"{given!r} is not an http or https URL", hint="give one such as http://127.0.0.1:8000/v1")
    return str(url.copy_with(path=url.path.rstrip("/") or "/v1", fragment=None))


def auth_header(key: str | None, *urls: str) -> dict[str, str]:
    """The header that sends a key to these URLs. Logs a warning if they are on several hosts, or not encrypted.

    Raises:
        InputError: the key holds characters that a header cannot carry.
    """
    if not key:
        return {}
    if not (key.isascii() and key.isprintable()):
        raise InputError("the key holds characters that no key has", hint=f"look at {KEY_VARIABLE}")
    parts = [httpx2.URL(url) for url in urls]
    if len(hosts := sorted({part.host for part in parts})) > 1:
        _log.warning("the one key is sent to several hosts: %s", ", ".join(hosts))
    for part in parts:
        if part.scheme == "http" and not _is_loopback(part.host):
            _log.warning("the key is sent to %s unencrypted; https would keep it secret", part.host)
    return {"authorization": f"Bearer {key}"}


def error_message(body: str, key: str | None = None) -> str:
    """The message in the body of an error response (OpenAI's form or similar ones), on one line, without the key."""
    content: Any = None
    with suppress(ValueError, RecursionError):
        content = json.loads(body)
    for name in ("error", "message", "detail"):
        content = content.get(name, content) if isinstance(content, dict) else content
    return one_line(content if isinstance(content, str) else body, key)


def one_line(text: str, key: str | None = None) -> str:
    """At most 300 characters of a text on one line, without the key and without control characters."""
    printable = "".join(c for c in text if c.isprintable() or c.isspace())
    # The key is removed before the text is cut: a part of a key would not be recognised.
    line = " ".join((printable.replace(key, "***") if key else printable).split())
    return line if len(line) <= 300 else line[:297] + "…"


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
