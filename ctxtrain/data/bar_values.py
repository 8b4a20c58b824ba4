"""The values of validated bars: columns, corrected rounding errors, price faults, and the fields a user declares.

Input: the bars of a row, oldest first. Output: columns of shape (bars,), and the reasons why bars are invalid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isclose, isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctxtrain.config.value_types import FieldKind
from ctxtrain.data.bar_order import bar_name
from ctxtrain.data.outliers import REL_TOL
from ctxtrain.data.row_schema import BAR_FIELDS, MAX_MAGNITUDE, MAX_WORD_CHARS, PRICES, OwnFields
from ctxtrain.errors import short_repr

Columns = dict[str, NDArray[np.float64]]
Bars = Sequence[Mapping[str, Any]]

FLOAT32_TOL = 2.0**-22  # relative; prices that passed through float32 differ by up to two units in the last place
MAX_ROUNDING = 1e-4  # relative; no correction is larger, however few decimals the prices have
_OWN_RULES: dict[FieldKind, str] = {
    "number": f"a number of at most {MAX_MAGNITUDE:g}",
    "flag": "true, false, 0 or 1",
    "count": f"a whole number, 0 to {MAX_MAGNITUDE:g}",
    "category": f"a word of at most {MAX_WORD_CHARS} characters, or a whole number",
}


def bar_columns(bars: Bars) -> tuple[Columns, dict[str, int]]:
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


def own_columns(bars: Bars, own: OwnFields) -> tuple[Columns, dict[str, tuple[str, ...]], dict[str, int]]:
    """Declared fields that every bar has, as numbers and as words, and the number of bars that lack the others."""
    numbers: Columns = {}
    words: dict[str, tuple[str, ...]] = {}
    lacking: dict[str, int] = {}
    for name, kind in own.items():
        values = [bar.get(name) for bar in bars]
        missing = values.count(None)
        if 0 < missing < len(bars):
            lacking[name] = missing
        elif not missing and kind == "category":
            words[name] = tuple(str(value).strip() for value in values)
        elif not missing:
            numbers[name] = np.array(values, dtype=np.float64)
    return numbers, words, lacking


def own_faults(bars: Bars, own: OwnFields) -> list[str]:
    """Values of declared fields that are not of their kind; null counts as missing."""
    return [
        f"{bar_name(index, len(bars))}.{name} must be {_OWN_RULES[kind]}, got {short_repr(bar[name])}"
        for index, bar in enumerate(bars)
        for name, kind in own.items()
        if bar.get(name) is not None and not _is_of_kind(bar[name], kind)
    ]


def _is_of_kind(value: Any, kind: FieldKind) -> bool:
    if kind == "category":
        is_word = isinstance(value, str) and 0 < len(value.strip()) <= MAX_WORD_CHARS
        return is_word or isinstance(value, int)
    if kind == "flag":
        return isinstance(value, bool) or (isinstance(value, int) and value in (0, 1))
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        return False
    return isinstance(value, int) and 0 <= value <= MAX_MAGNITUDE if kind == "count" else abs(value) <= MAX_MAGNITUDE


def repair_rounding(bars: Sequence[Any]) -> int:
    """Correct high and low, in place, if they are off by rounding only. Returns the number of corrected bars.

    A high may lie below the open or close, or a low above them, by as much as rounding can explain: the precision of
    float32, or half of the last decimal that the highs, or the lows, of the window have.
    """
    repaired = 0
    half_steps: dict[str, float] = {}
    for bar in bars:
        prices = bar["open"], bar["high"], bar["low"], bar["close"]
        highest, lowest = max(prices), min(prices)
        if bar["high"] == highest and bar["low"] == lowest:
            continue
        for name in ("high", "low"):
            if name not in half_steps:
                half_steps[name] = 0.5 * 10.0 ** -max(decimals(each[name]) for each in bars)
        if all(
            isclose(bar[name], extreme, rel_tol=FLOAT32_TOL)
            or (
                abs(bar[name] - extreme) <= half_steps[name] * (1 + 1e-6)
                and isclose(bar[name], extreme, rel_tol=MAX_ROUNDING)
            )
            for name, extreme in (("high", highest), ("low", lowest))
        ):
            bar["high"], bar["low"] = highest, lowest
            repaired += 1
    return repaired


def decimals(price: float) -> int:
    """Digits after the point of the shortest text of a number; 17 for one written with an exponent."""
    text = repr(float(price))
    return 17 if "e" in text else len(text.partition(".")[2].removesuffix("0") or "")


def price_faults(bars: Bars) -> list[str]:
    reasons = []
    for index, bar in enumerate(bars):
        low, high = bar["low"], bar["high"]
        if not low <= min(bar["open"], bar["close"]) <= max(bar["open"], bar["close"]) <= high:
            prices = ", ".join(f"{name} {repr(bar[name]).removesuffix('.0')}" for name in PRICES)
            reasons.append(f"{bar_name(index, len(bars))} must have low ≤ open, close ≤ high, got {prices}")
    return reasons
