"""Numbers of a window, comparable across symbols, prices and volatilities (CTX V3 normalisation).

Input: the bars of one window, or of several windows of equal length. Output: `WindowNumbers`. Prices become positions
between the window's lowest low (0) and highest high (1). Volume and delta become z-scores within the window. Flags stay
unchanged. No number depends on later bars, because a window ends at `current_bar`.

A single outlier would compress all other values to one level, so `outliers.py` first moves outliers closer; windows
without outliers are unchanged. Values that differ by rounding only (one part in 10⁹) count as equal.

Legend: ... is empty for one window and W for W windows; L bars of a window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ctxtrain.data.outliers import REL_TOL, Bools, Floats, compress_outliers, compress_price_outliers, lower_median

Ints = NDArray[np.int64]

# Outlier limits of log1p(volume) and of delta, in typical deviations from the median. The largest values in 2,000
# simulated and 1,000 real windows are 10 and 43.
OUTLIER_LIMITS = {"volume": 30.0, "delta": 100.0}
# A delta is one-sided if its mean is at least this many deviations, or this share of the mean absolute delta. Bars that
# alternate between nine bought and one sold reach 0.8 in both. The largest values in 12,000 simulated and 1,058 real
# windows are 0.79 and 0.87.
ONE_SIDED_DEVIATIONS, ONE_SIDED_SHARE = 0.8, 0.9


@dataclass(frozen=True, slots=True)
class WindowNumbers:
    """`open`, `high`, `low`, `close` in [0, 1]; `volume` and `delta` as z-scores; all of shape (..., L).
    `volume` and `delta` are None if the bars lack them.

    The following have shape (...). `range_in_bars` is the window range over the mean true range. `bar_range_share` is
    the mean true range over the absolute last close. `atr_ratio` is `atr_14` of the event over the mean true range
    (None without `atr_14`). `side` is the sign of a one-sided delta, which z-scores cannot express, or 0.

    `outliers` marks, in shape (..., L), the bars whose price, volume or delta was an outlier and was moved closer.
    """

    open: Floats
    high: Floats
    low: Floats
    close: Floats
    volume: Floats | None
    delta: Floats | None
    range_in_bars: Floats
    bar_range_share: Floats
    atr_ratio: Floats | None
    side: Ints
    outliers: dict[str, Bools]


def window_numbers(bars: Mapping[str, Floats]) -> WindowNumbers:
    """Normalise fields of shape (..., L); a window without price movement has all prices at 0.5.

    The numbers of a window are bit for bit the same in every batch.
    """
    prices, ranges, price_outliers = _prices(bars)
    floor = prices[2].min(axis=-1, keepdims=True)
    height = prices[1].max(axis=-1, keepdims=True) - floor
    mean_range = ranges.mean(axis=-1)
    is_flat = height[..., 0] <= REL_TOL * lower_median(np.abs(bars["close"]))
    height[is_flat], mean_range = 0, np.where(is_flat, 0, mean_range)
    opens, highs, lows, closes = _ratio(prices - floor, height, otherwise=0.5)
    names = [name for name in OUTLIER_LIMITS if name in bars]
    flows = np.array([np.log1p(bars[name]) if name == "volume" else bars[name] for name in names])
    flow_outliers = np.empty((0, *flows.shape[1:]), dtype=np.bool_)
    if names:
        flows, flow_outliers = compress_outliers(flows, [OUTLIER_LIMITS[name] for name in names])
    scores = dict(zip(names, z_scores(flows), strict=True)) if names else {}
    return WindowNumbers(
        open=opens,
        high=highs,
        low=lows,
        close=closes,
        volume=scores.get("volume"),
        delta=scores.get("delta"),
        range_in_bars=_ratio(height[..., 0], mean_range),
        bar_range_share=_ratio(mean_range, np.abs(bars["close"][..., -1])),
        atr_ratio=_ratio(bars["atr_14"][..., -1], mean_range) if "atr_14" in bars else None,
        side=_side(flows[-1]) if "delta" in bars else np.zeros(mean_range.shape, dtype=np.int64),
        outliers={"price": price_outliers, **dict(zip(names, flow_outliers, strict=True))},
    )


def _prices(bars: Mapping[str, Floats]) -> tuple[Floats, Floats, Bools]:
    """Open, high, low, close of shape (4, ..., L), true ranges, and the bars whose price outliers were moved closer."""
    ranges = true_range(bars)
    prices = np.array([bars["open"], bars["high"], bars["low"], bars["close"]])
    is_outlier = compress_price_outliers(prices, ranges)
    if is_outlier.any():
        has_outlier = is_outlier.any(axis=-1)
        compressed = dict(zip(("open", "high", "low", "close"), prices[:, has_outlier], strict=True))
        ranges[has_outlier] = true_range(compressed)
    return prices, ranges, is_outlier


def _side(delta: Floats) -> Ints:
    """1 where almost everything is bought, −1 where almost everything is sold, else 0; over the last dimension."""
    mean, lowest, highest = delta.mean(axis=-1), delta.min(axis=-1), delta.max(axis=-1)
    gross = np.abs(delta).mean(axis=-1)
    threshold = np.minimum(ONE_SIDED_DEVIATIONS * delta.std(axis=-1), ONE_SIDED_SHARE * gross)
    is_one_sided = np.abs(mean) >= (1 - REL_TOL) * threshold
    return np.where((is_one_sided & (gross > 0)) | (lowest > 0) | (highest < 0), np.sign(mean), 0).astype(np.int64)


def true_range(bars: Mapping[str, Floats]) -> Floats:
    """max(high, previous close) − min(low, previous close) (Wilder 1978), (..., L); high − low for the first bar."""
    high, low, close = bars["high"], bars["low"], bars["close"]
    within = np.minimum(np.maximum(close[..., :1], low[..., :1]), high[..., :1])
    previous = np.concatenate([within, close[..., :-1]], axis=-1)
    span: Floats = np.maximum(high, previous) - np.minimum(low, previous)
    return span


def z_scores(values: Floats) -> Floats:
    """(x − mean) / standard deviation within the window, or 0 if nothing varies; over the last dimension."""
    centred = values - values.mean(axis=-1, keepdims=True)
    spread = np.sqrt((centred * centred).mean(axis=-1, keepdims=True))
    spread[np.ptp(values, axis=-1) <= REL_TOL * np.abs(values).max(axis=-1)] = 0  # equal up to rounding
    return _ratio(centred, spread)


def _ratio(amount: Floats, unit: Floats, otherwise: float = 0.0) -> Floats:
    """Amount / unit where the unit is above 0; infinite if the quotient overflows a float64."""
    with np.errstate(over="ignore"):
        ratio: Floats = np.divide(amount, unit, out=np.full(np.shape(amount), otherwise), where=unit > 0)
    return ratio
