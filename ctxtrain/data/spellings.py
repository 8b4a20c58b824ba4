"""Usual spellings of bar fields and of values, as other systems write them, in the form that `parse_window.py` reads.

Input: a decoded row with bars or features. Output: a copy with the known field names and with numbers in place of text,
and what was changed. A row in the documented form never comes here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isfinite
from typing import Any

from ctxtrain.data.row_schema import (
    BAR_NAMES,
    DIRECTIONS,
    MAX_MAGNITUDE,
    MEASURES,
    NO_FIELDS,
    OBJECT_FLAGS,
    SPELLINGS,
    OwnFields,
)

SPELLED_FIELDS = BAR_NAMES - {"time"}  # `bar_order.py` finds the field with the time
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_TRUTH = {"true": True, "false": False}
Changes = frozenset[tuple[str, str, str]]


def known_spelling(name: str) -> str | None:
    """The bar field that `name` is another spelling of, or None."""
    lower = name.lower()
    spelled = SPELLINGS.get(lower, lower)
    return spelled if spelled != name and spelled in SPELLED_FIELDS else None


def normalise_row(row: Mapping[str, Any], own: OwnFields = NO_FIELDS) -> tuple[dict[str, Any], Changes]:
    """The row with known names of bar fields and with numbers for text; and what was changed.

    `own` are the bar fields that the user declares. A change is one of

        ("name", found, read as)    another name of a bar field
        ("text", field, "")         text that is a number, or true or false
        ("whole", field, "")        a float that is a whole number
        ("flag", feature, "")       true or false as a number
        ("object", field, "")       an object as true, null as false
    """
    changes: set[tuple[str, str, str]] = set()
    result = dict(row)
    bars, current, features = row.get("context_bars"), row.get("current_bar"), row.get("features")
    if isinstance(bars, list):
        result["context_bars"] = [_normalise_bar(bar, own, changes) for bar in bars]
    if isinstance(current, dict):
        result["current_bar"] = _normalise_bar(current, own, changes)
    if isinstance(features, dict):
        result["features"] = {name: _feature(name, value, changes) for name, value in features.items()}
    return result, frozenset(changes)


def _normalise_bar(bar: Any, own: OwnFields, changes: set[tuple[str, str, str]]) -> Any:
    if not isinstance(bar, dict):
        return bar
    result: dict[str, Any] = {}
    for name, value in bar.items():
        is_known = name in SPELLED_FIELDS or name in own
        field = name if is_known else known_spelling(name) or name
        is_given = bar.get(field) is not None or result.get(field) is not None
        if field != name and is_given:  # twice: the documented name, or else the first, counts
            field = name
        if value is None and field in result:  # null counts as not given
            continue
        if field != name:
            changes.add(("name", name, field))
        if field in own:
            is_category, is_number = own[field] == "category", own[field] == "number"
            result[field] = (
                _category(field, value, changes) if is_category else _value(field, value, is_number, changes)
            )
        else:
            result[field] = _value(field, value, field in MEASURES, changes) if field in SPELLED_FIELDS else value
    return result


def _category(field: str, value: Any, changes: set[tuple[str, str, str]]) -> Any:
    """A whole number that was written as a float counts as the whole number."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= MAX_MAGNITUDE:
        changes.add(("whole", field, ""))
        return int(value)
    return value


def _value(field: str, value: Any, is_measure: bool, changes: set[tuple[str, str, str]]) -> Any:
    if field in OBJECT_FLAGS and (value is None or isinstance(value, dict)):
        changes.add(("object", field, ""))
        return value is not None
    if (number := parse_number(value)) is not None:
        changes.add(("text", field, ""))
        return int(number) if not is_measure and number.is_integer() else number
    is_flag = not is_measure and field not in DIRECTIONS and field not in ("bar_index", "mgann_leg_index")
    if isinstance(value, str) and is_flag and (truth := _TRUTH.get(value.strip().lower())) is not None:
        changes.add(("text", field, ""))
        return truth
    if isinstance(value, float) and not is_measure and value.is_integer():
        changes.add(("whole", field, ""))
        return int(value)
    return value


def _feature(name: str, value: Any, changes: set[tuple[str, str, str]]) -> Any:
    if name in OBJECT_FLAGS and (value is None or isinstance(value, dict)):
        changes.add(("object", f"features.{name}", ""))
        return float(value is not None)
    if isinstance(value, str) and (truth := _TRUTH.get(value.strip().lower())) is not None:
        changes.add(("text", f"features.{name}", ""))
        return float(truth)
    if isinstance(value, bool):
        changes.add(("flag", name, ""))
        return float(value)
    if (number := parse_number(value)) is not None:
        changes.add(("text", f"features.{name}", ""))
        return number
    return value


def parse_number(value: object) -> float | None:
    """The number in a text, or None. Text beyond the range of floats stays text, which says more than Infinity."""
    if not isinstance(value, str) or not _NUMBER.fullmatch(value.strip()):
        return None
    return number if isfinite(number := float(value)) else None
