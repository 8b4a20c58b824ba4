"""Files that a program reads back, held to their schemas: what is wrong is named by its file and key.

Comes in: a path and a pydantic model. Goes out: the value as it was read, or a DataError.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from ctxtrain.errors import DataError, shown
from ctxtrain.regular_files import read_regular

MOST_FAULTS = 10  # of one file: a foreign one has no key right
Schema = TypeVar("Schema", bound=BaseModel)


class Part(BaseModel):
    """Keys that something reads, of the right types; others may stand beside them."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)

    def plain(self) -> dict[str, Any]:
        """As it stands in the file: keys that were not given stay away."""
        return self.model_dump(by_alias=True, exclude_unset=True)


def reasons(error: ValidationError) -> list[str]:
    """Each fault as `lacks key` or `key must …, got value`."""
    found = []
    for detail in error.errors(include_url=False)[:MOST_FAULTS]:
        key = ".".join(map(str, detail["loc"])) or "the whole"
        if detail["type"] == "missing":
            found.append(f"lacks {key}")
            continue
        if detail["type"] == "extra_forbidden":
            found.append(f"{key} is no key of it")
            continue
        rule = re.sub(
            r"^(Input|List|String|Dictionary|Tuple) should", "must", detail["msg"].removeprefix("Value error, ")
        )
        found.append(f"{key} {rule}, got {shown(detail['input'])}")
    return found


def refuse_unlike(schema: TypeAdapter[Any] | type[BaseModel], value: object, where: object, remedy: str) -> None:
    """Raises DataError that names `where` and each key that is missing or wrong."""
    if found := unlike(schema, value):
        raise DataError([f"{where}: {reason}. {remedy}." for reason in found])


def unlike(schema: TypeAdapter[Any] | type[BaseModel], value: object) -> list[str]:
    """How a value breaks its schema, each fault with its key; nothing if it does not."""
    try:
        if isinstance(schema, TypeAdapter):
            schema.validate_python(value)
        else:
            schema.model_validate(value)
    except ValidationError as error:
        return reasons(error)
    return []


def read_json(path: Path, remedy: str) -> Any:
    """The value of a JSON file. Raises DataError with its place if it is not valid, and FileNotFoundError."""
    content = read_regular(path)
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError as error:
        place = f"{path}:{error.lineno}:{error.colno}"
        raise DataError(f"{place}: not valid JSON: {error.msg}. {remedy}.") from None


def read_as(schema: type[Schema], path: Path, remedy: str) -> Schema:
    """What a JSON file holds. Raises DataError that names the file and the key, and FileNotFoundError."""
    value = read_json(path, remedy)
    refuse_unlike(schema, value, path, remedy)
    return schema.model_validate(value)
