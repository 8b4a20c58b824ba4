"""The ASGI application and its routes.

    POST /predict         a row, in the format of `ctxtrain predict` → label, confidence, probabilities
    POST /predict/batch   {"rows": [row, …]} → {"predictions": […]}
    GET  /health          200 while the process runs; /health/ready is 503 while the server drains
    GET  /metrics         Prometheus metrics
    GET  /openapi.json    the OpenAPI document; /docs is the same as a page without external resources

No route opens a file, and no response depends on another request.
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
from ctxtrain.serve.refusals import Refusal, from_http_error, json_response, server_draining
from ctxtrain.serve.service import Service

ROUTES = frozenset({"/predict", "/predict/batch", "/health", "/health/ready", "/metrics", "/openapi.json", "/docs"})
API_VERSION = "1"  # of routes, fields and error codes, not of the model
CONTENT_POLICY = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_log = logging.getLogger("ctxtrain.serve")


def make_app(service: Service, *, access_log: bool) -> ASGIApp:
    """The ASGI application around a service."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        batching = asyncio.create_task(service.batcher.run())
        yield
        batching.cancel()
        with suppress(asyncio.CancelledError):
            await batching
        service.close()

    app = FastAPI(
        title="ctxtrain",
        version=API_VERSION,
        description="Windows of market bars in, calibrated probabilities of LONG, SHORT and SKIP out.",
        docs_url=None,  # FastAPI's page loads scripts from a CDN
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    _add_prediction_routes(app, service)
    _add_status_routes(app, service)
    _add_document_routes(app, service)
    _add_error_handlers(app)
    return _RequestMiddleware(app, service, access_log)


def _add_prediction_routes(app: FastAPI, service: Service) -> None:
    limits, version = service.limits, service.predictor.version

    def response_metadata(since: float) -> dict[str, Any]:
        return {"processing_time_ms": 1000 * (time.perf_counter() - since), "model_version": version}

    @app.post(
        "/predict",
        responses=schema.responses(schema.PredictAnswer, 400, 413, 422, 503),
        openapi_extra=schema.body({"$ref": schema.REFERENCE.format(model="Row")}),
    )
    async def predict(request: Request) -> Response:
        """Predict the label of one row."""
        with service.admit():
            body = await read_body(request, limits.max_body_bytes)
            since = time.perf_counter()
            (prediction,) = await service.predict(await service.parse(parse_one, body))
        return json_response({**prediction, **response_metadata(since)})

    @app.post(
        "/predict/batch",
        responses=schema.responses(schema.BatchAnswer, 400, 413, 422, 503),
        openapi_extra=schema.body({"$ref": schema.REFERENCE.format(model="Batch")}),
    )
    async def predict_batch(request: Request) -> Response:
        """Predict the labels of several rows, in order. One invalid row rejects the whole batch."""
        with service.admit():
            body = await read_body(request, limits.max_body_bytes)
            since = time.perf_counter()
            predictions = await service.predict(await service.parse(parse_many, body, limits.queue))
        return json_response({"predictions": predictions, **response_metadata(since)})


def _add_status_routes(app: FastAPI, service: Service) -> None:
    required = schema.required_input(service.predictor.codec).model_dump()

    def health_response() -> Response:
        return json_response(
            {
                "status": "draining" if service.is_draining else "ok",
                "model_version": service.predictor.version,
                "dtype": service.predictor.dtype,
                "uptime_seconds": time.monotonic() - service.started,
                "waiting": len(service.batcher),
                "reads": required,
            }
        )

    @app.get("/health", responses=schema.responses(schema.Health))
    async def health() -> Response:
        """The state of the process, the version of the model and the required fields of a row."""
        return health_response()

    @app.get("/health/ready", responses=schema.responses(schema.Health, 503))
    async def ready() -> Response:
        """200 if the server accepts windows, 503 while it drains."""
        if service.is_draining:
            raise server_draining()
        return health_response()

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_document_routes(app: FastAPI, service: Service) -> None:
    document = app.openapi()  # only the routes that were added before
    limit = f"At most {service.limits.queue:,}; a longer batch gets 413."
    row = {"$ref": schema.REFERENCE.format(model="Row")}
    rows = {"type": "array", "items": row, "minItems": 1, "description": limit}
    batch = {"type": "object", "properties": {"rows": rows}, "required": ["rows"]}
    document["components"]["schemas"] |= schema.row_schemas(service.predictor.codec) | {"Batch": batch}
    pages = Environment(loader=PackageLoader("ctxtrain.serve", "."), autoescape=select_autoescape(default=True))
    page = pages.get_template("docs.html.j2").render(document=document)

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return json_response(document)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(page, headers=CONTENT_POLICY)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(Refusal)
    async def handle_refusal(_request: Request, refusal: Refusal) -> Response:
        return refusal.response()

    @app.exception_handler(HTTPException)
    async def handle_http_error(_request: Request, error: HTTPException) -> Response:
        return from_http_error(error.status_code, error.detail, error.headers).response()

    @app.exception_handler(Exception)
    async def handle_internal_error(request: Request, _error: Exception) -> Response:
        """Return 500. Starlette re-raises the exception afterwards, and uvicorn logs the traceback."""
        request_id = request.scope["state"]["request_id"]
        _log.error("internal error in request %s", request_id)
        return Refusal(500, "internal", f"internal error; see request {request_id} in the server's log").response()


class _RequestMiddleware:
    """Adds a request ID to every response and counts it, including error responses of the framework."""

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
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                if self.service.is_draining:
                    headers["Connection"] = "close"
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        finally:
            self._record(scope, request_id, status, time.perf_counter() - since)

    def _record(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        route = scope["path"] if scope["path"] in ROUTES else "other"
        self.service.metrics.requests.labels(route, status).inc()
        self.service.metrics.request_seconds.labels(route).observe(seconds)
        if self.access_log:
            with suppress(OSError):  # a failed log line must not fail the request
                print(
                    f"{request_id} {scope['method']} {route} {status} {1000 * seconds:.1f} ms",
                    file=sys.stderr,
                    flush=True,
                )
