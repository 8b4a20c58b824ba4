"""Patterns that the embedded base was not made for: how well it learns beyond `ctxtrain sample`.

Input: a folder, sizes and a seed. Output: `train.jsonl`, `val.jsonl`, `test.jsonl` of windows with open, high,
low, close, volume and delta, no flags. Bars are drawn here, by a simpler market than any that the base has seen, and
windows are drawn until the classes are 35 / 35 / 30 %. A share of the labels is then replaced at random.

pullback     drift, reversal, then a pull-back: with the reversal if the pull-back's volume is weak, else SKIP
divergence   a new extreme of price in the last third that delta does not share: against the extreme, else SKIP
breakout     a close beyond a narrow range on raised volume: with it, else SKIP
two_tests    an extreme of price reached twice: against it if the second time has less volume, else SKIP

FROZEN are scored once, after the recipe of the base and the settings of the training are chosen on the others.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from ctxtrain.labels import LABELS

Floats = NDArray[np.float64]
Bars = dict[str, Floats]
LONG, SHORT, SKIP = range(len(LABELS))
SHARES = (0.35, 0.35, 0.30)
NOISE = 0.08
BARS = (32, 48)
FROZEN = ("pullback", "two_tests")
# Of two_tests, in units of a bar's deviation: how close both extremes must be, and how far the price must move away
# between them; in bars, the least distance between them; and the ratio of volume below which the second is weak.
SAME_LEVEL, BOUNCE, BARS_BETWEEN, WEAK = 0.7, 3.0, 6, 0.85


def write_pattern(name: str, folder: Path, *, train: int, val: int, test: int, seed: int) -> None:
    """Three files of windows of one pattern."""
    rng = np.random.default_rng([seed, sorted(PATTERNS).index(name)])
    for file, rows in (("train", train), ("val", val), ("test", test)):
        wanted = rng.permutation(np.repeat([LONG, SHORT, SKIP], np.rint(np.multiply(SHARES, rows)).astype(int)))
        lines = []
        for label in wanted.tolist():
            bars = _draw_until(PATTERNS[name], rng, label)
            shown = int(rng.choice([c for c in range(len(LABELS)) if c != label])) if rng.random() < NOISE else label
            lines.append(json.dumps(_row(bars, LABELS[shown])))
        (folder / f"{file}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _draw_until(draw: Callable[[Generator], tuple[Bars, int]], rng: Generator, label: int) -> Bars:
    while True:
        bars, drawn = draw(rng)
        if drawn == label:
            return bars


def _row(bars: Bars, label: str) -> dict[str, object]:
    columns = [column.tolist() for column in bars.values()]
    rows = [dict(zip(bars, values, strict=True)) for values in zip(*columns, strict=True)]
    return {"context_bars": rows[:-1], "current_bar": rows[-1], "label": label}


def _bars(rng: Generator, move: Floats, effort: Floats, side: Floats) -> Bars:
    """Bars from what each adds to the price, with volume around `effort` and delta around `side` of it."""
    close = 2000 + np.cumsum(move)
    opens = close - move
    wicks = rng.exponential(0.4, (2, len(move)))
    volume = np.rint(200 * effort * np.exp(0.3 * rng.standard_normal(len(move)))) + 1
    delta = np.rint(volume * np.clip(side + 0.15 * rng.standard_normal(len(move)), -1, 1))
    prices = {
        "open": opens,
        "high": np.maximum(opens, close) + wicks[0],
        "low": np.minimum(opens, close) - wicks[1],
        "close": close,
    }
    return {**{name: np.round(price, 1) for name, price in prices.items()}, "volume": volume, "delta": delta}


def _pullback(rng: Generator) -> tuple[Bars, int]:
    bars = int(rng.integers(*BARS))
    turn, top = np.sort(rng.choice(np.arange(8, bars - 4), 2, replace=False))
    way, weak = rng.choice([-1.0, 1.0]), rng.random() < 0.7
    stretch = np.searchsorted([turn, top], np.arange(bars), side="right")
    drift = np.array([-0.35, 0.6, -0.35])[stretch] * way
    move = drift + rng.standard_normal(bars)
    effort = np.array([1.0, 1.4, 0.8 if weak else 1.5])[stretch]
    label = (LONG if way > 0 else SHORT) if weak else SKIP
    return _bars(rng, move, effort, 0.2 * np.tanh(move)), label


def _divergence(rng: Generator) -> tuple[Bars, int]:
    bars = int(rng.integers(*BARS))
    move = rng.standard_normal(bars)
    side = 0.2 * np.tanh(move) + np.repeat(rng.uniform(-0.3, 0.3, 3), [bars - 2 * (bars // 3), bars // 3, bars // 3])
    window = _bars(rng, move, np.ones(bars), side)
    last = bars - bars // 3
    flow, recent = window["delta"][last - bars // 3 : last].mean(), window["delta"][last:].mean()
    new_high = window["high"][last:].max() > window["high"][:last].max()
    new_low = window["low"][last:].min() < window["low"][:last].min()
    if new_high and not new_low and recent < flow:
        return window, SHORT
    return window, LONG if new_low and not new_high and recent > flow else SKIP


def _breakout(rng: Generator) -> tuple[Bars, int]:
    bars = int(rng.integers(*BARS))
    narrow = int(rng.integers(8, 16))
    calm = np.where(np.arange(bars) >= bars - narrow, rng.choice([0.4, 1.0]), 1.0)
    move = calm * rng.standard_normal(bars)
    move[-1] = rng.choice([-1, 1]) * rng.uniform(0.2, 2.5)
    effort = np.ones(bars)
    effort[-1] = rng.uniform(0.5, 2.5)
    window = _bars(rng, move, effort, 0.2 * np.tanh(move))
    top, bottom = window["high"][-narrow:-1].max(), window["low"][-narrow:-1].min()
    whole = window["high"][:-1].max() - window["low"][:-1].min()
    if top - bottom > 0.55 * whole or window["volume"][-1] < 1.2 * window["volume"][:-1].mean():
        return window, SKIP
    close = window["close"][-1]
    return window, LONG if close > top else SHORT if close < bottom else SKIP


def _two_tests(rng: Generator) -> tuple[Bars, int]:
    bars = int(rng.integers(*BARS))
    first = int(rng.integers(6, bars // 2))
    second = int(rng.integers(first + BARS_BETWEEN, bars - 1))
    way, fresh = rng.choice([-1.0, 1.0]), rng.uniform(0.4, 1.8)
    depth, middle = rng.uniform(4, 9), (first + second) // 2
    turns = [0.0, depth, depth * rng.uniform(0.1, 0.6), depth + rng.normal(0, 0.6), depth - rng.uniform(0, 2)]
    path = np.interp(np.arange(bars), [0, first, middle, second, bars - 1], turns) * way
    move = np.diff(path, prepend=0.0) + 0.7 * rng.standard_normal(bars)
    effort = np.ones(bars)
    effort[first - 1 : first + 2], effort[second - 1 : second + 2] = 1.3, 1.3 * fresh
    window = _bars(rng, move, effort, 0.2 * np.tanh(move))
    top = _is_weak_second_test(window["high"], window["low"], window["volume"])
    bottom = _is_weak_second_test(-window["low"], -window["high"], window["volume"])
    return window, SKIP if top == bottom else SHORT if top else LONG


def _is_weak_second_test(high: Floats, low: Floats, volume: Floats) -> bool:
    """Whether the highest high is reached twice, with less volume around the second time."""
    bar = np.arange(len(high))
    best = int(high.argmax())
    for other in np.flatnonzero((high >= high.max() - SAME_LEVEL) & (abs(bar - best) >= BARS_BETWEEN)).tolist():
        early, late = sorted((best, other))
        if high.max() - low[early + 1 : late].min() >= BOUNCE:
            around = [volume[max(test - 1, 0) : test + 2].mean() for test in (early, late)]
            return bool(around[1] < WEAK * around[0])
    return False


PATTERNS: dict[str, Callable[[Generator], tuple[Bars, int]]] = {
    "pullback": _pullback,
    "divergence": _divergence,
    "breakout": _breakout,
    "two_tests": _two_tests,
}
