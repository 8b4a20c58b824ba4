"""Statistics of windows, which the embedded base learns to read off their text.

Comes in: a `Stack`, many windows as arrays of shape (W, L), aligned at the event, the last of the L bars. Goes out:
`bar_statistics`, arrays of shape (W, L) whose value at a bar depends on no later bar, and `event_statistics`, arrays of
shape (W,) that also look at stretches and shapes of the whole window. NaN stands where a statistic does not exist.

Numbers are those of `features.py`: prices in window ranges, volume and delta as z-scores. None of this knows a label.
Legend: W windows, L bars of the longest window, k bars of a look-back.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from ctxtrain.data.codec import PULSES
from ctxtrain.pretraining.stack import Bools, Floats, Ints, Stack, Table

LOOK_BACKS = (2, 3, 5, 8, 13, 21, 34)
LAGS = (0, 1, 2, 3, 4, 5, 8, 13, 21)
# Stretches: first and last bar counted back from the event, and as shares of the window.
STRETCHES = ((0, 5), (3, 6), (5, 10), (6, 10), (10, 15), (10, 20), (15, 20), (20, 30), (0, 10), (0, 20), (0, 30))
SHARES = ((0, 1 / 4), (1 / 4, 1 / 2), (1 / 2, 3 / 4), (3 / 4, 1), (0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1), (0, 1))
TURNS = (1.5, 3.0)  # mean true ranges against a leg that turn it
BINARY = "is_"  # statistics so named are 0 or 1


def bar_statistics(stack: Stack) -> Table:
    """What can be said at each bar of the bars up to it."""
    table = _look_backs(stack)
    table |= _extremes(stack)
    for turn in TURNS:
        table |= _legs(stack, turn)
    table |= _structure(stack)
    return {name: np.where(stack.exists, values, np.nan) for name, values in table.items()}


def event_statistics(stack: Stack) -> Table:
    """What can be said at the event of single bars, stretches and the shape of the window."""
    bars_W = stack.exists.sum(axis=1)
    table: Table = {"bars": bars_W.astype(np.float64), "bar_range": stack.bar_range_W}
    for lag in LAGS:
        for name in ("high", "low", "close", "volume", "delta"):
            table[f"{name}@{lag}"] = getattr(stack, name)[:, -1 - lag]
    length = stack.close.shape[1]
    ago = np.arange(length)[::-1]
    for first, stop in STRETCHES:
        inside = (ago >= first) & (ago < stop) & (bars_W >= stop)[:, None]
        table |= _stretch(stack, inside, f"{first}-{stop}")
    for left, right in SHARES:
        from_start = ago[::-1] - (length - bars_W[:, None])
        inside = (from_start >= np.rint(left * bars_W)[:, None]) & (from_start < np.rint(right * bars_W)[:, None])
        table |= _stretch(stack, inside, f"{left:.2f}-{right:.2f}")
    table |= _contrasts(table)
    table |= _places(stack, ago)
    return table


def _running(values: Floats, k: int) -> Floats:
    """Sums of the last k entries, fewer at the left edge."""
    total = np.cumsum(values, axis=1)
    total[:, k:] = total[:, k:] - total[:, :-k].copy()
    return total


def _running_max(values: Floats, k: int) -> tuple[Floats, Floats]:
    """Greatest of the last k entries, and its age in bars (the newest of equals)."""
    padded = np.concatenate([np.full((len(values), k - 1), -np.inf), values], axis=1)
    view = sliding_window_view(padded, k, axis=1)[:, :, ::-1]
    age = view.argmax(axis=2)
    return np.take_along_axis(view, age[:, :, None], axis=2)[:, :, 0], age.astype(np.float64)


def _look_backs(stack: Stack) -> Table:
    move, size = stack.returns, np.abs(stack.returns)
    span = np.where(stack.exists, stack.high - stack.low, 0.0)
    volume = np.where(stack.exists, stack.volume, 0.0)
    delta = np.where(stack.exists, stack.delta, 0.0)
    table: Table = {
        "return_1": move,
        "body": stack.close - stack.open,
        "span": span,
        "gap_up": stack.low - _shifted(stack.high, 2),
        "gap_down": _shifted(stack.low, 2) - stack.high,
        "is_up": (move > 0).astype(np.float64),
        "is_gap_up": (stack.low > _shifted(stack.high, 2)).astype(np.float64),
        "is_gap_down": (stack.high < _shifted(stack.low, 2)).astype(np.float64),
    }
    for k in LOOK_BACKS:
        count = np.maximum(_running(stack.exists.astype(np.float64), k), 1.0)
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
    """The value k bars before, or the first."""
    return np.concatenate([np.repeat(values[:, :1], k, axis=1), values[:, :-k]], axis=1)


def _extremes(stack: Stack) -> Table:
    table: Table = {}
    high = np.where(stack.exists, stack.high, -np.inf)
    low = np.where(stack.exists, -stack.low, -np.inf)
    for k in (5, 10, 20, high.shape[1]):
        top, top_age = _running_max(high, k)
        bottom, bottom_age = _running_max(low, k)
        height = np.where(stack.exists, top + bottom, 1.0)
        table |= {
            f"below_top_{k}": top - stack.close,
            f"above_bottom_{k}": stack.close + bottom,
            f"place_{k}": (stack.close + bottom) / np.maximum(height, 1e-6),
            f"height_{k}": height,
            f"top_age_{k}": np.log1p(top_age),
            f"bottom_age_{k}": np.log1p(bottom_age),
        }
    fall = np.maximum.accumulate(high, axis=1) - stack.close
    rise = stack.close + np.maximum.accumulate(low, axis=1)
    table["drawdown"] = np.maximum.accumulate(np.where(stack.exists, fall, 0.0), axis=1)
    table["run_up"] = np.maximum.accumulate(np.where(stack.exists, rise, 0.0), axis=1)
    return table


def _legs(stack: Stack, turn: float) -> Table:
    """The zigzag leg under way at each bar and the one before it: size, length, volume and delta."""
    way, turns, last, last_bar, older, older_bar = _zigzag(stack, turn * stack.bar_range_W)
    bar = np.arange(way.shape[1])
    age, older_age = np.maximum(bar - last_bar, 0), np.maximum(last_bar - older_bar, 0)
    retraced = np.clip((last - stack.close) / np.maximum(np.abs(last - older), 1e-3), -3, 3)
    table: Table = {
        "way": way,
        "age": np.log1p(age),
        "leg": stack.close - last,
        "leg_before": last - older,
        "retraced": np.where(way != 0, retraced, 0.0),
        "turns": turns,
        "leg_bars": np.log1p(older_age),
        "older_bars": np.log1p(np.maximum(bar - older_bar, 0)),
    }
    now = np.broadcast_to(bar, way.shape)
    totals = {
        name: np.cumsum(np.where(stack.exists, values, 0.0), axis=1)
        for name, values in (("volume", stack.volume), ("delta", stack.delta))
    }
    for part, start, stop in (("leg", last_bar, now), ("before", older_bar, last_bar)):
        for name, total in totals.items():
            gained = np.take_along_axis(total, stop, axis=1) - np.take_along_axis(total, start, axis=1)
            table[f"{part}_{name}"] = gained / np.maximum(stop - start, 1)
    table["volume_ratio"] = table["leg_volume"] - table["before_volume"]
    return {f"{name}_{turn:g}": values for name, values in table.items()}


def _zigzag(stack: Stack, limit_W: Floats) -> tuple[Floats, Floats, Floats, Ints, Floats, Ints]:
    """Way of the leg (1 up, -1 down, 0 not known yet), turns so far, and price and bar of the last two turns.

    A leg turns at its extreme once price has gone `limit` against it. All windows are followed at once, bar by bar.
    """
    count, length = stack.close.shape
    first = length - stack.exists.sum(axis=1)
    top, bottom = stack.high[:, 0], stack.low[:, 0]
    last = older = stack.open[:, 0]
    top_bar = bottom_bar = last_bar = older_bar = first
    way, turns = np.zeros(count), np.zeros(count)
    history = []
    for t in range(length):
        high, low = stack.high[:, t], stack.low[:, t]
        top_bar, top = np.where(high >= top, t, top_bar), np.maximum(top, high)
        bottom_bar, bottom = np.where(low <= bottom, t, bottom_bar), np.minimum(bottom, low)
        down = (way >= 0) & (top - low > limit_W) & (top_bar < t)
        up = (way <= 0) & (high - bottom > limit_W) & (bottom_bar < t) & ~down
        turned = up | down
        older, older_bar = np.where(turned, last, older), np.where(turned, last_bar, older_bar)
        last = np.where(down, top, np.where(up, bottom, last))
        last_bar = np.where(down, top_bar, np.where(up, bottom_bar, last_bar))
        top, top_bar = np.where(turned, high, top), np.where(turned, t, top_bar)
        bottom, bottom_bar = np.where(turned, low, bottom), np.where(turned, t, bottom_bar)
        way, turns = np.where(up, 1.0, np.where(down, -1.0, way)), turns + turned
        history.append((way, turns, last, last_bar, older, older_bar))
    ways, counts, lasts, last_bars, olders, older_bars = (
        np.stack(column, axis=1) for column in zip(*history, strict=True)
    )
    return ways, counts, lasts, last_bars, olders, older_bars


def _structure(stack: Stack) -> Table:
    """CTX V3 flags, as they stand and as they have come about since the window's start."""
    table: Table = {}
    for name, values in stack.flags.items():
        unknown = np.isnan(values[:, -1:])
        shown = np.where(stack.exists & ~unknown, values, 0.0)
        table |= {about: np.where(unknown, np.nan, values) for about, values in _about_flag(name, shown).items()}
    return table


def _about_flag(name: str, values: Floats) -> Table:
    if name in ("ext_dir", "int_dir"):
        return {f"is_{name}_{side}": (values == way).astype(np.float64) for side, way in (("up", 1), ("down", -1))}
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


def _stretch(stack: Stack, inside: Bools, name: str) -> Table:
    """Sums and shapes of one stretch of bars; NaN in windows that have none of it."""
    count = inside.sum(axis=1)
    some = count > 0
    shown = np.maximum(count, 1)

    def mean(values: Floats) -> Floats:
        return np.where(some, np.where(inside, values, 0.0).sum(axis=1) / shown, np.nan)

    move = stack.returns
    total, travel = mean(move) * shown, mean(np.abs(move)) * shown
    top = np.where(inside, stack.high, -np.inf).max(axis=1)
    bottom = np.where(inside, stack.low, np.inf).min(axis=1)
    return {
        f"return[{name}]": total,
        f"volume[{name}]": mean(stack.volume),
        f"delta[{name}]": mean(stack.delta),
        f"span[{name}]": mean(stack.high - stack.low),
        f"efficiency[{name}]": total / np.maximum(travel, 1e-6),
        f"height[{name}]": np.where(some, top - bottom, np.nan),
        f"top[{name}]": np.where(some, top, np.nan),
        f"bottom[{name}]": np.where(some, bottom, np.nan),
        f"volume_flow[{name}]": mean(move * stack.volume),
        f"delta_flow[{name}]": mean(move * stack.delta),
    }


def _contrasts(table: Table) -> Table:
    """Differences between one stretch and another: later against earlier."""
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


def _places(stack: Stack, ago: Ints) -> Table:
    """Where in the window its most marked bars are, what they were like, and its trend line."""
    gone = np.where(stack.exists, 0.0, -np.inf)
    move = stack.returns
    row = np.arange(len(move))
    delta = np.nan_to_num(stack.delta)
    marked = {"top": stack.high, "bottom": -stack.low, "rise": move, "fall": -move, "volume": stack.volume}
    table: Table = {}
    for name, values in {**marked, "buying": delta, "selling": -delta}.items():
        bar = (values + gone).argmax(axis=1)
        table[f"{name}_ago"] = np.log1p(ago[bar])
        table[f"{name}_share"] = ago[bar] / stack.exists.sum(axis=1)
        table[f"{name}_volume"] = stack.volume[row, bar]
        table[f"{name}_delta"] = stack.delta[row, bar]
        table[f"{name}_close"] = stack.close[row, bar] - stack.close[:, -1]
        table[f"{name}_return"] = move[row, bar]
    for first in (10, 20, len(ago)):
        weight = (stack.exists & (ago < first)).astype(np.float64)
        time = -ago - _weighted(-ago[None].astype(np.float64), weight)[:, None]
        for name, values in {"close": stack.close, "volume": stack.volume, "delta": stack.delta}.items():
            centred = values - _weighted(values, weight)[:, None]
            slope = _weighted(centred * time, weight) / np.maximum(_weighted(time**2, weight), 1e-9)
            spread = np.sqrt(np.maximum(_weighted(centred**2, weight), 1e-9))
            table[f"slope_{name}_{first}"] = slope * first
            table[f"fit_{name}_{first}"] = slope * np.sqrt(_weighted(time**2, weight)) / spread
        table[f"volume_size_fit_{first}"] = _correlation(np.abs(move), stack.volume, weight)
        table[f"volume_return_fit_{first}"] = _correlation(move, stack.volume, weight)
        table[f"delta_return_fit_{first}"] = _correlation(move, stack.delta, weight)
    return table


def _weighted(values: Floats, weight: Floats) -> Floats:
    mean: Floats = np.where(weight > 0, values, 0.0).sum(axis=1) / weight.sum(axis=1)
    return mean


def _correlation(left: Floats, right: Floats, weight: Floats) -> Floats:
    left = left - _weighted(left, weight)[:, None]
    right = right - _weighted(right, weight)[:, None]
    spread = np.sqrt(_weighted(left**2, weight) * _weighted(right**2, weight))
    return np.divide(_weighted(left * right, weight), np.maximum(spread, 1e-9))
