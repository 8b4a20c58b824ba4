"""Statistics of windows, which the embedded base model learns to predict from the windows' text.

Input: `WindowArrays`, many windows as arrays of shape (W, L), aligned at the event, the last of the L bars. Output:
`bar_statistics`, arrays of shape (W, L) whose value at a bar depends on no later bar, and `event_statistics`, arrays of
shape (W,) that also describe segments and shapes of the whole window. A statistic that does not exist is NaN.

Values have the units of `features.py`: prices in window ranges, volume and delta as z-scores. No statistic uses a
label.

Legend: W windows, L bars of the longest window, k bars of a look-back.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from ctxtrain.data.codec import PULSES
from ctxtrain.pretraining.window_arrays import Bools, Floats, Ints, Table, WindowArrays

LOOK_BACKS = (2, 3, 5, 8, 13, 21, 34)
LAGS = (0, 1, 2, 3, 4, 5, 8, 13, 21)
# Segments: first and last bar counted back from the event, and as shares of the window.
SEGMENTS = ((0, 5), (3, 6), (5, 10), (6, 10), (10, 15), (10, 20), (15, 20), (20, 30), (0, 10), (0, 20), (0, 30))
SHARES = ((0, 1 / 4), (1 / 4, 1 / 2), (1 / 2, 3 / 4), (3 / 4, 1), (0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1), (0, 1))
TURN_SIZES = (1.5, 3.0)  # moves against a leg, in mean true ranges, that end it
BINARY = "is_"  # name prefix of statistics that are 0 or 1


def bar_statistics(windows: WindowArrays) -> Table:
    """Statistics at each bar, from the bars up to it."""
    table = _look_backs(windows)
    table |= _extremes(windows)
    for turn in TURN_SIZES:
        table |= _zigzag_legs(windows, turn)
    table |= _flags(windows)
    return {name: np.where(windows.exists, values, np.nan) for name, values in table.items()}


def event_statistics(windows: WindowArrays) -> Table:
    """Statistics at the event, from single bars, segments and the shape of the window."""
    bars_W = windows.exists.sum(axis=1)
    table: Table = {"bars": bars_W.astype(np.float64), "bar_range": windows.bar_range_W}
    for lag in LAGS:
        for name in ("high", "low", "close", "volume", "delta"):
            table[f"{name}@{lag}"] = getattr(windows, name)[:, -1 - lag]
    length = windows.close.shape[1]
    ago = np.arange(length)[::-1]
    for first, stop in SEGMENTS:
        inside = (ago >= first) & (ago < stop) & (bars_W >= stop)[:, None]
        table |= _segment(windows, inside, f"{first}-{stop}")
    for left, right in SHARES:
        from_start = ago[::-1] - (length - bars_W[:, None])
        inside = (from_start >= np.rint(left * bars_W)[:, None]) & (from_start < np.rint(right * bars_W)[:, None])
        table |= _segment(windows, inside, f"{left:.2f}-{right:.2f}")
    table |= _contrasts(table)
    table |= _landmarks(windows, ago)
    return table


def _running(values: Floats, k: int) -> Floats:
    """Sum of the last k entries, of fewer at the left edge."""
    total = np.cumsum(values, axis=1)
    total[:, k:] = total[:, k:] - total[:, :-k].copy()
    return total


def _running_max(values: Floats, k: int) -> tuple[Floats, Floats]:
    """Maximum of the last k entries, and its age in bars (the latest of equal ones)."""
    padded = np.concatenate([np.full((len(values), k - 1), -np.inf), values], axis=1)
    view = sliding_window_view(padded, k, axis=1)[:, :, ::-1]
    age = view.argmax(axis=2)
    return np.take_along_axis(view, age[:, :, None], axis=2)[:, :, 0], age.astype(np.float64)


def _look_backs(windows: WindowArrays) -> Table:
    move, size = windows.returns, np.abs(windows.returns)
    span = np.where(windows.exists, windows.high - windows.low, 0.0)
    volume = np.where(windows.exists, windows.volume, 0.0)
    delta = np.where(windows.exists, windows.delta, 0.0)
    table: Table = {
        "return_1": move,
        "body": windows.close - windows.open,
        "span": span,
        "gap_up": windows.low - _shifted(windows.high, 2),
        "gap_down": _shifted(windows.low, 2) - windows.high,
        "is_up": (move > 0).astype(np.float64),
        "is_gap_up": (windows.low > _shifted(windows.high, 2)).astype(np.float64),
        "is_gap_down": (windows.high < _shifted(windows.low, 2)).astype(np.float64),
    }
    for k in LOOK_BACKS:
        count = np.maximum(_running(windows.exists.astype(np.float64), k), 1.0)
        table[f"return_{k}"] = _running(move, k)
        table[f"volume_{k}"] = _running(volume, k) / count
        table[f"delta_{k}"] = _running(delta, k) / count
        table[f"span_{k}"] = _running(span, k) / count
        if k >= 5:
            table[f"efficiency_{k}"] = _running(move, k) / np.maximum(_running(size, k), 1e-6)
            table[f"ups_{k}"] = _running((move > 0).astype(np.float64), k) / count
            table[f"volume_flow_{k}"] = _running(move * volume, k)
            table[f"delta_flow_{k}"] = _running(move * delta, k)
            table[f"volume_size_{k}"] = _running(size * volume, k)
    return table


def _shifted(values: Floats, k: int) -> Floats:
    """The value k bars earlier, or the first value."""
    return np.concatenate([np.repeat(values[:, :1], k, axis=1), values[:, :-k]], axis=1)


def _extremes(windows: WindowArrays) -> Table:
    table: Table = {}
    high = np.where(windows.exists, windows.high, -np.inf)
    low = np.where(windows.exists, -windows.low, -np.inf)
    for k in (5, 10, 20, high.shape[1]):
        top, top_age = _running_max(high, k)
        bottom, bottom_age = _running_max(low, k)
        height = np.where(windows.exists, top + bottom, 1.0)
        table |= {
            f"below_top_{k}": top - windows.close,
            f"above_bottom_{k}": windows.close + bottom,
            f"position_{k}": (windows.close + bottom) / np.maximum(height, 1e-6),
            f"height_{k}": height,
            f"top_age_{k}": np.log1p(top_age),
            f"bottom_age_{k}": np.log1p(bottom_age),
        }
    fall = np.maximum.accumulate(high, axis=1) - windows.close
    rise = windows.close + np.maximum.accumulate(low, axis=1)
    table["drawdown"] = np.maximum.accumulate(np.where(windows.exists, fall, 0.0), axis=1)
    table["run_up"] = np.maximum.accumulate(np.where(windows.exists, rise, 0.0), axis=1)
    return table


def _zigzag_legs(windows: WindowArrays, turn: float) -> Table:
    """The current zigzag leg at each bar and the leg before it: size, length, volume and delta."""
    direction, turns, last, last_bar, older, older_bar = _zigzag(windows, turn * windows.bar_range_W)
    bar = np.arange(direction.shape[1])
    age, older_age = np.maximum(bar - last_bar, 0), np.maximum(last_bar - older_bar, 0)
    retraced = np.clip((last - windows.close) / np.maximum(np.abs(last - older), 1e-3), -3, 3)
    table: Table = {
        "direction": direction,
        "age": np.log1p(age),
        "leg": windows.close - last,
        "leg_before": last - older,
        "retraced": np.where(direction != 0, retraced, 0.0),
        "turns": turns,
        "leg_bars": np.log1p(older_age),
        "older_bars": np.log1p(np.maximum(bar - older_bar, 0)),
    }
    now = np.broadcast_to(bar, direction.shape)
    totals = {
        name: np.cumsum(np.where(windows.exists, values, 0.0), axis=1)
        for name, values in (("volume", windows.volume), ("delta", windows.delta))
    }
    for part, start, stop in (("leg", last_bar, now), ("before", older_bar, last_bar)):
        for name, total in totals.items():
            gained = np.take_along_axis(total, stop, axis=1) - np.take_along_axis(total, start, axis=1)
            table[f"{part}_{name}"] = gained / np.maximum(stop - start, 1)
    table["volume_ratio"] = table["leg_volume"] - table["before_volume"]
    return {f"{name}_{turn:g}": values for name, values in table.items()}


def _zigzag(windows: WindowArrays, limit_W: Floats) -> tuple[Floats, Floats, Floats, Ints, Floats, Ints]:
    """Direction of the leg (1 up, -1 down, 0 unknown), number of turns, and price and bar of the last two turns.

    A leg ends at its extreme once the price moves by more than `limit_W` against it. The loop processes bar by bar, all
    windows at once.
    """
    count, length = windows.close.shape
    first = length - windows.exists.sum(axis=1)
    top, bottom = windows.high[:, 0], windows.low[:, 0]
    last = older = windows.open[:, 0]
    top_bar = bottom_bar = last_bar = older_bar = first
    direction, turns = np.zeros(count), np.zeros(count)
    history = []
    for t in range(length):
        high, low = windows.high[:, t], windows.low[:, t]
        top_bar, top = np.where(high >= top, t, top_bar), np.maximum(top, high)
        bottom_bar, bottom = np.where(low <= bottom, t, bottom_bar), np.minimum(bottom, low)
        down = (direction >= 0) & (top - low > limit_W) & (top_bar < t)
        up = (direction <= 0) & (high - bottom > limit_W) & (bottom_bar < t) & ~down
        turned = up | down
        older, older_bar = np.where(turned, last, older), np.where(turned, last_bar, older_bar)
        last = np.where(down, top, np.where(up, bottom, last))
        last_bar = np.where(down, top_bar, np.where(up, bottom_bar, last_bar))
        top, top_bar = np.where(turned, high, top), np.where(turned, t, top_bar)
        bottom, bottom_bar = np.where(turned, low, bottom), np.where(turned, t, bottom_bar)
        direction, turns = np.where(up, 1.0, np.where(down, -1.0, direction)), turns + turned
        history.append((direction, turns, last, last_bar, older, older_bar))
    directions, counts, lasts, last_bars, olders, older_bars = (
        np.stack(column, axis=1) for column in zip(*history, strict=True)
    )
    return directions, counts, lasts, last_bars, olders, older_bars


def _flags(windows: WindowArrays) -> Table:
    """CTX V3 flags: their current value and their history since the start of the window."""
    table: Table = {}
    for name, values in windows.flags.items():
        unknown = np.isnan(values[:, -1:])
        known = np.where(windows.exists & ~unknown, values, 0.0)
        statistics = _flag_statistics(name, known)
        table |= {statistic: np.where(unknown, np.nan, values) for statistic, values in statistics.items()}
    return table


def _flag_statistics(name: str, values: Floats) -> Table:
    if name in ("ext_dir", "int_dir"):
        return {
            f"is_{name}_{side}": (values == direction).astype(np.float64)
            for side, direction in (("up", 1), ("down", -1))
        }
    if name == "mgann_leg_index":
        early = {f"is_leg_{leg}": (values <= leg).astype(np.float64) for leg in (1, 2, 3, 5)}
        return {**early, "leg_index": values}
    if name not in PULSES:
        return {name if name == "wave_strength" else f"is_{name}": values}
    bar = np.arange(values.shape[1])
    seen = np.cumsum(values, axis=1)
    newest = np.maximum.accumulate(np.where(values > 0, bar, -1), axis=1)
    return {
        f"is_{name}": values,
        f"is_seen_{name}": (seen > 0).astype(np.float64),
        f"count_{name}": np.log1p(seen),
        f"age_{name}": np.where(newest >= 0, np.log1p(bar - newest), np.log1p(len(bar))),
    }


def _segment(windows: WindowArrays, inside: Bools, name: str) -> Table:
    """Sums and shapes of one segment of bars; NaN in windows without bars in it."""
    count = inside.sum(axis=1)
    has_bars = count > 0
    divisor = np.maximum(count, 1)

    def mean(values: Floats) -> Floats:
        return np.where(has_bars, np.where(inside, values, 0.0).sum(axis=1) / divisor, np.nan)

    move = windows.returns
    total, travel = mean(move) * divisor, mean(np.abs(move)) * divisor
    top = np.where(inside, windows.high, -np.inf).max(axis=1)
    bottom = np.where(inside, windows.low, np.inf).min(axis=1)
    return {
        f"return[{name}]": total,
        f"volume[{name}]": mean(windows.volume),
        f"delta[{name}]": mean(windows.delta),
        f"span[{name}]": mean(windows.high - windows.low),
        f"efficiency[{name}]": total / np.maximum(travel, 1e-6),
        f"height[{name}]": np.where(has_bars, top - bottom, np.nan),
        f"top[{name}]": np.where(has_bars, top, np.nan),
        f"bottom[{name}]": np.where(has_bars, bottom, np.nan),
        f"volume_flow[{name}]": mean(move * windows.volume),
        f"delta_flow[{name}]": mean(move * windows.delta),
    }


def _contrasts(table: Table) -> Table:
    """Differences between a later and an earlier segment."""
    pairs = [
        ("0-5", "5-10"),
        ("0-10", "10-20"),
        ("0-5", "10-20"),
        ("0.75-1.00", "0.50-0.75"),
        ("0.67-1.00", "0.00-0.33"),
    ]
    pairs += [("0.67-1.00", "0.33-0.67"), ("0.75-1.00", "0.00-1.00")]
    return {
        f"{what}[{late}]-[{early}]": table[f"{what}[{late}]"] - table[f"{what}[{early}]"]
        for late, early in pairs
        for what in ("return", "volume", "delta", "span", "efficiency")
    }


def _landmarks(windows: WindowArrays, ago: Ints) -> Table:
    """Positions and values of the window's most extreme bars, and its trend lines."""
    mask = np.where(windows.exists, 0.0, -np.inf)
    move = windows.returns
    row = np.arange(len(move))
    delta = np.nan_to_num(windows.delta)
    criteria = {"top": windows.high, "bottom": -windows.low, "rise": move, "fall": -move, "volume": windows.volume}
    table: Table = {}
    for name, values in {**criteria, "buying": delta, "selling": -delta}.items():
        bar = (values + mask).argmax(axis=1)
        table[f"{name}_ago"] = np.log1p(ago[bar])
        table[f"{name}_share"] = ago[bar] / windows.exists.sum(axis=1)
        table[f"{name}_volume"] = windows.volume[row, bar]
        table[f"{name}_delta"] = windows.delta[row, bar]
        table[f"{name}_close"] = windows.close[row, bar] - windows.close[:, -1]
        table[f"{name}_return"] = move[row, bar]
    for first in (10, 20, len(ago)):
        weight = (windows.exists & (ago < first)).astype(np.float64)
        time = -ago - _weighted(-ago[None].astype(np.float64), weight)[:, None]
        for name, values in {"close": windows.close, "volume": windows.volume, "delta": windows.delta}.items():
            centred = values - _weighted(values, weight)[:, None]
            slope = _weighted(centred * time, weight) / np.maximum(_weighted(time**2, weight), 1e-9)
            spread = np.sqrt(np.maximum(_weighted(centred**2, weight), 1e-9))
            table[f"slope_{name}_{first}"] = slope * first
            table[f"fit_{name}_{first}"] = slope * np.sqrt(_weighted(time**2, weight)) / spread
        table[f"volume_size_fit_{first}"] = _correlation(np.abs(move), windows.volume, weight)
        table[f"volume_return_fit_{first}"] = _correlation(move, windows.volume, weight)
        table[f"delta_return_fit_{first}"] = _correlation(move, windows.delta, weight)
    return table


def _weighted(values: Floats, weight: Floats) -> Floats:
    mean: Floats = np.where(weight > 0, values, 0.0).sum(axis=1) / weight.sum(axis=1)
    return mean


def _correlation(left: Floats, right: Floats, weight: Floats) -> Floats:
    left = left - _weighted(left, weight)[:, None]
    right = right - _weighted(right, weight)[:, None]
    spread = np.sqrt(_weighted(left**2, weight) * _weighted(right**2, weight))
    return np.divide(_weighted(left * right, weight), np.maximum(spread, 1e-9))
