"""Windows upside down and windows without their oldest bars, for training only.

Input: a window. Output: its mirrored twin, or its newest bars.

In the twin every price p becomes high · low / p, with the highest high and the lowest low of the window. So the log
price is reflected about the middle of the window, and the twin covers the same prices. A window with a price of 0 or
below has no log price; there p becomes 2c − p, where c is the close of the event.

Each bar field of CTX V3 is in one group: prices, `SAME`, `NEGATED`, `PAIRS` (swapped), or `DISTANCES`, which keep their
share of the price. LONG and SHORT change places. Fields of `data.fields`, and features of other names, stay unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ctxtrain.data.bar_values import decimals
from ctxtrain.data.codec import Codec
from ctxtrain.data.codec_fitter import CodecFitter
from ctxtrain.data.parse_window import Window
from ctxtrain.data.row_schema import BAR_FIELDS, DIRECTIONS, PRICES, OwnFields
from ctxtrain.errors import ConfigError
from ctxtrain.labels import LABELS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SAME = frozenset(
    {
        *("volume", "ext_bos", "ext_choch", "int_bos", "int_choch"),
        *("fvg_retest", "fvg_penetration", "fvg_quality", "pb_wave_strength_ok", "wave_strength"),
        *("mgann_leg_index", "mgann_leg_first_fvg", "mgann_wave_strength"),
    }
)
NEGATED = DIRECTIONS | {"delta"}
DISTANCES = frozenset({"atr_14"})
PAIRS = (
    ("buy_vol", "sell_vol"),
    ("ext_bos_up", "ext_bos_down"),
    ("ext_choch_up", "ext_choch_down"),
    ("int_bos_up", "int_bos_down"),
    ("int_choch_up", "int_choch_down"),
    ("sweep_prev_high", "sweep_prev_low"),
    ("fvg_up", "fvg_down"),
)
PARTNER = {name: other for pair in PAIRS for name, other in (pair, pair[::-1])}
MIRRORED_LABEL: Ints = np.array([LABELS.index({"LONG": "SHORT", "SHORT": "LONG"}.get(name, name)) for name in LABELS])
MAX_DECIMALS = 15  # a float64 has no more


def mirrored(window: Window, *, keep_decimals: bool = False) -> Window:
    """The twin of a window with bars. With `keep_decimals`, prices are rounded to the decimals that they had.

    The twin lacks a field whose partner the window lacks.
    """
    bars = window.bars
    columns = _mirrored_prices(bars)
    columns |= {name: bars[name] * _price_ratio(bars, columns) for name in DISTANCES & bars.keys()}
    if keep_decimals:
        columns = {name: _rounded(values, bars, name) for name, values in columns.items()}
    for name, values in bars.items():
        if name in NEGATED:
            columns[name] = 0.0 - values  # no negative zero
        elif name in PARTNER:
            columns |= {name: bars[PARTNER[name]]} if PARTNER[name] in bars else {}
        else:
            columns.setdefault(name, values)
    label = None if window.label is None else int(MIRRORED_LABEL[window.label])
    ordered = {name: columns[name] for name in bars if name in columns}
    return replace(window, label=label, bars=ordered, features=_mirrored_features(window.features))


def twins(windows: Iterable[Window], codec: Codec) -> Iterator[Window]:
    """The twins of windows, in order, as the codec renders them: json text has the decimals of the rows."""
    for window in windows:
        yield mirrored(window, keep_decimals=codec.kind == "json")


def labels_with_twins(labels_N: Ints) -> Ints:
    """The labels of N rows and of their twins, of shape (2N,)."""
    return np.concatenate([labels_N, MIRRORED_LABEL[labels_N]])


def newest_bars(window: Window, count: int) -> Window:
    """The window without its oldest bars: `count` remain, the event is the last of them."""
    return replace(
        window,
        bars={name: values[-count:] for name, values in window.bars.items()},
        bar_words={name: words[-count:] for name, words in window.bar_words.items()},
    )


def fit_with_twins(kind: Literal["compact", "json"], windows: Iterable[Window], own: OwnFields) -> Codec:
    """The codec fitted to windows and their twins, so that its scales fit both."""
    fitter = CodecFitter(own)
    for window in windows:
        fitter.add(window)
        fitter.add(mirrored(window))
    return fitter.fit(kind)


def require_partners(codec: Codec) -> None:
    """Raise ConfigError if the model reads a field whose partner it lacks: the twin could not have that field."""
    faults = []
    for prefix, names in (("", {*codec.fields}), ("features.", {*codec.features})):
        faults += [
            f"augmentation.mirror swaps {prefix}{name} with {prefix}{PARTNER[name]}, but not every training row has "
            f"{prefix}{PARTNER[name]}. Add it to each row, remove {prefix}{name}, or set augmentation.mirror=false."
            for name in sorted(names & PARTNER.keys())
            if PARTNER[name] not in names
        ]
    if faults:
        raise ConfigError(faults)


def unchanged_fields(codec: Codec) -> list[str]:
    """What the model reads although its direction is unknown: own fields, and features of other names."""
    own = [name for name in codec.fields if name not in BAR_FIELDS]
    features = [name for name in codec.features if name not in SAME | NEGATED | PARTNER.keys()]
    return own + [f"features.{name}" for name in (*features, *codec.feature_words)]


def _mirrored_prices(bars: Mapping[str, Floats]) -> dict[str, Floats]:
    """Open, high, low and close of the twin; its highs come from the lows. The order of prices within a bar holds."""
    highest, lowest = bars["high"].max(), bars["low"].min()
    source = {"open": bars["open"], "high": bars["low"], "low": bars["high"], "close": bars["close"]}
    if lowest <= 0:
        return {name: 2 * bars["close"][-1] - values for name, values in source.items()}
    return {name: highest * (lowest / values) for name, values in source.items()}


def _price_ratio(bars: Mapping[str, Floats], prices: Mapping[str, Floats]) -> Floats:
    """The factor of distances at each bar; 1 if the window was mirrored in plain price."""
    close = bars["close"]
    return prices["close"] / close if bars["low"].min() > 0 else np.ones_like(close)


def _rounded(values: Floats, bars: Mapping[str, Floats], name: str) -> Floats:
    """The values with as many decimals as the field had; all prices have those of the finest price."""
    places = max(decimals(value) for kin in (PRICES if name in PRICES else (name,)) for value in bars[kin].tolist())
    return values.round(places) if places <= MAX_DECIMALS else values


def _mirrored_features(features: Mapping[str, float]) -> dict[str, float]:
    """Features that have the name of a bar field with a direction change as that field does."""
    changed = {name: 0.0 - value if name in NEGATED else value for name, value in features.items()}
    return changed | {name: features[PARTNER[name]] for name in features.keys() & PARTNER if PARTNER[name] in features}
