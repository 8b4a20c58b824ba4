"""Error responses with the body `{error, code, details}`.

Input: a `Refusal`, which any code below a route may raise. Output: a response with its status. `code` is for programs
and `error` for people. `details` has all faults, with the same texts as in `ctxtrain predict`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Literal

import orjson
from pydantic import BaseModel
from starlette.responses import Response

from ctxtrain.errors import MAX_FAULTS_SHOWN

RETRY_AFTER = {"Retry-After": "1"}  # seconds; about the time that the embedded base takes for a full queue
Code = Literal[
    "body_incomplete", "body_too_large", "draining", "internal", "invalid_json", "invalid_window", "method_not_allowed",
    "not_found", "queue_full", "too_many_rows", "unsupported_content",
]  # fmt: skip


class ErrorBody(BaseModel):
    """The body of every response other than 200."""

    error: str
    code: Code
    details: list[str]


class Refusal(Exception):
    """An error response with `status`. `details` has all faults of the request."""

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


def invalid_window(faults: Sequence[str], total: int | None = None) -> Refusal:
    """Response to valid JSON that is not a valid input. `total` also counts faults that `faults` leaves out."""
    details = list(faults[:MAX_FAULTS_SHOWN])
    hidden = (len(faults) if total is None else total) - len(details)
    details += [f"… and {hidden:,} more"] if hidden else []
    return Refusal(422, "invalid_window", "the body must be a valid input of this model; see details", details)


def queue_full(waiting: int) -> Refusal:
    error = f"the queue is full ({waiting} windows). Try again after Retry-After seconds."
    return Refusal(503, "queue_full", error, headers=RETRY_AFTER)


def server_draining() -> Refusal:
    error = "the server is shutting down and accepts no more windows. Use another server."
    return Refusal(503, "draining", error, headers=RETRY_AFTER)


def from_http_error(status: int, detail: Any, headers: Mapping[str, str] | None) -> Refusal:
    """Response to a path or method that does not exist."""
    code: Code = "method_not_allowed" if status == HTTPStatus.METHOD_NOT_ALLOWED else "not_found"
    return Refusal(status, code, f"{detail}. GET /openapi.json lists all routes.", headers=headers or {})
