"""Validate files that ctxtrain reads back against their schemas.

Input: a path and a pydantic model. Output: the validated value, or a DataError that names the file and each faulty key.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from ctxtrain.errors import DataError, short_repr
from ctxtrain.regular_files import read_regular

MAX_FAULTS = 10  # per file: a file of another program may have hundreds
Schema = TypeVar("Schema", bound=BaseModel)


class StoredModel(BaseModel):
    """Base class of schemas for stored files: strict types for the keys that the code reads; other keys are allowed."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)

    def to_dict(self) -> dict[str, Any]:
        """The value as stored in the file, without keys that were not set."""
        return self.model_dump(by_alias=True, exclude_unset=True)


def validation_faults(error: ValidationError) -> list[str]:
    """One text per fault: `lacks key` or `key must …, got value`."""
    faults = []
    for detail in error.errors(include_url=False)[:MAX_FAULTS]:
        key = ".".join(map(str, detail["loc"])) or "the value"
        if detail["type"] == "missing":
            faults.append(f"lacks {key}")
            continue
        if detail["type"] == "extra_forbidden":
            faults.append(f"has the unknown key {key}")
            continue
        rule = re.sub(
            r"^(Input|List|String|Dictionary|Tuple) should", "must", detail["msg"].removeprefix("Value error, ")
        )
        faults.append(f"{key} {rule}, got {short_repr(detail['input'])}")
    return faults


def check_schema(schema: TypeAdapter[Any] | type[BaseModel], value: object, where: object, remedy: str) -> None:
    """Raise DataError with `where` and each missing or invalid key if the value violates the schema."""
    if faults := schema_faults(schema, value):
        raise DataError([f"{where}: {fault}. {remedy}." for fault in faults])


def schema_faults(schema: TypeAdapter[Any] | type[BaseModel], value: object) -> list[str]:
    """The violations of a schema, each with its key; empty for a valid value."""
    try:
        if isinstance(schema, TypeAdapter):
            schema.validate_python(value)
        else:
            schema.model_validate(value)
    except ValidationError as error:
        return validation_faults(error)
    return []


def read_json(path: Path, remedy: str) -> Any:
    """Read a JSON file. Raises DataError with line and column if it is not valid JSON, and FileNotFoundError."""
    content = read_regular(path)
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError as error:
        place = f"{path}:{error.lineno}:{error.colno}"
        raise DataError(f"{place}: not valid JSON: {error.msg}. {remedy}.") from None


def read_json_as(schema: type[Schema], path: Path, remedy: str) -> Schema:
    """Read and validate a JSON file. Raises DataError with the file and the key, and FileNotFoundError."""
    value = read_json(path, remedy)
    check_schema(schema, value, path, remedy)
    return schema.model_validate(value)
