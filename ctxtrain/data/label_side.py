"""Fields of a row that follow from its label: `label`, `label_horizon` and `outcome`. The model reads none of them.

Input: a decoded row. Output: the label and its horizon, or the reasons why they are invalid, and what was changed to
read them. An `outcome` is only checked, because nothing reads it yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any, NamedTuple

from ctxtrain.data.spellings import Changes, parse_number
from ctxtrain.errors import short_repr
from ctxtrain.labels import LABELS
from ctxtrain.limits import MAX_WINDOWS

MAX_HORIZON = MAX_WINDOWS  # bars
OUTCOME_NUMBERS = ("long_r", "short_r", "cost")
MAX_R = 1e9  # beyond any trade, in multiples of the risk


class LabelSide(NamedTuple):
    """`label` is an index into `LABELS`; `horizon` is the number of bars after the event that the label looked at."""

    label: int | None = None
    horizon: int | None = None
    reasons: tuple[str, ...] = ()
    changes: Changes = frozenset()


def parse_label_side(row: Mapping[str, Any]) -> LabelSide:
    """The label and its horizon, which may be missing. `reasons` are the faults of all label-side fields."""
    label, reasons = _parse_label(row.get("label"))
    if row.get("label_horizon") is None and row.get("outcome") is None:
        return LabelSide(label, None, tuple(reasons))
    changes: set[tuple[str, str, str]] = set()
    horizon, faults = _parse_horizon(row.get("label_horizon"), changes)
    reasons += faults + _outcome_faults(row.get("outcome"), changes)
    return LabelSide(label, horizon, tuple(reasons), frozenset(changes))


def _parse_label(value: object) -> tuple[int | None, list[str]]:
    if isinstance(value, str) and value.upper() in LABELS:
        return LABELS.index(value.upper()), []
    if value is None:
        return None, [f"label is missing; it must be {', '.join(LABELS)} in any case"]
    return None, [f"label must be {', '.join(LABELS)} in any case, got {short_repr(value)}"]


def _parse_horizon(value: object, changes: set[tuple[str, str, str]]) -> tuple[int | None, list[str]]:
    if value is None:
        return None, []
    number = _read_number("label_horizon", value, changes)
    if number is None or not float(number).is_integer() or not 0 <= number <= MAX_HORIZON:
        rule = f"label_horizon must be a whole number of bars, 0 to {MAX_HORIZON:,}"
        return None, [f"{rule}, got {short_repr(value)}"]
    if isinstance(value, float):
        changes.add(("whole", "label_horizon", ""))
    return int(number), []


def _outcome_faults(value: object, changes: set[tuple[str, str, str]]) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, Mapping) or not {"long_r", "short_r"} & value.keys():
        return []  # an outcome of another system, which is not read
    faults = []
    for name in OUTCOME_NUMBERS:
        found, least = value.get(name), 0 if name == "cost" else -MAX_R
        if found is None:
            faults += [] if name == "cost" else [f"outcome.{name} is missing"]
            continue
        number = _read_number(f"outcome.{name}", found, changes)
        if number is None or not least <= number <= MAX_R:
            faults.append(f"outcome.{name} must be a number from {least:,.0f} to {MAX_R:,.0f}, got {short_repr(found)}")
    return faults


def _read_number(name: str, value: object, changes: set[tuple[str, str, str]]) -> float | None:
    """The finite number that a value is, or that its text spells; None for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value if isfinite(value) else None
    number = parse_number(value)
    if number is not None:
        changes.add(("text", name, ""))
    return number
