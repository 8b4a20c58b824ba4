"""What /openapi.json says beyond what FastAPI finds by itself: bodies, answers, errors, headers.

Comes in: the codec of the model. Goes out: parts of an OpenAPI 3.1 document. The schema of a row is made from the
types that `parse_row` checks with, and requires what this model was trained on.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field, TypeAdapter

from ctxtrain.data.codec import Codec
from ctxtrain.data.parse_window import PLACE_FIELDS, TextRow, WindowRow
from ctxtrain.serve.refusals import ErrorBody

REFERENCE = "#/components/schemas/{model}"
REQUEST_ID = {
    "X-Request-ID": {"description": "The request's own, or a new one", "schema": {"type": "string"}, "required": True}
}
RETRY = {"Retry-After": {"description": "Seconds", "schema": {"type": "string"}, "required": True}}
UNREAD = {"metadata": {"description": "Never read"}, "timeframe": {"description": "Never read"}}
WHY = {
    400: "Not JSON in UTF-8, a key twice in an object, another Content-Type, or an incomplete body",
    413: "More than --max-body-bytes, or more rows than --queue",
    422: "Valid JSON that is no window of the kind the model was trained on; `details` has all faults",
    503: "The queue is full, or the server is stopping",
}
Label = Literal["LONG", "SHORT", "SKIP"]
Share = Field(ge=0, le=1)


class Probabilities(BaseModel):
    LONG: float = Share
    SHORT: float = Share
    SKIP: float = Share


class Predicted(BaseModel):
    """`confidence` is the largest probability; `abstained` is there under --min-confidence."""

    id: str | None
    label: Label
    confidence: float = Share
    probabilities: Probabilities
    abstained: bool = Field(default=False)


class Processed(BaseModel):
    processing_time_ms: float = Field(ge=0, description="From the last byte of the body to the answer")
    model_version: str


class PredictAnswer(Predicted, Processed):
    pass


class BatchAnswer(Processed):
    predictions: list[Predicted]


class Input(BaseModel):
    """What a row must carry: `fields` in every bar, `features` in its features."""

    kind: Literal["window", "text"]
    fields: list[str]
    features: list[str]


class Health(BaseModel):
    status: Literal["ok", "draining"]
    model_version: str
    uptime_seconds: float
    waiting: int
    reads: Input


def needs(codec: Codec) -> Input:
    return Input(kind="text" if codec.kind == "text" else "window", fields=codec.fields, features=[*codec.features])


def responses(answer: type[BaseModel], *statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route: its answer, and the errors it can give."""
    found: dict[int | str, dict[str, Any]] = {200: {"model": answer, "description": "Done", "headers": REQUEST_ID}}
    for status in statuses:
        headers = REQUEST_ID | (RETRY if status == 503 else {})
        found[status] = {"model": ErrorBody, "description": WHY[status], "headers": headers}
    return found


def body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def row_schemas(codec: Codec) -> dict[str, Any]:
    """`Row`, and the `Bar` it may refer to, for the rows that this model takes."""
    kind: type[Any] = TextRow if codec.kind == "text" else WindowRow
    row = TypeAdapter(kind).json_schema(ref_template=REFERENCE)
    found: dict[str, Any] = row.pop("$defs", {})
    row["properties"] |= UNREAD
    row["description"] = "One event. Fields that are not listed, such as a label, are taken and never read."
    if codec.kind != "text":
        found["Bar"]["required"] = [name for name in codec.fields if name != "delta"]
        if "delta" in codec.fields:
            found["Bar"]["anyOf"] = [{"required": ["delta"]}, {"required": ["buy_vol", "sell_vol"]}]
        order = " and ".join(PLACE_FIELDS)
        found["Bar"]["description"] = (
            f"low ≤ open, close ≤ high; {order} rise from bar to bar. This model needs, in every bar and not null: "
            f"{', '.join(codec.fields)}; buy_vol and sell_vol make delta."
        )
        if codec.features:
            row["required"] = [*row["required"], "features"]
            row["properties"]["features"] = {
                "type": "object",
                "additionalProperties": {"type": "number"},
                "required": [*codec.features],
            }
    return found | {"Row": row}
