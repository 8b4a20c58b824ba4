"""Decoded JSON row → window, or the reasons why it is invalid.

Input: the JSON object of an event, a CTX window (`context_bars` + `current_bar`) or text (`context`). Output: a
`Window`. Only the fields declared here are read (an allow-list). Label-derived fields such as `conditions_met` cannot
reach the model, because no code reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isclose
from typing import Annotated, Any, Literal, Required

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, Strict, TypeAdapter, ValidationError, WithJsonSchema
from pydantic_core import ErrorDetails
from typing_extensions import TypedDict

from ctxtrain.data.bar_order import WindowPosition, bar_name, locate_bars
from ctxtrain.data.label_side import LabelSide, parse_label_side
from ctxtrain.data.outliers import REL_TOL
from ctxtrain.data.spellings import Changes, known_spelling, normalise_row
from ctxtrain.errors import short_repr

MIN_BARS, MAX_BARS = 20, 256
MAX_MAGNITUDE = 1e15  # beyond any market; small enough that sums of squares do not overflow

Number = Annotated[float, Strict(), Field(ge=-MAX_MAGNITUDE, le=MAX_MAGNITUDE, allow_inf_nan=False)]
Quantity = Annotated[float, Strict(), Field(ge=0, le=MAX_MAGNITUDE, allow_inf_nan=False)]
Flag = Literal[True, False, 0, 1] | None
Direction = Literal[-1, 0, 1] | None
WholeNumber = Annotated[int, Strict(), Field(ge=-int(MAX_MAGNITUDE), le=int(MAX_MAGNITUDE))]
# Typed Any because `bar_order.py` and `_parse_id` validate them.
Time = Annotated[Any, WithJsonSchema({"type": ["string", "number", "null"], "description": "ISO 8601, or a number"})]
RowId = Annotated[Any, WithJsonSchema({"type": ["string", "integer", "null"]})]


class Bar(TypedDict, total=False):
    """One market bar of a row. A null field counts as missing."""

    open: Required[Number]
    high: Required[Number]
    low: Required[Number]
    close: Required[Number]
    volume: Required[Quantity]
    bar_index: WholeNumber | None
    time: Time
    delta: Number | None
    buy_vol: Quantity | None
    sell_vol: Quantity | None
    atr_14: Quantity | None
    ext_dir: Direction
    int_dir: Direction
    ext_bos: Flag
    ext_choch: Flag
    ext_choch_up: Flag
    ext_choch_down: Flag
    int_bos: Flag
    int_choch: Flag
    sweep_prev_high: Flag
    sweep_prev_low: Flag
    fvg_up: Flag
    fvg_down: Flag
    fvg_retest: Flag
    pb_wave_strength_ok: Flag
    mgann_leg_index: Annotated[int, Strict(), Field(ge=1, le=10)] | None
    wave_strength: Annotated[float, Strict(), Field(ge=0, le=100, allow_inf_nan=False)] | None


class WindowRow(TypedDict, total=False):
    """A row that contains bars."""

    context_bars: Required[Annotated[list[Bar], Field(min_length=MIN_BARS - 1, max_length=MAX_BARS - 1)]]
    current_bar: Required[Bar]
    id: RowId
    symbol: Annotated[str, Strict()] | None
    features: dict[str, Number | None] | None


class TextRow(TypedDict, total=False):
    """A row that contains a custom prompt."""

    context: Required[Annotated[str, Strict(), Field(min_length=1, pattern=r"\S")]]
    id: RowId


ORDER_FIELDS = ("bar_index", "time")  # used to order the bars; never read by the model
BAR_FIELDS = tuple(name for name in Bar.__annotations__ if name not in ORDER_FIELDS)
BAR_NAMES = frozenset(Bar.__annotations__)
SPELLED_FIELDS = BAR_NAMES - {"time"}  # `bar_order.py` finds the field with the time
ROW_FIELDS = frozenset(
    {*WindowRow.__annotations__, *TextRow.__annotations__, "label", "label_horizon", "timeframe", "metadata"}
)
WINDOW_ROW_FIELDS = ROW_FIELDS - {"context"}  # a prompt in a row with bars is not read
TEXT_ROW_FIELDS = ROW_FIELDS - {"context_bars", "current_bar", "features"}
# Known to be derived from the label. They are not declared above, so the model cannot read them; `check` reports them.
LABEL_DERIVED_FIELDS = frozenset({"label_confidence", "label_reason", "conditions_met", "conditions_failed", "outcome"})

_PRICES = ("open", "high", "low", "close")
_WINDOW_ROW = TypeAdapter(WindowRow)
_TEXT_ROW = TypeAdapter(TextRow)


@dataclass(frozen=True, slots=True)
class Window:
    """One event: the last bar of `bars`, with its context bars.

    `bars` maps each field that every bar of the row has to float64 values of shape (bars,), oldest first; flags are 0
    or 1. A text row has `text` and no bars. `location` is `file:line`, `label` an index into `LABELS`. `position`
    locates the bars in time; the model never reads it. `lacking` maps each field that only some bars have to the number
    of bars without it, and each null feature to 0. `rounded` counts the bars whose high or low had a rounding error and
    was corrected. `changes` names the other spellings that the row was read from,
    `unknown` the fields of its bars that are not declared. `label_horizon` is the number of bars after the event that
    the label looked at.
    """

    location: str
    id: str | None
    label: int | None
    bars: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    features: dict[str, float] = field(default_factory=dict)
    text: str | None = None
    symbol: str | None = None
    position: WindowPosition = field(default_factory=WindowPosition)
    lacking: Mapping[str, int] = field(default_factory=dict)
    rounded: int = 0
    changes: Changes = frozenset()
    unknown: frozenset[str] = frozenset()
    label_horizon: int | None = None

    @property
    def name(self) -> str:
        return f"{self.id} ({self.location})" if self.id else self.location


class _Invalid(Exception):
    """A row that breaks rules, by `reasons`."""

    def __init__(self, reasons: list[str]) -> None:
        self.reasons = reasons


def parse_row(row: object, location: str, *, labelled: bool) -> tuple[Window | None, list[str]]:
    """Convert one decoded row into a window, or into the reasons why it is invalid."""
    if not isinstance(row, dict):
        return None, [f"a row must be a JSON object, got {short_repr(row)}"]
    side = parse_label_side(row) if labelled else LabelSide()
    reasons = list(side.reasons)
    is_text = "context" in row and "context_bars" not in row
    try:
        if is_text:
            text = _TEXT_ROW.validate_python(row)["context"]
        else:
            unknown = _unknown_fields(row)
            validated, row, changes = _validate_window(row, unknown)
    except ValidationError as error:
        return None, reasons + [_explain(detail) for detail in error.errors(include_url=False)]
    except _Invalid as error:
        return None, reasons + error.reasons
    row_id, faults = _parse_id(row.get("id"))
    reasons = reasons + faults
    if is_text:
        if reasons:
            return None, reasons
        of_text = Window(location, row_id, side.label, text=text, changes=side.changes, label_horizon=side.horizon)
        return of_text, []
    bars = [*validated["context_bars"], validated["current_bar"]]
    rounded = _repair_rounding(bars)
    position, faults = locate_bars([*row["context_bars"], row["current_bar"]], BAR_NAMES)
    reasons = reasons + _price_faults(bars) + faults
    if reasons:
        return None, reasons
    columns, lacking = _columns(bars)
    features = validated.get("features") or {}
    null_features = {f"features.{name}": 0 for name, value in features.items() if value is None}
    return Window(
        location,
        row_id,
        side.label,
        columns,
        {name: value for name, value in features.items() if value is not None},
        symbol=(validated.get("symbol") or "").strip() or None,
        position=position,
        lacking=position.lacking | lacking | null_features,
        rounded=rounded,
        changes=changes | side.changes,
        unknown=unknown,
        label_horizon=side.horizon,
    ), []


def _unknown_fields(row: Mapping[str, Any]) -> frozenset[str]:
    """Fields of the bars that `Bar` does not declare; the row may be invalid."""
    current, others = row.get("current_bar"), row.get("context_bars")
    bars = [*(others if isinstance(others, list) else ()), current]
    return frozenset[str]().union(*(bar for bar in bars if isinstance(bar, dict))) - BAR_NAMES


def _validate_window(row: dict[str, Any], unknown: frozenset[str]) -> tuple[Any, dict[str, Any], Changes]:
    """The validated row, the row as read, and what was changed to read it. Raises ValidationError or _Invalid."""
    if not any(known_spelling(name, SPELLED_FIELDS) for name in unknown):
        try:
            return _WINDOW_ROW.validate_python(row), row, frozenset()
        except ValidationError:
            pass
    row, changes = normalise_row(row, SPELLED_FIELDS)
    try:
        return _WINDOW_ROW.validate_python(row), row, changes
    except ValidationError as error:
        raise _Invalid([_explain(detail, changes) for detail in error.errors(include_url=False)]) from None


def unread_fields(row: Mapping[str, Any], window: Window) -> set[str]:
    """Fields of a valid row that no code reads; those of bars are prefixed with `bars.`."""
    if window.text is not None:
        return row.keys() - TEXT_ROW_FIELDS
    read_as_others = {found for kind, found, _ in window.changes if kind == "name"}
    in_bars = window.unknown - read_as_others - {window.position.time_name}
    return (row.keys() - WINDOW_ROW_FIELDS) | {f"bars.{name}" for name in in_bars}


def _parse_id(value: object) -> tuple[str | None, list[str]]:
    if value is None or (isinstance(value, str | int) and not isinstance(value, bool)):
        return (None if value is None else str(value)), []
    return None, [f"id must be text or a whole number, got {short_repr(value)}"]


def _columns(bars: Sequence[Mapping[str, Any]]) -> tuple[dict[str, NDArray[np.float64]], dict[str, int]]:
    """Fields that every bar has, each of shape (bars,), and for the others the number of bars that lack them.

    Delta is buying minus selling volume. It is 0 if both are equal up to rounding.
    """
    columns, lacking = {}, {}
    for name in BAR_FIELDS:
        values = [bar.get(name) for bar in bars]
        missing = values.count(None)
        if not missing:
            columns[name] = np.array(values, dtype=np.float64)
        elif missing < len(bars):
            lacking[name] = missing
    if "delta" not in columns:
        flows = {"buy_vol", "sell_vol"} & columns.keys()
        if len(flows) == 2:
            buying, selling = columns["buy_vol"], columns["sell_vol"]
            lacking.pop("delta", None)
            columns["delta"] = np.where(np.abs(buying - selling) <= REL_TOL * (buying + selling), 0.0, buying - selling)
            columns = {name: columns[name] for name in BAR_FIELDS if name in columns}  # as a table has them
        elif flows:
            (other,) = {"buy_vol", "sell_vol"} - flows
            lacking.setdefault(other, len(bars))
    return columns, lacking


def _repair_rounding(bars: Sequence[Any]) -> int:
    """Correct high and low, in place, if they are off by rounding only. Returns the number of corrected bars."""
    repaired = 0
    for bar in bars:
        prices = bar["open"], bar["high"], bar["low"], bar["close"]
        highest, lowest = max(prices), min(prices)
        if bar["high"] == highest and bar["low"] == lowest:
            continue
        if isclose(bar["high"], highest, rel_tol=REL_TOL) and isclose(bar["low"], lowest, rel_tol=REL_TOL):
            bar["high"], bar["low"] = highest, lowest
            repaired += 1
    return repaired


def _price_faults(bars: Sequence[Mapping[str, Any]]) -> list[str]:
    reasons = []
    for index, bar in enumerate(bars):
        low, high = bar["low"], bar["high"]
        if not low <= min(bar["open"], bar["close"]) <= max(bar["open"], bar["close"]) <= high:
            prices = ", ".join(f"{name} {repr(bar[name]).removesuffix('.0')}" for name in _PRICES)
            reasons.append(f"{bar_name(index, len(bars))} must have low ≤ open, close ≤ high, got {prices}")
    return reasons


def _explain(detail: ErrorDetails, changes: Changes = frozenset()) -> str:
    """One pydantic error as `path rule, got value`; fields have the names of the row before the `changes`."""
    path, given = "", {field: found for kind, found, field in changes if kind == "name"}
    for part in (given.get(str(part), part) for part in detail["loc"]):
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    if detail["type"] == "missing":
        return f"{path} is missing"
    if detail["type"] in ("too_short", "too_long"):
        return (
            f"a window must have {MIN_BARS} to {MAX_BARS} bars, current_bar included, "
            f"got {detail['ctx']['actual_length'] + 1}"
        )
    if detail["type"] == "string_pattern_mismatch":
        return f"{path} must contain text, got only blanks"
    rule = detail["msg"].replace("Input should be", "must be")
    for python_name, json_name in (
        ("True, False", "true, false"),
        ("dictionary", "object"),
        ("list", "array"),
    ):
        rule = rule.replace(python_name, json_name)
    return f"{path} {rule}, got {short_repr(detail['input'])}"
