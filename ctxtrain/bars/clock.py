"""Times of the bars of a file → UTC, and what a stamp means.

Input: a `Source` with its time columns, and what the user says about zone and stamps. Output: `BarTimes` with the stamp
of each bar in UTC, whether stamps are opens or closes, and notes. Bars may run oldest or newest first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctxtrain.bars.names import plain_name
from ctxtrain.bars.read import Source
from ctxtrain.bars.time_text import ParsedTimes, parse_times
from ctxtrain.bars.time_zones import find_zone, to_utc
from ctxtrain.data.time_units import SECOND, format_utc
from ctxtrain.errors import ConfigError, DataError

Ints = NDArray[np.int64]

HOUR = 3600 * SECOND
_CLOSES = frozenset({"closetime", "closetimestamp", "closets", "endtime", "barend"})


@dataclass(frozen=True)
class BarTimes:
    """Stamps of the bars in UTC nanoseconds, in the order of the file. `is_naive` is true if UTC was assumed."""

    stamps_T: Ints
    stamp: str
    is_naive: bool
    notes: list[str]


def read_bar_times(
    source: Source,
    chosen: Mapping[str, str],
    rows_T: Ints,
    symbols_T: NDArray[Any],
    time_zone: str | None,
    stamp: str | None,
    dates: str | None,
) -> BarTimes:
    """The times of the bars.

    Raises DataError for times that cannot be read or go back by an hour, ConfigError for an unknown zone.
    """
    times = source.table[chosen["time"]]
    times_of_day = source.table[chosen["clock"]] if "clock" in chosen else None
    if len(rows_T) < source.table.num_rows:
        times, times_of_day = times.take(rows_T), times_of_day.take(rows_T) if times_of_day is not None else None

    def place(bar: int) -> str:
        return source.place(int(rows_T[bar]))

    parsed = parse_times(times, times_of_day, dates, place)
    stamps_T, zone_note, is_naive = _in_utc(source, parsed, symbols_T, time_zone, place)
    notes = [f"times: {parsed.description}, {zone_note}"]
    stamps_T, order_notes = _check_order(stamps_T, symbols_T, is_naive, place)
    notes += order_notes
    if dates and not parsed.description.endswith((", day first", ", month first")):
        notes.append("--dates has no effect: the times show day and month")
    if stamp:
        meaning, why = stamp, "from --stamp"
    else:
        meaning, why = _detect_stamp(source, chosen, parsed)
    notes.append(f"stamps: {meaning} of the bar, {why}")
    return BarTimes(stamps_T, meaning, is_naive, notes)


def market_orders(symbols_T: NDArray[Any], stamps_T: Ints) -> list[tuple[Ints, bool]]:
    """The bars of each symbol, oldest first, and whether the file has them newest first."""
    orders = []
    for symbol in np.unique(symbols_T):
        bars = np.flatnonzero(symbols_T == symbol)
        steps = np.diff(stamps_T[bars])
        is_newest_first = bool((steps < 0).sum() > (steps > 0).sum())
        orders.append((bars[::-1] if is_newest_first else bars, is_newest_first))
    return orders


def _in_utc(
    source: Source, parsed: ParsedTimes, symbols_T: NDArray[Any], time_zone: str | None, place: Any
) -> tuple[Ints, str, bool]:
    """Stamps in UTC, how they were converted, and whether UTC is only assumed."""
    is_epoch = "since 1970" in parsed.description
    if parsed.dates_only:
        unused = "; --time-zone has no effect on them" if time_zone else ""
        return parsed.stamps_T, f"dates without a time of day are days in UTC{unused}", False
    if (parsed.is_utc and not (is_epoch and time_zone)) or (len(parsed.zones_T) and time_zone):
        if time_zone:
            rule = "--time-zone is for times without a zone"
            raise ConfigError(f"{source.path}: {rule}, but the times of this file have one. Leave --time-zone out.")
        return parsed.stamps_T, "in UTC" if is_epoch else "with a zone", False
    known = len(parsed.zones_T) > 0
    names = np.unique(parsed.zones_T).tolist() if known else [time_zone]
    if names == [None]:
        return parsed.stamps_T, "without a zone, taken as UTC; --time-zone names another", True
    utc_T = parsed.stamps_T.copy()
    missing, repeated, guessed = list[int](), 0, 0
    for name in names:
        zone = find_zone(str(name))
        if zone is None:
            rule = "a time zone must be a name of the tz database"
            remedy = "Use --time-zone with a name such as America/New_York"
            raise ConfigError(f"{source.path}: {rule}, got {name!r}. {remedy}.")
        for bars, _ in market_orders(symbols_T, parsed.stamps_T):
            bars = bars if not known else bars[parsed.zones_T[bars] == name]  # noqa: PLW2901
            result = to_utc(parsed.stamps_T[bars], zone)
            utc_T[bars] = result.utc_T
            missing += bars[result.missing].tolist()
            repeated, guessed = repeated + result.repeated, guessed + result.guessed
    zones = ", ".join(map(str, names))
    if missing:
        rule = f"a time must exist in {zones}, but daylight saving leaves its hour out"
        remedy = "Give the zone of the file with --time-zone"
        raise DataError([f"{place(bar)}: {rule}. {remedy}." for bar in sorted(missing)])
    notes = f"in {zones}, " + ("from --time-zone" if time_zone else "from the file")
    if repeated:
        notes += f"; {repeated:,} bars in an hour that daylight saving repeats"
    if guessed:
        notes += f", {guessed:,} of them in an hour that fits both, taken as the first"
    return utc_T, notes, False


def _check_order(stamps_T: Ints, symbols_T: NDArray[Any], is_naive: bool, place: Any) -> tuple[Ints, list[str]]:
    """What was found about the order of the bars. Raises DataError if naive times go back by an hour."""
    notes, unordered, newest = [], 0, False
    for bars, is_newest_first in market_orders(symbols_T, stamps_T):
        newest |= is_newest_first
        ordered = stamps_T[bars]
        steps = np.diff(ordered)
        back = np.flatnonzero(steps < 0)
        if is_naive and len(back) and (steps[back] >= -HOUR).all() and len(np.unique(ordered)) < len(ordered):
            at = int(bars[back[0] + 1])
            raise DataError(
                f"{place(at)}: times without a zone must not go back, but they go from "
                f"{format_utc(int(ordered[back[0]]))} to {format_utc(int(ordered[back[0] + 1]))}, as where daylight "
                "saving ends. Give the zone with --time-zone, such as --time-zone Europe/Athens."
            )
        unordered += len(back)
    if newest:
        notes.append("bars run newest first; sorted")
    if unordered:
        notes.append(f"{unordered:,} bars are out of order; sorted")
    return stamps_T, notes


def _detect_stamp(source: Source, chosen: Mapping[str, str], parsed: ParsedTimes) -> tuple[str, str]:
    """`open` or `close`, and the reason."""
    if plain_name(chosen["time"]).rpartition(".")[2] in _CLOSES:
        return "close", f"because the column is {chosen['time']}"
    if any(name.startswith("mtf_context.") for name in source.names):
        return "close", "as an exporter inside NinjaTrader stamps bars; --stamp open changes it"
    if not source.has_names and source.separator == ";" and parsed.compact and not parsed.dates_only:
        return "close", "as NinjaTrader exports them; --stamp open changes it"
    return "open", "as most programs write them; --stamp close changes it"
