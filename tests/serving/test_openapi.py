"""The server against its own OpenAPI document: what has that form, and what nearly has it, is answered, never with a fault.

Cases are drawn by schemathesis from the document, the same each time.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import httpx2
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from numpy.typing import NDArray
from schemathesis import GenerationMode

from corral.engines.embedding import ASSET, DIMENSIONS, Embedder
from corral.engines.scripted import ScriptedEngine
from corral.serving import embeddings, responses
from corral.serving.admission import Admission, ServerLimits
from corral.serving.database import Database
from corral.serving.keys import KeyStore
from corral.serving.models import ServedModels
from tests.serving.conftest import RunningServer, Serve, bearer

_MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
_HANGS_SECONDS = 60  # far over the server's own bound


class Same(Embedder):
    """Finds the same in every text, without weights."""

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return [[1] * len(text) for text in texts]

    def embed_ids(self, windows: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        return np.full((len(windows), DIMENSIONS), DIMENSIONS**-0.5)


@pytest.fixture
def server(serve: Serve, sqlite: Database) -> tuple[RunningServer, dict[str, str]]:
    """A server with every route, and the header that opens it."""
    models = ServedModels([serve.model(ScriptedEngine([40] * 3))], Same())
    _, secret = KeyStore(sqlite).add("alice")
    admission = Admission(ServerLimits(max_seconds=20), KeyStore(sqlite))
    routers = [
        responses.build_router(models, sqlite, admission),
        embeddings.build_router(models, admission),
    ]
    return serve(models, admission, routers=routers), bearer(secret)


def check(answer: Any) -> None:
    """What every answer is."""
    assert answer.headers["x-request-id"]
    if answer.status_code >= 500:
        assert answer.status_code == 503, answer.text
        assert int(answer.headers["retry-after"]) >= 1
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]


@pytest.mark.parametrize("cases", [200, pytest.param(10_000, marks=pytest.mark.full)])
def test_generated_requests_never_cause_a_server_error(
    cases: int, server: tuple[RunningServer, dict[str, str]]
) -> None:
    running, key = server
    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json", headers=key)
    operations: list[Any] = [result.ok() for result in schema.get_all_operations()]  # pyright: ignore[reportAttributeAccessIssue]
    assert len(operations) > 15
    statuses: Counter[int] = Counter()
    served: set[str] = set()
    # What takes no body has no wrong form, and fewer good ones, which may be drawn up before its share is.
    kinds = [(each, mode) for each in operations for mode in _MODES if each.body or mode is GenerationMode.POSITIVE]
    shares = [10 if each.body else 3 if each.path_parameters or each.query else 1 for each, _ in kinds]
    for (operation, mode), share in zip(kinds, shares, strict=True):
        _try(operation, mode, 3 + int(1.1 * cases * share / sum(shares)), key, statuses, served)
    assert sum(statuses.values()) >= cases
    assert statuses[200] > cases / 20, statuses
    assert statuses[400] > cases / 20, statuses
    for path in ("chat/completions", "completions", "conversations", "embeddings"):
        assert f"/v1/{path}" in served


def _try(
    operation: Any,
    mode: GenerationMode,
    examples: int,
    key: dict[str, str],
    statuses: Counter[int],
    served: set[str],
) -> None:
    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def one(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            # Else nearly all of them would end at a model that is not there.
            case.body["model"] = ASSET if operation.path == "/v1/embeddings" else "m"
        answer = case.call(headers=key, timeout=_HANGS_SECONDS)
        statuses[answer.status_code] += 1
        if answer.status_code == 200:
            served.add(operation.path)
        check(answer)

    one()


def test_the_openapi_document_and_its_page_need_a_key_and_load_nothing_from_elsewhere(
    server: tuple[RunningServer, dict[str, str]],
) -> None:
    running, key = server
    assert running.call("GET", "/openapi.json")[0] == 401
    status, document, _ = running.call("GET", "/openapi.json", headers=key)
    assert status == 200
    assert "/v1/chat/completions" in document["paths"]
    assert "http" not in json.dumps(document["paths"])
    assert running.call("GET", "/docs")[0] == 401
    page = httpx2.get(f"{running.url}/docs", headers=key)
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    for path, operations in document["paths"].items():
        for method in operations:
            assert f"<code>{method.upper()} {path}</code>" in page.text
    for name in document["components"]["schemas"]:
        assert f'<h3 id="{name}">' in page.text
    assert not re.search(r"<(script|link|img|iframe)|\b(src|on\w+)=|https?:|//", page.text)
    (style,) = re.findall("<style>(.*?)</style>", page.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in page.headers["content-security-policy"]
    assert "default-src 'none'" in page.headers["content-security-policy"]
