"""CTX V3 structure flags, read off bare bars.

In:  `Bars`, a dict of equally long arrays with at least high, low, close and volume.
Out: the same dict with `atr_14` and the structure flags added, under the field names of a CTX export.

Every flag is causal: its value at bar t is a function of bars 0..t. A swing pivot, which needs bars on both
sides, therefore counts from the bar that confirms it.

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
VOLUME_BARS = 50  # the usual volume a leg is compared with
STRENGTH_SCALE = 6.0  # leg travel, in ATR at usual volume, that scores 63 of 100
PULLBACK_RATIO = 0.5  # a pull-back is weak up to this share of its impulse's strength
MAX_LEG_INDEX = 10


def add_structure(bars: Bars) -> Bars:
    """`bars` (at least high, low, close, volume) with `atr_14` and the CTX V3 structure flags added."""
    high, low, close = (bars[name].astype(np.float64) for name in ("high", "low", "close"))
    external = _break_of_structure(high, low, close, EXTERNAL_SIDE)
    internal = _break_of_structure(high, low, close, INTERNAL_SIDE)
    direction, choch = external["dir"], external["choch"]
    atr = _average_true_range(high, low, close)
    return {
        **bars,
        "atr_14": np.round(atr, 4),
        "ext_dir": direction,
        "ext_bos": external["bos"],
        "ext_choch": choch,
        "ext_choch_up": choch & (direction == 1),
        "ext_choch_down": choch & (direction == -1),
        "int_dir": internal["dir"],
        "int_bos": internal["bos"],
        "int_choch": internal["choch"],
        # A level that is unknown or already broken is NaN, which compares false.
        "sweep_prev_high": (high > external["last_high"]) & (close <= external["last_high"]),
        "sweep_prev_low": (low < external["last_low"]) & (close >= external["last_low"]),
        **_fair_value_gaps(high, low),
        **_legs(bars, atr, direction, choch),
    }


def _average_true_range(high: Floats, low: Floats, close: Floats) -> Floats:
    """Wilder's average; its first bars take the plain mean of what there is."""
    before = np.concatenate((close[:1], close[:-1]))
    true_range = np.maximum(high, before) - np.minimum(low, before)
    atr = np.empty_like(true_range)
    average = 0.0
    for t, value in enumerate(true_range.tolist()):
        average += (value - average) / min(t + 1, ATR_BARS)
        atr[t] = average
    return atr


def _confirmed_highs(high: Floats, side: int) -> Floats:
    """At the bar that confirms a swing high, its price; NaN elsewhere.

    A swing high tops the `side` bars before it and is not topped by the `side` bars after it.
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

    A level breaks once, by a close beyond it. The first break of all sets the direction and is neither.
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
    """The active gap's side, and the bars that trade back into it.

    One gap is active at a time: a newer gap replaces it, a trade at its far edge fills it. The bar that
    makes the gap does not retest it, nor does the bar that fills it.
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

    Strength is travel in ATR times volume relative to usual. The impulse is the last leg that went with the
    structure; the pull-back is what came after its far end.
    """
    high, low = bars["high"], bars["low"]
    leg_dir, before, start, extreme = _swing_chart(high, low)
    now = np.arange(len(high))
    traded = np.concatenate(([0], np.cumsum(bars["volume"])))  # before each bar
    usual_first = np.maximum(0, now + 1 - VOLUME_BARS)
    usual = (traded[now + 1] - traded[usual_first]) / (now + 1 - usual_first)
    unit = atr * usual

    def strength_of(first: Ints, last: Ints, way: NDArray[Any]) -> Floats:
        """Of the move from bar `first` to bar `last`, which goes up where `way` is 1, else down."""
        travel = np.where(way == 1, high[last] - low[first], high[first] - low[last])
        mean_volume = (traded[last + 1] - traded[first + 1]) / np.maximum(last - first, 1)
        effort = np.maximum(travel, 0.0) * mean_volume
        # Where prices have not moved or nothing traded, a move has no strength.
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
    """At each bar: way of the current leg, first bar of the leg before, its own first bar, its extreme bar.

    A leg turns at the second bar against it (lower high and lower low, or the mirror) since its extreme;
    inside and outside bars do not count. The new leg starts at that extreme.
    """
    # The mirror image of prices lets one rule serve both ways: an up leg in it is a down leg in the market.
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
    """1 for the leg that broke structure, 2 for the first pull-back, and so on up to the cap."""
    index = np.empty(len(leg_dir), dtype=np.int8)
    count = 1
    # A break may come before the swing chart has turned its way; that late turn is still the first leg.
    turned = np.concatenate(([False], leg_dir[1:] != leg_dir[:-1]))
    with_structure = leg_dir == direction
    columns = zip(turned.tolist(), with_structure.tolist(), choch.tolist(), strict=True)
    for t, (turn, goes_with, breaks) in enumerate(columns):
        if breaks:
            count = 1
        elif turn and not (goes_with and count == 1):
            count = min(count + 1, MAX_LEG_INDEX)
        index[t] = count
    return index
