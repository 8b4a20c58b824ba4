"""Usual spellings of bar fields and of numbers, as other systems write them, in the form that `parse_window.py` reads.

Input: a decoded window row. Output: a copy with the known field names and with numbers in place of text, and what was
changed. A row in the documented form never comes here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isfinite
from typing import Any

SPELLINGS = {"o": "open", "h": "high", "l": "low", "c": "close", "v": "volume", "vol": "volume"}
NUMBERS = frozenset(
    {"open", "high", "low", "close", "volume", "delta", "buy_vol", "sell_vol", "atr_14", "wave_strength"}
)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
Changes = frozenset[tuple[str, str, str]]


def known_spelling(name: str, known: frozenset[str]) -> str | None:
    """The field of `known` that `name` is another spelling of, or None."""
    lower = name.lower()
    spelled = SPELLINGS.get(lower, lower)
    return spelled if spelled != name and spelled in known else None


def normalise_row(row: Mapping[str, Any], known: frozenset[str]) -> tuple[dict[str, Any], Changes]:
    """The row with the `known` names of bar fields and with numbers for text; and what was changed.

    A change is `("name", found, read as)`, `("text", field, "")` for a number that was text, `("whole", field, "")` for
    a whole number that was a float, or `("flag", feature, "")` for a feature that was true or false.
    """
    changes: set[tuple[str, str, str]] = set()
    result = dict(row)
    bars, current, features = row.get("context_bars"), row.get("current_bar"), row.get("features")
    if isinstance(bars, list):
        result["context_bars"] = [_normalise_bar(bar, known, changes) for bar in bars]
    if isinstance(current, dict):
        result["current_bar"] = _normalise_bar(current, known, changes)
    if isinstance(features, dict):
        result["features"] = {name: _feature(name, value, changes) for name, value in features.items()}
    return result, frozenset(changes)


def _normalise_bar(bar: Any, known: frozenset[str], changes: set[tuple[str, str, str]]) -> Any:
    if not isinstance(bar, dict):
        return bar
    result: dict[str, Any] = {}
    for name, value in bar.items():
        field = name if name in known else known_spelling(name, known) or name
        is_given = bar.get(field) is not None or result.get(field) is not None
        if field != name and is_given:  # twice: the documented name, or else the first, counts
            field = name
        if value is None and field in result:  # null counts as not given
            continue
        if field != name:
            changes.add(("name", name, field))
        result[field] = _value(field, value, changes) if field in known else value
    return result


def _value(field: str, value: Any, changes: set[tuple[str, str, str]]) -> Any:
    if (number := parse_number(value)) is not None:
        changes.add(("text", field, ""))
        return int(number) if field not in NUMBERS and number.is_integer() else number
    if isinstance(value, float) and field not in NUMBERS and value.is_integer():
        changes.add(("whole", field, ""))
        return int(value)
    return value


def _feature(name: str, value: Any, changes: set[tuple[str, str, str]]) -> Any:
    if isinstance(value, bool):
        changes.add(("flag", name, ""))
        return float(value)
    if (number := parse_number(value)) is not None:
        changes.add(("text", f"features.{name}", ""))
        return number
    return value


def parse_number(value: Any) -> float | None:
    """The number in a text, or None. Text beyond the range of floats stays text, which says more than Infinity."""
    if not isinstance(value, str) or not _NUMBER.fullmatch(value.strip()):
        return None
    return number if isfinite(number := float(value)) else None
