"""Numbers of a window, made comparable across symbols, prices and volatilities (CTX V3 normalisation).

Comes in: the bars of a window, or of many that have as many bars. Goes out: `WindowNumbers`. Prices become positions
between the window's lowest low (0) and highest high (1); volume and delta become z-scores within the window; flags stay
as they are. Nothing looks past `current_bar`, since a window ends there.

Legend: ... nothing for one window, and W for W windows; L bars of a window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class WindowNumbers:
    """`open`, `high`, `low`, `close` in [0, 1]; `volume` and `delta` as z-scores; all of shape (..., L).

    Of shape (...): `range_in_bars` is the window's range in units of its mean true range, `bar_range_share` that mean
    true range as a share of the last close's size, and `atr_ratio` the event's `atr_14` over the mean true range (None
    without it).
    """

    open: Floats
    high: Floats
    low: Floats
    close: Floats
    volume: Floats
    delta: Floats | None
    range_in_bars: Floats
    bar_range_share: Floats
    atr_ratio: Floats | None


def window_numbers(bars: Mapping[str, Floats]) -> WindowNumbers:
    """Normalise fields of shape (..., L); a window without any movement has all prices at 0.5.

    Each window's numbers are the same to the bit whichever windows it comes with.
    """
    prices = np.array([bars["open"], bars["high"], bars["low"], bars["close"]])
    floor = prices[2].min(axis=-1, keepdims=True)
    height = prices[1].max(axis=-1, keepdims=True) - floor
    mean_range = true_range(bars).mean(axis=-1)
    flows = [np.log1p(bars["volume"])]
    if "delta" in bars:
        flows.append(bars["delta"])
    volume, *delta = z_scores(np.array(flows))
    opens, highs, lows, closes = _ratio(prices - floor, height, otherwise=0.5)
    return WindowNumbers(
        open=opens,
        high=highs,
        low=lows,
        close=closes,
        volume=volume,
        delta=delta[0] if delta else None,
        range_in_bars=_ratio(height[..., 0], mean_range),
        bar_range_share=_ratio(mean_range, np.abs(bars["close"][..., -1])),
        atr_ratio=_ratio(bars["atr_14"][..., -1], mean_range) if "atr_14" in bars else None,
    )


def true_range(bars: Mapping[str, Floats]) -> Floats:
    """max(high, previous close) − min(low, previous close) (Wilder 1978), (..., L); the first bar has high − low."""
    high, low, close = bars["high"], bars["low"], bars["close"]
    within = np.minimum(np.maximum(close[..., :1], low[..., :1]), high[..., :1])
    previous = np.concatenate([within, close[..., :-1]], axis=-1)
    span: Floats = np.maximum(high, previous) - np.minimum(low, previous)
    return span


def z_scores(values: Floats) -> Floats:
    """(x − mean) / standard deviation within the window, and 0 where nothing varies; over the last dimension."""
    centred = values - values.mean(axis=-1, keepdims=True)
    spread = np.sqrt((centred * centred).mean(axis=-1, keepdims=True))
    spread[np.ptp(values, axis=-1) == 0] = 0  # rounding may give equal values a deviation of 1e-17
    return _ratio(centred, spread)


def _ratio(amount: Floats, unit: Floats, otherwise: float = 0.0) -> Floats:
    """Amount / unit where the unit is above 0; infinite where that is too much for a float64."""
    with np.errstate(over="ignore"):
        ratio: Floats = np.divide(amount, unit, out=np.full(np.shape(amount), otherwise), where=unit > 0)
    return ratio
