"""The ASGI application: routes for models, health and metrics, middleware, and errors in OpenAI's form.

It is built from its dependencies and holds no settings. A route that needs an engine passes a function that starts the work
to `Admission.handle`, which decides when to start it and when to stop it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection, Sequence
from typing import Literal

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import corral
from corral.errors import DatabaseError
from corral.serving import tokens
from corral.serving.accounts import RATE_LIMIT_HEADERS
from corral.serving.admission import Admission
from corral.serving.chat import ChatRequest, start_chat
from corral.serving.completions import start_completions
from corral.serving.docs_page import HEADERS as DOCS_HEADERS
from corral.serving.docs_page import render_docs
from corral.serving.errors import database_unavailable, engine_unavailable, shutting_down
from corral.serving.generation import choice_count
from corral.serving.metrics import CONTENT_TYPE
from corral.serving.middleware import AccessMiddleware, ResponseMiddleware
from corral.serving.models import ServedModels
from corral.serving.protocol import ModelList, Refused, validation_error
from corral.serving.request_fields import NOTE_HEADERS, report
from corral.serving.streams import error_response, json_response
from corral.serving.text_choices import CompletionRequest

_HTTP_MESSAGES = {404: "there is no such route", 405: "this route has no such method"}


def build_app(
    models: ServedModels,
    admission: Admission,
    *,
    routers: Sequence[APIRouter] = (),
    hosts: Collection[str] = ("*",),
    cors: Sequence[str] = (),
    root_path: str = "",
) -> FastAPI:
    """Build the application. The caller closes `models` and `admission`.

    Args:
        routers: further routes.
        hosts: accepted `Host` headers (see `AccessMiddleware`).
        cors: origins whose pages may send requests, as `https://host`.
        root_path: the path under which a proxy serves the application, whether it passes it on or not.
    """
    app = FastAPI(
        title="corral",
        version=corral.__version__,
        openapi_url=None,  # FastAPI's pages load scripts from other hosts: see `_document_routes`
        servers=[{"url": root_path}] if root_path else None,
        redirect_slashes=False,
        strict_content_type=True,  # a page of another origin can send an untyped body without a preflight, but not JSON
    )
    body_bytes = max(served.limits.body_bytes for served in models.all())
    # The middleware added last runs first.
    app.add_middleware(AccessMiddleware, admission=admission, body_bytes=body_bytes, hosts=hosts)
    if cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=cors,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after", "x-corral-client", *NOTE_HEADERS, *RATE_LIMIT_HEADERS],
        )
    app.add_middleware(ResponseMiddleware, admission=admission, root_path=root_path)
    _handle_errors(app)
    app.include_router(_model_routes(models, admission))
    app.include_router(tokens.build_router(models))
    app.include_router(_status_routes(models, admission))
    app.include_router(_document_routes(app))
    for router in routers:
        app.include_router(router)
    return app


def _model_routes(models: ServedModels, admission: Admission) -> APIRouter:
    """Chat, completions and the list of models."""
    router = APIRouter(prefix="/v1")

    @router.post("/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        served = models.get(body.model)
        response = await admission.handle(
            request,
            lambda reserve: start_chat(served, body, reserve),
            stream=bool(body.stream),
            model=served.name,
            choices=choice_count(served, body),
            hold=models.use(served),
        )
        return report(body.notes, response)

    @router.post("/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        served = models.get(body.model)
        response = await admission.handle(
            request,
            lambda reserve: start_completions(served, body, reserve),
            stream=bool(body.stream),
            model=served.name,
            choices=min(served.limits.choices, len(body.prompt) * (body.n or 1)),
            hold=models.use(served),
        )
        return report(body.notes, response)

    @router.get("/models")
    async def listed() -> Response:  # pyright: ignore[reportUnusedFunction]
        return json_response(ModelList(data=models.list_entries(admission.limits.at_once)))

    @router.get("/models/{name:path}")
    async def one(name: str) -> Response:  # pyright: ignore[reportUnusedFunction]
        for model in models.list_entries(admission.limits.at_once):
            if model.id == name:
                return json_response(model)
        raise Refused(404, f"the model {name!r} does not exist", param="model", code="model_not_found")

    return router


class Version(BaseModel):
    """The response of `/version`."""

    version: str


class Health(BaseModel):
    """The response of `/health`, which needs no key."""

    status: Literal["ok"] = "ok"


class EngineHealth(BaseModel):
    """The state of one engine."""

    engine: str
    ready: bool
    reason: str | None
    """Why it is not ready."""
    restarts: int
    """How often its process was started again."""


class Readiness(BaseModel):
    """The response of `/health/ready`, which needs no key, and so names no model, path or address."""

    status: Literal["ready", "not ready"]
    engines: list[EngineHealth]


def _readiness(models: ServedModels) -> Readiness:
    """Whether each engine can compute, in the order of `/v1/models`; models may share an engine."""
    engines = {id(each.answerer.engine): each.answerer.engine for each in models.all()}.values()
    states = [
        EngineHealth(engine=each.name, ready=fault is None, reason=fault, restarts=each.restarts)
        for each in engines
        for fault in [each.fault]
    ]
    return Readiness(status="ready" if all(state.ready for state in states) else "not ready", engines=states)


def _status_routes(models: ServedModels, admission: Admission) -> APIRouter:
    """Health and metrics."""
    router = APIRouter()

    admission.metrics.watch(lambda: {served.name: served.answerer.engine for served in models.all()})

    @router.head("/health", include_in_schema=False)
    @router.get("/health")
    async def alive() -> Response:  # pyright: ignore[reportUnusedFunction]
        return json_response(Health())

    @router.get("/health/ready")
    async def ready() -> Response:  # pyright: ignore[reportUnusedFunction]
        if admission.is_draining:
            raise shutting_down()
        readiness = _readiness(models)
        if readiness.status == "ready":
            return json_response(readiness)
        return json_response(readiness, status=503, headers=engine_unavailable("").headers)

    @router.get("/metrics")
    async def metrics(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        if not request.state.caller.is_admin:
            raise Refused(
                403, "only keys that were added with --admin may read the metrics of all keys", code="not_admin"
            )
        return Response(await asyncio.to_thread(admission.metrics.render), headers={"content-type": CONTENT_TYPE})

    @router.get("/version")
    async def version() -> Response:  # pyright: ignore[reportUnusedFunction]
        return json_response(Version(version=corral.__version__))

    return router


def _document_routes(app: FastAPI) -> APIRouter:
    """The OpenAPI document, for programs and for people. Making it takes a while, so a thread does it."""
    router = APIRouter(include_in_schema=False)

    @router.get("/openapi.json")
    async def document() -> Response:  # pyright: ignore[reportUnusedFunction]
        text = await asyncio.to_thread(lambda: json.dumps(app.openapi()))
        return Response(text, media_type="application/json")

    @router.get("/docs")
    async def page() -> Response:  # pyright: ignore[reportUnusedFunction]
        text = await asyncio.to_thread(lambda: render_docs(app.openapi()))
        return Response(text, headers=DOCS_HEADERS, media_type="text/html")

    return router


def _handle_errors(app: FastAPI) -> None:
    """Give every expected error OpenAI's form; `ResponseMiddleware` handles all others."""

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return error_response(error)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(validation_error(error.errors()))

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = _HTTP_MESSAGES.get(error.status_code, str(error.detail))
        return error_response(Refused(error.status_code, what), error.headers)

    async def no_database(request: Request, error: Exception) -> Response:
        return error_response(database_unavailable())

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(DatabaseError, no_database)
