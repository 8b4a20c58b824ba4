"""CTX V3 structure flags, computed from plain bars.

Input: `Bars`, a dict of arrays of equal length with at least high, low, close and volume. Output: the same dict with
`atr_14` and the structure flags, under the field names of a CTX export.

Every flag is causal: its value at bar t depends only on bars 0..t. A swing pivot needs bars on both sides, so it counts
from the bar that confirms it.

Sources:
- ATR: Wilder (1978), smoothed over 14 bars;
- swings, BOS, CHoCH, sweeps, fair value gaps: the usual smart-money-concepts definitions;
- legs: the two-bar swing chart of Gann.
"""

from math import isnan, nan
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Bars = dict[str, NDArray[Any]]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

EXTERNAL_SIDE = 5  # bars on either side of a large (external) pivot
INTERNAL_SIDE = 2  # bars on either side of a small (internal) pivot
ATR_BARS = 14
VOLUME_BARS = 50  # over which the reference volume of a leg is averaged
STRENGTH_SCALE = 6.0  # leg travel, in ATR at reference volume, with strength 63 of 100
PULLBACK_RATIO = 0.5  # of the strength of the impulse, up to which a pull-back is weak
MAX_LEG_INDEX = 10


def add_structure(bars: Bars) -> Bars:
    """`bars` (at least high, low, close, volume) with `atr_14` and the CTX V3 structure flags added."""
    high, low, close = (bars[name].astype(np.float64) for name in ("high", "low", "close"))
    external = _break_of_structure(high, low, close, EXTERNAL_SIDE)
    internal = _break_of_structure(high, low, close, INTERNAL_SIDE)
    direction, choch = external["dir"], external["choch"]
    atr = average_true_range(high, low, close)
    return {
        **bars,
        "atr_14": _round_to_price(atr, close),
        "ext_dir": direction,
        "ext_bos": external["bos"],
        "ext_choch": choch,
        "ext_choch_up": choch & (direction == 1),
        "ext_choch_down": choch & (direction == -1),
        "int_dir": internal["dir"],
        "int_bos": internal["bos"],
        "int_choch": internal["choch"],
        # A level that is unknown or already broken is NaN, and comparisons with NaN are false.
        "sweep_prev_high": (high > external["last_high"]) & (close <= external["last_high"]),
        "sweep_prev_low": (low < external["last_low"]) & (close >= external["last_low"]),
        **_fair_value_gaps(high, low),
        **_legs(bars, atr, direction, choch),
    }


def higher_direction(opens_T: Ints, high: Floats, low: Floats, close: Floats, length: int, times: int) -> Ints:
    """Direction of the external structure of bars that are `times` as long, as known at the close of each bar.

    `opens_T` are nanoseconds, `length` those of a bar. The long bars begin at multiples of their length since 1970. One
    that has not ended counts for nothing: the direction is that of the last completed one, 0 before the first.
    """
    long = length * times
    number = opens_T // long
    first = np.flatnonzero(np.concatenate(([True], number[1:] != number[:-1])))
    last = np.concatenate((first[1:], [len(number)])) - 1
    tops, bottoms = np.maximum.reduceat(high, first), np.minimum.reduceat(low, first)
    directions = _break_of_structure(tops, bottoms, close[last], EXTERNAL_SIDE)["dir"].astype(np.int64)
    known = np.concatenate(([0], directions))
    place = np.repeat(np.arange(len(first)), last + 1 - first)  # of the long bar that each bar belongs to
    completes = (opens_T + length) % long == 0
    return np.asarray(known[place + completes], np.int64)


def average_true_range(high: Floats, low: Floats, close: Floats) -> Floats:
    """Wilder's average; for the first bars, the mean of all bars so far."""
    previous_close = np.concatenate((close[:1], close[:-1]))
    true_range = np.maximum(high, previous_close) - np.minimum(low, previous_close)
    atr = np.empty_like(true_range)
    average = 0.0
    for t, value in enumerate(true_range.tolist()):
        average += (value - average) / min(t + 1, ATR_BARS)
        atr[t] = average
    return atr


def _round_to_price(values: Floats, close: Floats) -> Floats:
    """Rounded to 4 decimals where the price is at least 10, else to the eighth significant digit of the price."""
    size = np.floor(np.log10(np.abs(close), out=np.ones_like(close), where=close != 0))
    decimals = np.where(size >= 1, 4, 7 - size).astype(np.int64)
    rounded = values.copy()
    for places in np.unique(decimals).tolist():
        chosen = decimals == places
        rounded[chosen] = np.round(values[chosen], places)
    return rounded


def _confirmed_highs(high: Floats, side: int) -> Floats:
    """Price of a swing high at the bar that confirms it; NaN elsewhere.

    A swing high is above the `side` bars before it and not below any of the `side` bars after it.
    """
    levels = np.full(len(high), np.nan)
    if len(high) > 2 * side:
        windows = sliding_window_view(high, 2 * side + 1)
        centre = windows[:, side]
        is_pivot = (centre > windows[:, :side].max(axis=1)) & (centre >= windows[:, side + 1 :].max(axis=1))
        levels[2 * side :][is_pivot] = centre[is_pivot]
    return levels


def _break_of_structure(high: Floats, low: Floats, close: Floats, side: int) -> Bars:
    """Direction, breaks with it (bos) and against it (choch), and the unbroken swing levels at each bar.

    A level breaks once, by a close beyond it. The very first break sets the direction and counts as neither.
    """
    bars = len(close)
    bos, choch = np.zeros(bars, dtype=np.bool_), np.zeros(bars, dtype=np.bool_)
    directions = np.zeros(bars, dtype=np.int8)
    last_high, last_low = np.empty(bars), np.empty(bars)
    top = bottom = nan
    direction = 0
    new_highs, new_lows = _confirmed_highs(high, side), -_confirmed_highs(-low, side)
    columns = zip(close.tolist(), new_highs.tolist(), new_lows.tolist(), strict=True)
    for t, (price, new_high, new_low) in enumerate(columns):
        if not isnan(new_high):
            top = new_high
        if not isnan(new_low):
            bottom = new_low
        last_high[t], last_low[t] = top, bottom
        broken = 1 if price > top else -1 if price < bottom else 0
        if broken:
            bos[t] = direction == broken
            choch[t] = direction == -broken
            direction = broken
            if broken == 1:
                top = nan
            else:
                bottom = nan
        directions[t] = direction
    return {"dir": directions, "bos": bos, "choch": choch, "last_high": last_high, "last_low": last_low}


def _fair_value_gaps(high: Floats, low: Floats) -> Bars:
    """Side of the active gap, and the bars that trade back into it.

    Only one gap is active: a newer gap replaces it, and a trade at its far edge fills it. Neither the bar that creates
    the gap nor the bar that fills it counts as a retest.
    """
    bars = len(high)
    up, down, retest = (np.zeros(bars, dtype=np.bool_) for _ in range(3))
    side = 0
    near = far = 0.0
    highs, lows = high.tolist(), low.tolist()
    for t in range(2, bars):
        if lows[t] > highs[t - 2]:
            side, near, far = 1, lows[t], highs[t - 2]
        elif highs[t] < lows[t - 2]:
            side, near, far = -1, highs[t], lows[t - 2]
        elif side == 1 and lows[t] <= near:
            retest[t] = lows[t] > far
            side = int(retest[t])
        elif side == -1 and highs[t] >= near:
            retest[t] = highs[t] < far
            side = -int(retest[t])
        up[t], down[t] = side == 1, side == -1
    return {"fvg_up": up, "fvg_down": down, "fvg_retest": retest}


def _legs(bars: Bars, atr: Floats, direction: NDArray[Any], choch: Bools) -> Bars:
    """Leg count since the last external CHoCH, strength of the leg, and whether the pull-back is weak.

    Strength is travel in ATR times volume relative to the reference volume. The impulse is the last leg in the
    direction of the structure; the pull-back is the movement after its far end.
    """
    high, low = bars["high"], bars["low"]
    leg_dir, before, start, extreme = _swing_chart(high, low)
    now = np.arange(len(high))
    traded = np.concatenate(([0], np.cumsum(bars["volume"])))  # before each bar
    reference_first = np.maximum(0, now + 1 - VOLUME_BARS)
    reference = (traded[now + 1] - traded[reference_first]) / (now + 1 - reference_first)
    unit = atr * reference

    def strength_of(first: Ints, last: Ints, way: NDArray[Any]) -> Floats:
        """Strength of the move from bar `first` to bar `last`, upwards where `way` is 1, else downwards."""
        travel = np.where(way == 1, high[last] - low[first], high[first] - low[last])
        mean_volume = (traded[last + 1] - traded[first + 1]) / np.maximum(last - first, 1)
        effort = np.maximum(travel, 0.0) * mean_volume
        # Without price movement or volume, `unit` is 0 and so is the strength.
        strength: Floats = np.divide(effort, unit, out=np.zeros_like(unit), where=unit > 0)
        return strength

    leg = strength_of(start, extreme, leg_dir)
    with_structure = leg_dir == direction
    impulse_start = np.where(with_structure, start, before)
    far_end = np.where(with_structure, extreme, start)
    pullback_end = np.where(with_structure, now, extreme)
    impulse = strength_of(impulse_start, far_end, direction)
    pullback = strength_of(far_end, pullback_end, -direction)
    under_way = (direction != 0) & (pullback_end > far_end)
    return {
        "mgann_leg_index": _leg_index(leg_dir, direction, choch),
        "wave_strength": np.round(-100 * np.expm1(-leg / STRENGTH_SCALE), 1),
        "pb_wave_strength_ok": under_way & (pullback <= PULLBACK_RATIO * impulse),
    }


def _swing_chart(high: Floats, low: Floats) -> tuple[Ints, Ints, Ints, Ints]:
    """For each bar: direction of the current leg, first bar of the previous leg, first bar and extreme bar of this leg.

    A leg reverses at the second bar against it (lower high and lower low, or the mirror image) after its extreme.
    Inside and outside bars do not count. The new leg starts at that extreme.
    """
    # Negated prices allow one rule for both directions: an up leg in them is a down leg in the market.
    ends = {1: high.tolist(), -1: (-low).tolist()}
    way, before, start, extreme, against = 1, 0, 0, 0, 0
    legs = [(way, before, start, extreme)]
    for t in range(1, len(high)):
        ahead, behind = ends[way], ends[-way]
        if ahead[t] >= ahead[extreme]:
            extreme, against = t, 0
        elif ahead[t] < ahead[t - 1] and behind[t] > behind[t - 1]:
            against += 1
            if against == 2:
                way, before, start, against = -way, start, extreme, 0
                extreme = max(range(start + 1, t + 1), key=behind.__getitem__)
        legs.append((way, before, start, extreme))
    ways, befores, starts, extremes = np.array(legs, dtype=np.int64).T
    return ways, befores, starts, extremes


def _leg_index(leg_dir: Ints, direction: NDArray[Any], choch: Bools) -> NDArray[np.int8]:
    """1 for the leg that broke the structure, 2 for the first pull-back, and so on up to the maximum."""
    index = np.empty(len(leg_dir), dtype=np.int8)
    count = 1
    # A break may precede the reversal of the swing chart; this late reversal still belongs to the first leg.
    reversed_legs = np.concatenate(([False], leg_dir[1:] != leg_dir[:-1]))
    with_structure = leg_dir == direction
    columns = zip(reversed_legs.tolist(), with_structure.tolist(), choch.tolist(), strict=True)
    for t, (is_reversed, is_with_structure, is_break) in enumerate(columns):
        if is_break:
            count = 1
        elif is_reversed and not (is_with_structure and count == 1):
            count = min(count + 1, MAX_LEG_INDEX)
        index[t] = count
    return index
