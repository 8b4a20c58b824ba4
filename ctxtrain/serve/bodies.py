"""The body of a request becomes windows, or a `Refusal` with all its faults.

Comes in: a request. Goes out: its bytes, counted while they arrive, and the windows they hold. What is a row is
decided by `strict_json` and `parse_row`, as for `ctxtrain predict`, and by the codec of the model.
"""

from __future__ import annotations

import asyncio

import orjson
from starlette.requests import ClientDisconnect, Request

from ctxtrain.data import strict_json
from ctxtrain.data.codec import Codec
from ctxtrain.data.parse_window import Window, parse_row
from ctxtrain.errors import MAX_FAULTS_SHOWN, shown
from ctxtrain.serve.refusals import Refusal, no_window

BODY_SECONDS = 10.0  # a request that arrives more slowly is given up, so that nobody holds a drain for ever


async def read_body(request: Request, most: int) -> bytes:
    """All bytes of a JSON body. Raises Refusal: 400 for other content, 413 as soon as it is over `most` bytes."""
    _check_headers(request)
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > most:
        raise _too_large(most, f"{int(length):,}")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise _too_large(most, "more")
    except TimeoutError:
        error = f"the whole body must arrive within {BODY_SECONDS:g} seconds, got {len(body):,} bytes"
        raise Refusal(400, "body_incomplete", error) from None
    except ClientDisconnect:
        raise Refusal(400, "body_incomplete", "the client went away before the end of the body") from None
    return bytes(body)


def _check_headers(request: Request) -> None:
    """Also keeps pages of other origins out: a browser sends this type to another origin only after asking it."""
    kind, _, parameters = request.headers.get("content-type", "").partition(";")
    wanted = {"", "charset=utf-8", 'charset="utf-8"'}
    if kind.strip().lower() != "application/json" or parameters.strip().lower() not in wanted:
        found = shown(request.headers.get("content-type"))
        error = f"Content-Type must be application/json in UTF-8, got {found}"
        raise Refusal(400, "unsupported_content", error)
    coding = request.headers.get("content-encoding", "identity")
    if coding.lower() != "identity":
        error = f"the body must not be compressed, got Content-Encoding {shown(coding)}"
        raise Refusal(400, "unsupported_content", error)


def _too_large(most: int, found: str) -> Refusal:
    error = f"a body must be at most {most:,} bytes, got {found}. Send fewer rows at a time, or raise --max-body-bytes."
    return Refusal(413, "body_too_large", error)


def parse_one(body: bytes, codec: Codec) -> list[Window]:
    """The window of a body that is one row."""
    window, faults = _window(_json(body), "row", codec)
    if window is None:
        raise no_window(faults)
    return [window]


def parse_many(body: bytes, codec: Codec, most: int) -> list[Window]:
    """The windows of `{"rows": [row, …]}`, at most `most`; one bad row refuses all, naming the faults of every one."""
    value = _json(body)
    rows = value.get("rows") if isinstance(value, dict) else None
    if not isinstance(rows, list) or not rows:
        raise no_window([f'a batch must be {{"rows": [row, …]}} with at least one row, got {shown(value)}'])
    if len(rows) > most:
        error = f"a batch must have at most {most:,} rows, got {len(rows):,}. Send several, or raise --queue."
        raise Refusal(413, "too_many_rows", error)
    windows, faults, total = [], list[str](), 0
    for number, row in enumerate(rows):
        window, reasons = _window(row, f"rows[{number}]", codec)
        total += len(reasons)
        faults += [f"rows[{number}]: {reason}" for reason in reasons[: MAX_FAULTS_SHOWN - len(faults)]]
        if window:
            windows.append(window)
    if faults:
        raise no_window(faults, total)
    return windows


def _json(body: bytes) -> object:
    try:
        return strict_json.loads(body)
    except orjson.JSONDecodeError as error:
        where = f"not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        raise Refusal(400, "invalid_json", where) from None


def _window(row: object, place: str, codec: Codec) -> tuple[Window | None, list[str]]:
    window, faults = parse_row(row, place, labelled=False)
    fault = codec.fault(window) if window else None
    return (None, [fault]) if fault else (window, faults)
