"""A decoded row becomes a window, or the reasons why it is none.

Comes in: the JSON object of an event, as a CTX window (`context_bars` + `current_bar`) or as text (`context`). Goes
out: a `Window`. Only the fields declared here are read (an allow-list): label-side fields such as `conditions_met`
cannot reach the model because no code looks at them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from typing import Annotated, Any, Literal, Required

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, Strict, TypeAdapter, ValidationError, WithJsonSchema
from pydantic_core import ErrorDetails
from typing_extensions import TypedDict

from ml.errors import shown
from ml.labels import LABELS

MIN_BARS, MAX_BARS = 30, 50
_YEAR_2200 = datetime(2200, 1, 1, tzinfo=UTC).timestamp()
LARGEST = 1e15  # beyond any market, and small enough that no sum of squares overflows

Number = Annotated[float, Strict(), Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]
Quantity = Annotated[float, Strict(), Field(ge=0, le=LARGEST, allow_inf_nan=False)]
Flag = Literal[True, False, 0, 1] | None
Direction = Literal[-1, 0, 1] | None
# Any, because they are read by `_clock` and `_identity`.
Time = Annotated[Any, WithJsonSchema({"type": ["string", "number", "null"], "description": "ISO 8601, or a number"})]
Identity = Annotated[Any, WithJsonSchema({"type": ["string", "integer", "null"]})]


class Bar(TypedDict, total=False):
    """One market bar as it stands in a row. A field given as null counts as not given."""

    open: Required[Number]
    high: Required[Number]
    low: Required[Number]
    close: Required[Number]
    volume: Required[Quantity]
    bar_index: Annotated[int, Strict()] | None
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
    """A row that holds bars."""

    context_bars: Required[Annotated[list[Bar], Field(min_length=MIN_BARS - 1, max_length=MAX_BARS - 1)]]
    current_bar: Required[Bar]
    id: Identity
    symbol: Annotated[str, Strict()] | None
    features: dict[str, Number] | None


class TextRow(TypedDict, total=False):
    """A row that holds a prompt of the user's own."""

    context: Required[Annotated[str, Strict(), Field(min_length=1, pattern=r"\S")]]
    id: Identity


PLACE_FIELDS = ("bar_index", "time")  # they order the bars and never reach the model
BAR_FIELDS = tuple(name for name in Bar.__annotations__ if name not in PLACE_FIELDS)
BAR_NAMES = frozenset(Bar.__annotations__)
ROW_FIELDS = frozenset({*WindowRow.__annotations__, *TextRow.__annotations__, "label", "timeframe", "metadata"})
TEXT_ROW_FIELDS = ROW_FIELDS - {"context_bars", "current_bar", "features"}
# Known to tell the label or to follow from it. Like every field that is not declared above, no code reads them.
LABEL_SIDE = frozenset({"label_confidence", "label_reason", "conditions_met", "conditions_failed"})

_WINDOW_ROW = TypeAdapter(WindowRow)
_TEXT_ROW = TypeAdapter(TextRow)


@dataclass(frozen=True, slots=True)
class Window:
    """One event: the last bar of `bars`, with the bars before it.

    `bars` maps each field that every bar of the row carries to float64 values of shape (bars,), oldest first;
    flags are 0 or 1. A text row has `text` and no bars. `label` indexes `LABELS`. `stamps` (seconds since 1970) and
    `bar_indices` place every bar, shape (bars,), or are None; the model never reads them.
    """

    place: str
    id: str | None
    label: int | None
    bars: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    features: dict[str, float] = field(default_factory=dict)
    text: str | None = None
    symbol: str | None = None
    stamps: NDArray[np.float64] | None = None
    bar_indices: NDArray[np.float64] | None = None

    @property
    def name(self) -> str:
        return f"{self.id} ({self.place})" if self.id else self.place


def parse_row(row: object, place: str, *, labelled: bool) -> tuple[Window | None, list[str]]:
    """Turn one decoded row into a window, or into the reasons why it is none."""
    if not isinstance(row, dict):
        return None, [f"a row must be a JSON object, got {shown(row)}"]
    label, reasons = _label(row) if labelled else (None, [])
    is_text = "context" in row and "context_bars" not in row
    try:
        if is_text:
            text = _TEXT_ROW.validate_python(row)["context"]
        else:
            checked = _WINDOW_ROW.validate_python(row)
    except ValidationError as error:
        return None, reasons + [_explain(detail) for detail in error.errors(include_url=False)]
    identity, faults = _identity(row.get("id"))
    reasons = reasons + faults
    if is_text:
        return (None, reasons) if reasons else (Window(place, identity, label, text=text), [])
    bars = [*checked["context_bars"], checked["current_bar"]]
    reasons = reasons + _bar_faults(bars)
    if reasons:
        return None, reasons
    return Window(
        place,
        identity,
        label,
        _columns(bars),
        checked.get("features") or {},
        symbol=checked.get("symbol"),
        stamps=_places(bars, "time", _clock),
        bar_indices=_places(bars, "bar_index", float),
    ), []


def unread_fields(row: Mapping[str, Any], *, is_text: bool) -> set[str]:
    """The fields of a valid row that no code reads; one of a bar is `bars.` and its name."""
    if is_text:
        return row.keys() - TEXT_ROW_FIELDS
    in_bars = set(row["current_bar"]).union(*row["context_bars"]) - BAR_NAMES
    return (row.keys() - ROW_FIELDS) | {f"bars.{name}" for name in in_bars}


def _places(bars: Sequence[Mapping[str, Any]], name: str, read: Callable[[Any], float]) -> NDArray[np.float64] | None:
    """Where every bar stands, of shape (bars,); None if a bar does not say."""
    values = [bar.get(name) for bar in bars]
    return None if None in values else np.array([read(value) for value in values], dtype=np.float64)


def _identity(value: object) -> tuple[str | None, list[str]]:
    if value is None or (isinstance(value, str | int) and not isinstance(value, bool)):
        return (None if value is None else str(value)), []
    return None, [f"id must be text or a whole number, got {shown(value)}"]


def _columns(bars: Sequence[Mapping[str, Any]]) -> dict[str, NDArray[np.float64]]:
    """The fields that every bar carries, each of shape (bars,); delta is buying minus selling volume."""
    columns = {}
    for name in BAR_FIELDS:
        values = [bar.get(name) for bar in bars]
        if None not in values:
            columns[name] = np.array(values, dtype=np.float64)
    if "delta" not in columns and {"buy_vol", "sell_vol"} <= columns.keys():
        columns["delta"] = columns["buy_vol"] - columns["sell_vol"]
    return columns


def _label(row: Mapping[str, Any]) -> tuple[int | None, list[str]]:
    value = row.get("label")
    if isinstance(value, str) and value.upper() in LABELS:
        return LABELS.index(value.upper()), []
    if value is None:
        return None, [f"label is missing; it must be {', '.join(LABELS)} in any case"]
    return None, [f"label must be {', '.join(LABELS)} in any case, got {shown(value)}"]


def _bar_faults(bars: Sequence[Mapping[str, Any]]) -> list[str]:
    reasons = []
    for index, bar in enumerate(bars):
        low, high = bar["low"], bar["high"]
        if not low <= min(bar["open"], bar["close"]) <= max(bar["open"], bar["close"]) <= high:
            reasons.append(
                f"{_bar_name(index, bars)} must have low ≤ open, close ≤ high, got "
                f"open {bar['open']:g}, high {high:g}, low {low:g}, close {bar['close']:g}"
            )
    try:
        for name, read in (("bar_index", float), ("time", _clock)):
            stamps = [read(bar[name]) if bar.get(name) is not None else None for bar in bars]
            reasons += _order_faults(name, stamps, bars)
    except ValueError as error:
        reasons.append(str(error))
    return reasons


def _order_faults(name: str, stamps: Sequence[float | None], bars: Sequence[Mapping[str, Any]]) -> list[str]:
    """Bars run forwards: each stamp is later than those before it. Only the first step back is named."""
    known = [(index, stamp) for index, stamp in enumerate(stamps) if stamp is not None]
    for (last, before), (index, stamp) in pairwise(known):
        if stamp <= before:
            step = f"{shown(bars[last][name])} to {shown(bars[index][name])}"
            told = ": a bar of the context lies after the event" if index == len(bars) - 1 and stamp < before else ""
            return [f"bars must run oldest first, but {name} goes from {step} at {_bar_name(index, bars)}{told}"]
    return []


def _clock(value: object) -> float:
    """Seconds since 1970 of ISO 8601 text (no zone is UTC), or the number itself."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    with suppress(ValueError, TypeError):
        moment = datetime.fromisoformat(value)  # type: ignore[arg-type]  # a TypeError is handled
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    raise ValueError(f"time must be ISO 8601 text or a number, got {shown(value)}")


def ends(place: NDArray[np.float64] | None) -> tuple[float, float] | None:
    """First and last of a window's stamps or bar indices, where it has them."""
    return None if place is None else (float(place[0]), float(place[-1]))


def moment(stamp: float) -> str | None:
    """ISO 8601 in UTC of a window's time; None for a number that is no second of 1970 to 2199."""
    if not 0 <= stamp < _YEAR_2200:
        return None
    return datetime.fromtimestamp(stamp, UTC).isoformat(timespec="seconds")


def _bar_name(index: int, bars: Sequence[object]) -> str:
    return "current_bar" if index == len(bars) - 1 else f"context_bars[{index}]"


def _explain(detail: ErrorDetails) -> str:
    """One pydantic error as `path rule, got value`."""
    path = ""
    for part in detail["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    if detail["type"] == "missing":
        return f"{path} is missing"
    if detail["type"] in ("too_short", "too_long"):
        return (
            f"a window must have {MIN_BARS} to {MAX_BARS} bars, current_bar included, "
            f"got {detail['ctx']['actual_length'] + 1}"
        )
    if detail["type"] == "string_pattern_mismatch":
        return f"{path} must hold text, got only blanks"
    rule = detail["msg"].replace("Input should be", "must be")
    for python_name, json_name in (
        ("True, False", "true, false"),
        ("dictionary", "object"),
        ("list", "array"),
    ):
        rule = rule.replace(python_name, json_name)
    return f"{path} {rule}, got {shown(detail['input'])}"
