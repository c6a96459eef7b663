"""Records what each client sends: runs its program against a real server, with a proxy between them that writes it down.

    make .venv-clients/.installed
    python -m tests.clients.record [CLIENT …]

Rewrites `recorded/CLIENT.json`: a list of requests, each with the scenario that sent it. Do it again when a client's new
version may send something else.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import sys
import threading
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from corral.model.loading import load_template, resolve_model
from tests.clients.programs_run import CLIENTS, run_program
from tests.clients.server import every_route

RECORDED = Path(__file__).with_name("recorded")
_HEADERS = ("accept", "content-type", "openai-beta", "x-stainless-raw-response", "x-stainless-stream-helper")
"""What a server could look at; the rest names versions and machines."""
_HOP_BY_HOP = ("connection", "content-length", "host", "transfer-encoding")


@contextlib.contextmanager
def recording(server: str) -> Generator[tuple[str, list[dict[str, Any]]]]:
    """Yields the proxy's address, with `{}` for the scenario, and the requests so far."""
    requests: list[dict[str, Any]] = []

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            scenario, _, path = self.path.lstrip("/").partition("/")
            body = self.rfile.read(int(self.headers.get("content-length", "0")))
            headers = {name: self.headers[name] for name in _HEADERS if name in self.headers}
            entry: dict[str, Any] = {
                "scenario": scenario,
                "method": self.command,
                "path": f"/{path}",
                "headers": headers,
            }
            if body:
                entry["body"] = json.loads(body)
            requests.append(entry)
            passed = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
            with contextlib.closing(http.client.HTTPConnection(urlsplit(server).netloc)) as connection:
                connection.request(self.command, f"/{path}", body or None, passed)
                entry["id"] = self._pass_on(connection.getresponse())

        do_POST = do_DELETE = do_GET

        def _pass_on(self, response: http.client.HTTPResponse) -> str | None:
            """Returns: the id of what was answered."""
            self.send_response(response.status)
            for name, value in response.headers.items():
                if name.lower() not in _HOP_BY_HOP:
                    self.send_header(name, value)
            content = response.read()
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            found = re.search(rb'"id": ?"((?:resp|conv)_\w+)"', content)
            return found[1].decode() if found else None

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (its name in the base)
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{proxy.server_address[1]}/{{}}/v1", requests
    finally:
        proxy.shutdown()
        proxy.server_close()


def name_ids(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Replace the ids that later requests use by names; the request whose response has that id keeps the name as its `id`."""
    named: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    for number, entry in enumerate(requests):
        id_ = entry.pop("id")
        text = json.dumps(entry)
        for each, name in names.items():
            text = text.replace(each, name)
        named.append(json.loads(text))
        if id_ and id_ not in names and id_ in json.dumps(requests[number + 1 :]):
            named[-1]["id"] = names[id_] = f"id-{number}"
    return named


def main() -> None:
    template = load_template(resolve_model("asset:smollm2-135m-instruct").folder)
    for client in sys.argv[1:] or CLIENTS:
        with every_route(template) as server, recording(server.url) as (address, requests):
            failed = {name: fault for name, fault in run_program(client, address).items() if fault}
        path = RECORDED / f"{client}.json"
        path.write_text(json.dumps(name_ids(requests), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{path}: {len(requests)} requests")
        for name, fault in failed.items():
            print(f"  {name}: {fault}")


if __name__ == "__main__":
    main()
