"""A real server with every route on a loopback socket, whose model `m` answers `ANSWER` to everything."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Generator

from corral.engines.base import OPTIONAL_SAMPLING, Features
from corral.engines.embedding import Embedder
from corral.engines.scripted import ScriptedEngine
from corral.serving import embeddings, responses
from corral.serving.admission import Admission, ServerLimits
from corral.serving.database import Database
from corral.serving.models import ServedModels
from corral.template import Template
from tests.serving.conftest import RunningServer, Serve

ANSWER = "Two plus two is four."
FEATURES = Features(max_length=4096, vocabulary=2**20, logprobs=True, score=True, honours=frozenset(OPTIONAL_SAMPLING))


@contextlib.contextmanager
def every_route(template: Template, limits: ServerLimits | None = None) -> Generator[RunningServer]:
    """Serve with a database of its own and without keys."""
    with contextlib.ExitStack() as stack:
        serve = Serve(template, stack)
        ids = template.tokenizer.backend_tokenizer.encode(ANSWER, add_special_tokens=False).ids
        models = ServedModels([serve.model(ScriptedEngine(ids, features=FEATURES))], Embedder())
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        database = stack.enter_context(contextlib.closing(Database(f"sqlite:///{folder}/server.db")))
        admission = Admission(limits or ServerLimits())
        routers = [
            responses.build_router(models, database, admission),
            embeddings.build_router(models, admission),
        ]
        yield serve(models, admission, routers=routers)
