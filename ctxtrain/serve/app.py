"""The routes.

    POST /predict         a row, as a line of `ctxtrain predict` takes it → label, confidence, probabilities
    POST /predict/batch   {"rows": [row, …]} → {"predictions": […]}
    GET  /health          200 while the process lives; /health/ready is 503 once it stops
    GET  /metrics         for Prometheus
    GET  /openapi.json    and /docs, a page of it that loads nothing from elsewhere

No route opens a file, and no answer depends on another request.
"""

from __future__ import annotations

import asyncio
import logging
import re
import sys
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request
from jinja2 import Environment, PackageLoader, select_autoescape
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ctxtrain.serve import schema
from ctxtrain.serve.bodies import parse_many, parse_one, read_body
from ctxtrain.serve.refusals import Refusal, draining, json_response, of_http
from ctxtrain.serve.service import Service

ROUTES = frozenset({"/predict", "/predict/batch", "/health", "/health/ready", "/metrics", "/openapi.json", "/docs"})
API_VERSION = "1"  # of routes, fields and codes; the model has its own
OWN_POLICY = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_log = logging.getLogger("ctxtrain.serve")


def make_app(service: Service, *, access_log: bool) -> ASGIApp:
    """The ASGI application around a service."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        running = asyncio.create_task(service.batcher.run())
        yield
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        service.close()

    app = FastAPI(
        title="ctxtrain",
        version=API_VERSION,
        description="Windows of market bars in, calibrated probabilities of LONG, SHORT and SKIP out.",
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    _add_predictions(app, service)
    _add_states(app, service)
    _add_documents(app, service)
    _add_errors(app)
    return _Front(app, service, access_log)


def _add_predictions(app: FastAPI, service: Service) -> None:
    limits, version = service.limits, service.predictor.version

    def processed(since: float) -> dict[str, Any]:
        return {"processing_time_ms": 1000 * (time.perf_counter() - since), "model_version": version}

    @app.post(
        "/predict",
        responses=schema.responses(schema.PredictAnswer, 400, 413, 422, 503),
        openapi_extra=schema.body({"$ref": schema.REFERENCE.format(model="Row")}),
    )
    async def predict(request: Request) -> Response:
        """Label one row."""
        with service.admitted():
            body = await read_body(request, limits.max_body_bytes)
            since = time.perf_counter()
            (prediction,) = await service.predict(await service.parse(parse_one, body))
        return json_response({**prediction, **processed(since)})

    @app.post(
        "/predict/batch",
        responses=schema.responses(schema.BatchAnswer, 400, 413, 422, 503),
        openapi_extra=schema.body({"$ref": schema.REFERENCE.format(model="Batch")}),
    )
    async def predict_batch(request: Request) -> Response:
        """Label rows, in their order; one bad row refuses all of them."""
        with service.admitted():
            body = await read_body(request, limits.max_body_bytes)
            since = time.perf_counter()
            predictions = await service.predict(await service.parse(parse_many, body, limits.queue))
        return json_response({"predictions": predictions, **processed(since)})


def _add_states(app: FastAPI, service: Service) -> None:
    wanted = schema.needs(service.predictor.codec).model_dump()

    def state() -> Response:
        return json_response(
            {
                "status": "draining" if service.draining else "ok",
                "model_version": service.predictor.version,
                "uptime_seconds": time.monotonic() - service.started,
                "waiting": len(service.batcher),
                "reads": wanted,
            }
        )

    @app.get("/health", responses=schema.responses(schema.Health))
    async def health() -> Response:
        """Whether the process lives, what it serves, and whether it is stopping."""
        return state()

    @app.get("/health/ready", responses=schema.responses(schema.Health, 503))
    async def ready() -> Response:
        """Whether it takes windows."""
        if service.draining:
            raise draining()
        return state()

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_documents(app: FastAPI, service: Service) -> None:
    document = app.openapi()  # of the routes above
    most = f"At most {service.limits.queue:,}, or the answer is 413."
    row = {"$ref": schema.REFERENCE.format(model="Row")}
    rows = {"type": "array", "items": row, "minItems": 1, "description": most}
    batch = {"type": "object", "properties": {"rows": rows}, "required": ["rows"]}
    document["components"]["schemas"] |= schema.row_schemas(service.predictor.codec) | {"Batch": batch}
    pages = Environment(loader=PackageLoader("ctxtrain.serve", "."), autoescape=select_autoescape(default=True))
    page = pages.get_template("docs.html.j2").render(document=document, errors=schema.WHY)

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return json_response(document)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(page, headers=OWN_POLICY)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Refusal)
    async def refused(_request: Request, refusal: Refusal) -> Response:
        return refusal.response()

    @app.exception_handler(HTTPException)
    async def odd(_request: Request, error: HTTPException) -> Response:
        return of_http(error.status_code, error.detail, error.headers).response()

    @app.exception_handler(Exception)
    async def fault(request: Request, _error: Exception) -> Response:
        """The server around it prints the traceback."""
        name = request.scope["state"]["request_id"]
        _log.error("internal fault in request %s", name)
        return Refusal(
            500, "internal", f"internal fault, not yours; the server's log has it as request {name}"
        ).response()


class _Front:
    """Around everything, so that each answer, whoever gives it, has its request id and is counted."""

    def __init__(self, app: ASGIApp, service: Service, access_log: bool) -> None:
        self.app = app
        self.service = service
        self.access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        since, status = time.perf_counter(), 500
        given = Headers(scope=scope).get("x-request-id", "")
        name = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = name

        async def marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = name
                if self.service.draining:
                    headers["Connection"] = "close"
            await send(message)

        try:
            await self.app(scope, receive, marked)
        finally:
            self._count(scope, name, status, time.perf_counter() - since)

    def _count(self, scope: Scope, name: str, status: int, seconds: float) -> None:
        route = scope["path"] if scope["path"] in ROUTES else "other"
        self.service.metrics.requests.labels(route, status).inc()
        self.service.metrics.request_seconds.labels(route).observe(seconds)
        if self.access_log:
            with suppress(OSError):  # a log that nobody can take must not cost an answer
                print(f"{name} {scope['method']} {route} {status} {1000 * seconds:.1f} ms", file=sys.stderr, flush=True)
