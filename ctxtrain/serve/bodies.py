"""Parse the body of a request into windows, or raise a `Refusal` with all faults.

Input: a request. Output: its bytes, whose number is limited while they arrive, and its windows. Rows are validated by
`strict_json` and `parse_row`, as in `ctxtrain predict`, and by the codec of the model.
"""

from __future__ import annotations

import asyncio

import orjson
from starlette.requests import ClientDisconnect, Request

from ctxtrain.data import strict_json
from ctxtrain.data.codec import Codec
from ctxtrain.data.parse_window import Window, parse_row
from ctxtrain.errors import MAX_FAULTS_SHOWN, short_repr
from ctxtrain.serve.refusals import Refusal, invalid_window

BODY_SECONDS = 10.0  # slower requests get 400, so that no client blocks a drain


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Read a JSON body. Raises Refusal: 400 for other content, 413 as soon as it exceeds `max_bytes`."""
    _check_headers(request)
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > max_bytes:
        raise _too_large(max_bytes, f"{int(length):,}")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise _too_large(max_bytes, "more")
    except TimeoutError:
        error = f"the whole body must arrive within {BODY_SECONDS:g} seconds, got {len(body):,} bytes"
        raise Refusal(400, "body_incomplete", error) from None
    except ClientDisconnect:
        raise Refusal(400, "body_incomplete", "the client disconnected before the end of the body") from None
    return bytes(body)


def _check_headers(request: Request) -> None:
    """Require uncompressed JSON in UTF-8.

    This also blocks cross-origin pages: browsers send this Content-Type to another origin only after a preflight.
    """
    kind, _, parameters = request.headers.get("content-type", "").partition(";")
    allowed_parameters = {"", "charset=utf-8", 'charset="utf-8"'}
    if kind.strip().lower() != "application/json" or parameters.strip().lower() not in allowed_parameters:
        given = short_repr(request.headers.get("content-type"))
        error = f"Content-Type must be application/json in UTF-8, got {given}"
        raise Refusal(400, "unsupported_content", error)
    coding = request.headers.get("content-encoding", "identity")
    if coding.lower() != "identity":
        error = f"the body must not be compressed, got Content-Encoding {short_repr(coding)}"
        raise Refusal(400, "unsupported_content", error)


def _too_large(max_bytes: int, size: str) -> Refusal:
    error = f"a body must have at most {max_bytes:,} bytes, got {size}. Send fewer rows, or raise --max-body-bytes."
    return Refusal(413, "body_too_large", error)


def parse_one(body: bytes, codec: Codec) -> list[Window]:
    """The window of a body with one row. Raises Refusal."""
    window, faults = _parse_window(_json(body), "row", codec)
    if window is None:
        raise invalid_window(faults)
    return [window]


def parse_many(body: bytes, codec: Codec, max_rows: int) -> list[Window]:
    """The windows of `{"rows": [row, …]}`. Raises Refusal with the faults of all rows, or for more than `max_rows`."""
    value = _json(body)
    rows = value.get("rows") if isinstance(value, dict) else None
    if not isinstance(rows, list) or not rows:
        raise invalid_window([f'a batch must be {{"rows": [row, …]}} with at least one row, got {short_repr(value)}'])
    if len(rows) > max_rows:
        error = (
            f"a batch must have at most {max_rows:,} rows, got {len(rows):,}. Send several batches, or raise --queue."
        )
        raise Refusal(413, "too_many_rows", error)
    windows, faults, total = [], list[str](), 0
    for number, row in enumerate(rows):
        window, reasons = _parse_window(row, f"rows[{number}]", codec)
        total += len(reasons)
        faults += [f"rows[{number}]: {reason}" for reason in reasons[: MAX_FAULTS_SHOWN - len(faults)]]
        if window:
            windows.append(window)
    if faults:
        raise invalid_window(faults, total)
    return windows


def _json(body: bytes) -> object:
    try:
        return strict_json.loads(body)
    except orjson.JSONDecodeError as error:
        fault = f"not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        raise Refusal(400, "invalid_json", fault) from None


def _parse_window(row: object, place: str, codec: Codec) -> tuple[Window | None, list[str]]:
    window, faults = parse_row(row, place, labelled=False, own=codec.own_fields)
    fault = codec.fault(window) if window else None
    return (None, [fault]) if fault else (window, faults)
