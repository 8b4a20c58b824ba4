"""Parts of the OpenAPI 3.1 document that FastAPI does not generate: request bodies, responses, errors and headers.

Input: the codec of the model. Output: schemas. The schema of a row is generated from the types that `parse_row`
validates, and requires the fields that this model was trained on.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field, TypeAdapter

from ctxtrain.data.codec import Codec
from ctxtrain.data.row_schema import (
    MAX_MAGNITUDE,
    MAX_WORD_CHARS,
    ORDER_FIELDS,
    WORD_PATTERN,
    FeaturesRow,
    TextRow,
    WindowRow,
)
from ctxtrain.serve.refusals import ErrorBody

REFERENCE = "#/components/schemas/{model}"
REQUEST_ID = {
    "X-Request-ID": {
        "description": "The ID of the request, or a new one",
        "schema": {"type": "string"},
        "required": True,
    }
}
RETRY = {"Retry-After": {"description": "Seconds", "schema": {"type": "string"}, "required": True}}
IGNORED_FIELDS = {"metadata": {"description": "Ignored"}, "timeframe": {"description": "Ignored"}}
OWN_SCHEMAS: dict[str, dict[str, Any]] = {  # of values, by the kind of field
    "number": {"type": ["number", "boolean"], "minimum": -MAX_MAGNITUDE, "maximum": MAX_MAGNITUDE},
    "count": {"type": "integer", "minimum": 0, "maximum": int(MAX_MAGNITUDE)},
    "flag": {"enum": [True, False, 0, 1]},
    "category": {"type": ["string", "integer"], "maxLength": MAX_WORD_CHARS, "pattern": WORD_PATTERN},
}
ERROR_DESCRIPTIONS = {
    400: "Not JSON in UTF-8, a duplicate key in an object, another Content-Type, or an incomplete body",
    413: "More than --max-body-bytes, or more rows than --queue",
    422: "Valid JSON that is not a valid input of this model; `details` has all faults",
    503: "The queue is full, or the server is shutting down",
}
Label = Literal["LONG", "SHORT", "SKIP"]
Share = Field(ge=0, le=1)


class Probabilities(BaseModel):
    LONG: float = Share
    SHORT: float = Share
    SKIP: float = Share


class Predicted(BaseModel):
    """`confidence` is the largest probability. `abstained` is present with --min-confidence."""

    id: str | None
    label: Label
    confidence: float = Share
    probabilities: Probabilities
    abstained: bool = Field(default=False)


class Processed(BaseModel):
    processing_time_ms: float = Field(ge=0, description="From the last byte of the body to the response")
    model_version: str


class PredictAnswer(Predicted, Processed):
    pass


class BatchAnswer(Processed):
    predictions: list[Predicted]


class Input(BaseModel):
    """What a row must contain: `fields` in every bar, `features` in its features."""

    kind: Literal["window", "features", "text"]
    fields: list[str]
    features: list[str]


class Health(BaseModel):
    status: Literal["ok", "draining"]
    model_version: str
    dtype: Literal["float32", "bfloat16"] = Field(description="Number type of the answers")
    uptime_seconds: float
    waiting: int
    reads: Input


def required_input(codec: Codec) -> Input:
    return Input(kind=codec.rows, fields=codec.fields, features=[*codec.features, *codec.feature_words])


def responses(answer: type[BaseModel], *statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route: its body for 200, and its errors."""
    by_status: dict[int | str, dict[str, Any]] = {
        200: {"model": answer, "description": "Success", "headers": REQUEST_ID}
    }
    for status in statuses:
        headers = REQUEST_ID | (RETRY if status == 503 else {})
        by_status[status] = {"model": ErrorBody, "description": ERROR_DESCRIPTIONS[status], "headers": headers}
    return by_status


def body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def row_schemas(codec: Codec) -> dict[str, Any]:
    """The schema of a `Row` that this model accepts, and of the `Bar` that it may refer to."""
    kinds: dict[str, type[Any]] = {"text": TextRow, "features": FeaturesRow, "window": WindowRow}
    row = TypeAdapter(kinds[codec.rows]).json_schema(ref_template=REFERENCE)
    schemas: dict[str, Any] = row.pop("$defs", {})
    row["properties"] |= IGNORED_FIELDS
    row["description"] = "One event. Fields that are not listed, such as a label, are accepted and ignored."
    if codec.rows == "window":
        own = {name: OWN_SCHEMAS[kind] for name, kind in codec.own_fields.items()}
        own |= {name: own[name] | {"type": "number"} for name, kind in codec.own_fields.items() if kind == "number"}
        schemas["Bar"]["properties"] |= own
        schemas["Bar"]["required"] = [name for name in codec.fields if name != "delta"]
        if "delta" in codec.fields:
            schemas["Bar"]["anyOf"] = [{"required": ["delta"]}, {"required": ["buy_vol", "sell_vol"]}]
        order = " and ".join(ORDER_FIELDS)
        schemas["Bar"]["description"] = (
            f"low ≤ open, close ≤ high; {order} increase from bar to bar. This model requires, in every bar and not "
            f"null: {', '.join(codec.fields)}. delta may be given as buy_vol and sell_vol."
        )
    if codec.features or codec.feature_words:
        row["required"] = sorted({*row["required"], "features"})
        row["properties"]["features"] = {
            "type": "object",
            "properties": {
                **dict.fromkeys(codec.features, OWN_SCHEMAS["number"]),
                **dict.fromkeys(codec.feature_words, OWN_SCHEMAS["category"]),
            },
            "required": [*codec.features, *codec.feature_words],
        }
    return schemas | {"Row": row}
