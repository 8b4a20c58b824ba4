"""The options of `ctxtrain windows` about events, windows, labels and the split.

Input: texts of the command line. Output: `WindowOptions`, or a ConfigError with one line per wrong option.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctxtrain.bars.file_bars import ReadOptions
from ctxtrain.bars.names import parse_columns
from ctxtrain.data.row_schema import MAX_BARS, MAX_MAGNITUDE, MIN_BARS
from ctxtrain.data.time_units import SECOND
from ctxtrain.errors import ConfigError, short_repr

Floats = NDArray[np.float64]

TRIPLE_BARRIER = "triple-barrier"
EVERY = "every"
DEFAULT_PROFIT, DEFAULT_STOP, DEFAULT_HORIZON, DEFAULT_COST = "1.5atr", "1atr", 20, "0"
MAX_HORIZON = 10_000
MAX_HIGHER = 100_000  # bars; 100,000 one-minute bars are ten weeks
MAX_STEP = MAX_GAP = 10**9  # bars, more than any file has
MAX_LENGTH = 366 * 86_400 * SECOND
_MAX_DIGITS = 12
_DISTANCE = re.compile(r"(\d+\.?\d*|\.\d+) ?(atr|%|)", re.IGNORECASE)
_LENGTH = re.compile(r"(\d{1,6}) ?(s|m|h|d|w)", re.IGNORECASE)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}


@dataclass(frozen=True)
class Distance:
    """A distance from a price: `amount` times the ATR, percent of the price, or price units."""

    amount: float
    unit: str
    text: str

    def in_price(self, price_E: Floats, atr_E: Floats) -> Floats:
        if self.unit == "atr":
            return self.amount * atr_E
        if self.unit == "%":
            return self.amount / 100 * np.abs(price_E)
        return np.full_like(price_E, self.amount)


@dataclass(frozen=True)
class Barriers:
    """The trade of each event: its profit, stop and cost, and the bars until it is closed."""

    profit: Distance
    stop: Distance
    horizon: int
    cost: Distance


@dataclass(frozen=True)
class WindowOptions:
    """`events` is `every`, a number of bars, or a name. `barriers` is None if no outcome is computed.

    `label` is `triple-barrier` or a column. `max_gap` is in bars, None for the default.
    """

    events: str | int
    bars: int
    structure: bool
    higher: int | None
    label: str
    barriers: Barriers | None
    split: tuple[int, int, int]
    max_gap: int | None


def parse_read_options(
    *,
    symbol: str | None,
    time_zone: str | None,
    stamp: str | None,
    bar_length: str | None,
    columns: str | None,
    decimal: str | None,
    separator: str | None,
    dates: str | None,
    fields: str | None,
) -> ReadOptions:
    """The options about the files. Raises ConfigError with every wrong option."""
    pairs, faults = parse_columns(columns or "")
    texts = {"symbol": symbol, "time-zone": time_zone, "bar-length": bar_length, "separator": separator}
    faults += [f"{name} must not be empty. Leave --{name} out." for name, text in texts.items() if text == ""]
    for name, value, allowed in (
        ("stamp", stamp, ("open", "close")),
        ("decimal", decimal, (".", ",")),
        ("dates", dates, ("dmy", "mdy")),
    ):
        if value not in (None, *allowed):
            faults.append(
                f"{name} must be {' or '.join(allowed)}, got {value!r}. Leave it out to detect it in the file."
            )
    separator = {"tab": "\t", "\\t": "\t"}.get(separator or "", separator)
    if separator is not None and len(separator.encode()) != 1:
        faults.append(f"separator must be one character or tab, got {separator!r}. Use --separator tab, or ';'.")
    length = None
    if bar_length:
        match = _LENGTH.fullmatch(bar_length.strip())
        length = int(match[1]) * _SECONDS[match[2].lower()] * SECOND if match else 0
        if not 0 < length <= MAX_LENGTH:
            rule = "bar-length must be a number with s, m, h, d or w, of at most 366d"
            faults.append(f"{rule}, got {short_repr(bar_length)}. Use 5m.")
    if faults:
        raise ConfigError(faults)
    names = _names(fields)
    return ReadOptions(symbol, time_zone, stamp, length, pairs, decimal, separator, dates, names)


def parse_window_options(
    *,
    events: str,
    bars: int,
    structure: bool,
    higher: int | None,
    label: str,
    profit: str | None,
    stop: str | None,
    horizon: int | None,
    cost: str | None,
    split: str,
    max_gap: int | None,
) -> WindowOptions:
    """The options about events, windows, labels and the split. Raises ConfigError with every wrong option."""
    faults: list[str] = []
    chosen: str | int = events
    if re.fullmatch(r"[+-]?\d+", events):
        chosen = int(events[:_MAX_DIGITS])
        if not 1 <= chosen <= MAX_STEP or len(events) > _MAX_DIGITS:
            rule = f"events must be every, a number of bars from 1 to {MAX_STEP:,}, or a name"
            faults.append(f"{rule}, got {short_repr(events)}. Use every or 10.")
    if not MIN_BARS <= bars <= MAX_BARS:
        faults.append(f"bars must be from {MIN_BARS} to {MAX_BARS}, got {bars}. Use 50.")
    if higher is not None and not 2 <= higher <= MAX_HIGHER:  # one bar is no higher timeframe
        faults.append(f"higher must be from 2 to {MAX_HIGHER:,} bars, got {short_repr(higher)}. Use 5, M5 on M1 bars.")
    if horizon is not None and not 1 <= horizon <= MAX_HORIZON:
        faults.append(f"horizon must be from 1 to {MAX_HORIZON:,} bars, got {horizon}. Use {DEFAULT_HORIZON}.")
    if max_gap is not None and not 0 <= max_gap <= MAX_GAP:
        rule = f"max-gap must be from 0 to {MAX_GAP:,} bars, got {short_repr(max_gap)}"
        faults.append(f"{rule}. Use 0 for windows without any gap.")
    shares = _shares(split, faults)
    barriers = None
    if label == TRIPLE_BARRIER or any(given is not None for given in (profit, stop, horizon, cost)):
        barriers = Barriers(
            _distance("profit", profit or DEFAULT_PROFIT, faults),
            _distance("stop", stop or DEFAULT_STOP, faults),
            horizon or DEFAULT_HORIZON,
            _distance("cost", cost or DEFAULT_COST, faults, least=0.0),
        )
    if faults:
        raise ConfigError(faults)
    return WindowOptions(chosen, bars, structure, higher, label, barriers, shares, max_gap)


def describe_arguments(read: ReadOptions, options: WindowOptions) -> dict[str, Any]:
    """The options as plain values for the data card."""
    barriers = options.barriers
    given = {
        "symbol": read.symbol,
        "time_zone": read.time_zone,
        "stamp": read.stamp,
        "bar_length": f"{read.bar_length // SECOND}s" if read.bar_length else None,
        "columns": dict(read.columns),
        "decimal": read.decimal,
        "separator": read.separator,
        "dates": read.dates,
        "fields": list(read.fields),
        "events": options.events,
        "bars": options.bars,
        "structure": options.structure,
        "higher": options.higher,
        "label": options.label,
        "split": list(options.split),
        "max_gap": options.max_gap,
    }
    if barriers:
        given |= {
            "profit": barriers.profit.text,
            "stop": barriers.stop.text,
            "horizon": barriers.horizon,
            "cost": barriers.cost.text,
        }
    return given


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in (text or "").split(",") if name.strip()))


def _distance(name: str, text: str, faults: list[str], least: float = 1e-12) -> Distance:
    match = _DISTANCE.fullmatch(text.strip())
    amount = float(match[1]) if match else -1.0
    if not match or not least <= amount <= MAX_MAGNITUDE:
        least_text = "above 0" if least else "of 0 or more"
        rule = f"{name} must be a number {least_text}, up to {MAX_MAGNITUDE:g}, in atr, % or price"
        faults.append(f"{rule}, got {short_repr(text)}. Use 1.5atr, 0.4% or 2.5.")
    return Distance(amount, match[2].lower() if match else "", text.strip())


def _shares(text: str, faults: list[str]) -> tuple[int, int, int]:
    parts: Sequence[str] = text.split(",")
    whole = [int(part) for part in parts if re.fullmatch(r" *\d{1,3} *", part)]
    if len(whole) != len(parts) or len(whole) != 3 or sum(whole) != 100 or min(whole) < 1:
        faults.append(
            f"split must be three whole percentages of at least 1 that sum to 100, got {text!r}. Use 70,15,15."
        )
        return (70, 15, 15)
    return (whole[0], whole[1], whole[2])
