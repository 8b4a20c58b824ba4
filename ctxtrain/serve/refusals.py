"""Why a request gets no prediction, as `{error, code, details}`.

Comes in: a `Refusal`, raised anywhere below a route. Goes out: a response with its status. `code` is for programs,
`error` for people, `details` holds every fault that was found, in the words of `ctxtrain predict`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Literal

import orjson
from pydantic import BaseModel
from starlette.responses import Response

from ctxtrain.errors import MAX_FAULTS_SHOWN

RETRY_AFTER = {"Retry-After": "1"}  # seconds; a full queue of the embedded base is answered in about as many
Code = Literal[
    "body_incomplete", "body_too_large", "draining", "internal", "invalid_json", "invalid_window", "method_not_allowed",
    "not_found", "queue_full", "too_many_rows", "unsupported_content",
]  # fmt: skip


class ErrorBody(BaseModel):
    """The body of every answer that is not 200."""

    error: str
    code: Code
    details: list[str]


class Refusal(Exception):
    """A request that ends with `status`; `details` are its faults, all at once."""

    def __init__(
        self, status: int, code: Code, error: str, details: list[str] | None = None, headers: Mapping[str, str] = {}
    ) -> None:
        super().__init__(error)
        self.status = status
        self.body = {"error": error, "code": code, "details": details or []}
        self.headers = dict(headers)

    def response(self) -> Response:
        return json_response(self.body, self.status, self.headers)


def json_response(value: object, status: int = HTTPStatus.OK, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), status, headers, "application/json")


def no_window(faults: Sequence[str], total: int | None = None) -> Refusal:
    """A body that is valid JSON and not what the model takes; `total` counts the faults that `faults` leaves out."""
    shown = list(faults[:MAX_FAULTS_SHOWN])
    hidden = (len(faults) if total is None else total) - len(shown)
    shown += [f"… and {hidden:,} more"] if hidden else []
    return Refusal(422, "invalid_window", "the body must hold what the model was trained on; see details", shown)


def queue_full(waiting: int) -> Refusal:
    error = f"the queue is full ({waiting} windows wait). Try again after Retry-After seconds."
    return Refusal(503, "queue_full", error, headers=RETRY_AFTER)


def draining() -> Refusal:
    error = "the server is stopping and takes no more windows. Ask another one."
    return Refusal(503, "draining", error, headers=RETRY_AFTER)


def of_http(status: int, detail: Any, headers: Mapping[str, str] | None) -> Refusal:
    """A path or method that does not exist."""
    code: Code = "method_not_allowed" if status == HTTPStatus.METHOD_NOT_ALLOWED else "not_found"
    return Refusal(status, code, f"{detail}. GET /openapi.json lists what there is.", headers=headers or {})
