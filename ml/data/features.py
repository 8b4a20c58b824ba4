"""Numbers of a window, made comparable across symbols, prices and volatilities (CTX V3 normalisation).

Comes in: a `Window`. Goes out: `WindowNumbers`, arrays of shape (bars,). Prices become positions between the
window's lowest low (0) and highest high (1); volume and delta become z-scores within the window; flags stay
as they are. Nothing looks past `current_bar`, since a window ends there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ml.data.rows import Window

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class WindowNumbers:
    """`open`, `high`, `low`, `close` in [0, 1]; `volume` and `delta` as z-scores; all of shape (bars,).

    `range_in_bars` is the window's range in units of its mean true range, `bar_range_share` that mean true range as a
    share of the last close's size, and `atr_ratio` the event's `atr_14` over the mean true range (None without it).
    """

    open: Floats
    high: Floats
    low: Floats
    close: Floats
    volume: Floats
    delta: Floats | None
    range_in_bars: float
    bar_range_share: float
    atr_ratio: float | None


def window_numbers(window: Window) -> WindowNumbers:
    """Normalise one window; a window without any movement has all prices at 0.5."""
    bars = window.bars
    prices = np.array([bars["open"], bars["high"], bars["low"], bars["close"]])
    floor = prices[2].min()
    height = prices[1].max() - floor
    mean_range = float(true_range(bars).mean())
    last_close = abs(float(bars["close"][-1]))
    atr = bars.get("atr_14")
    flows = [np.log1p(bars["volume"])]
    if "delta" in bars:
        flows.append(bars["delta"])
    volume, *delta = z_scores(np.array(flows))
    opens, highs, lows, closes = (prices - floor) / height if height > 0 else np.full(prices.shape, 0.5)
    return WindowNumbers(
        open=opens,
        high=highs,
        low=lows,
        close=closes,
        volume=volume,
        delta=delta[0] if delta else None,
        range_in_bars=float(height) / mean_range if mean_range > 0 else 0.0,
        bar_range_share=mean_range / last_close if last_close > 0 else 0.0,
        atr_ratio=None if atr is None else (float(atr[-1]) / mean_range if mean_range > 0 else 0.0),
    )


def true_range(bars: dict[str, Floats]) -> Floats:
    """max(high, previous close) − min(low, previous close) (Wilder 1978); the first bar has high − low."""
    high, low, close = bars["high"], bars["low"], bars["close"]
    previous = np.concatenate([np.minimum(np.maximum(close[:1], low[:1]), high[:1]), close[:-1]])
    span: Floats = np.maximum(high, previous) - np.minimum(low, previous)
    return span


def z_scores(values: Floats) -> Floats:
    """(x − mean) / standard deviation within the window, and 0 where nothing varies; over the last dimension."""
    centred = values - values.mean(axis=-1, keepdims=True)
    spread = np.sqrt((centred * centred).mean(axis=-1, keepdims=True))
    spread[np.ptp(values, axis=-1) == 0] = 0  # rounding may give equal values a deviation of 1e-17
    scores: Floats = np.divide(centred, spread, out=np.zeros_like(centred), where=spread > 0)
    return scores
