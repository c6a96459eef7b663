"""Tells apart the clients of a server without keys, so that each lists the conversations that it began, and no others.

The id of a conversation or response is 128 random bits: who has it may read, continue, change and delete what it names, on a
server without keys. Only the list of conversations tells ids, so only the list needs to know who asks. A client's first
request for conversations is answered with a token: browsers keep it as a cookie, which scripts cannot read and other sites
cannot send; programs may send it back in the header `x-corral-client`. A program that does not is a new client each time,
and works with ids. With keys, the key says who asks, and there are no tokens.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from typing import NamedTuple

from fastapi import Request, Response

HEADER = "x-corral-client"
_COOKIE = "corral_client"
_COOKIE_SECONDS = 400 * 86400  # as long as browsers keep any cookie
_TOKEN = re.compile(r"[0-9a-f]{32}")


class Client(NamedTuple):
    """A browser or program."""

    id: str
    """A hash of its token; empty for the owner of a key."""
    new_token: str | None
    """The token, if it had none."""
    path: str
    """The path below which a browser sends the token."""

    @classmethod
    def of(cls, request: Request) -> Client:
        """The client that sent a request, by its header, else its cookie."""
        path = f"{request.scope.get('root_path', '')}/v1/conversations"
        if request.state.caller.key_id:
            return cls("", None, path)
        token = request.headers.get(HEADER) or request.cookies.get(_COOKIE) or ""
        new = None if _TOKEN.fullmatch(token) else secrets.token_hex(16)
        return cls(hashlib.sha256((new or token).encode()).hexdigest()[:32], new, path)

    def introduce(self, response: Response) -> Response:
        """Give a new client its token. Returns: the response."""
        if self.new_token is not None:
            response.headers[HEADER] = self.new_token
            response.set_cookie(
                _COOKIE, self.new_token, max_age=_COOKIE_SECONDS, path=self.path, httponly=True, samesite="lax"
            )
        return response
