"""Sample data with known scores: simulated CTX windows, a labelling rule, and a known share of wrong labels.

Input: numbers only (rows per file, seed, noise, class mix). Output: `train.jsonl`, `val.jsonl`, `test.jsonl` (one CTX
window per line, in time order) and `sample.json` (arguments, counts, and the best score a model can expect). The same
arguments give the same bytes.

An event is the bar on which the price first trades back into the active fair value gap. Its window ends there, and
`rule_label` computes the label from the bars of the window alone. Each file uses whole weeks, later than those of the
previous file, so no bar is in two files.

`outcome` is what a trade at the event would have earned, by the triple barrier of `ctxtrain windows` with its default
distances, on the bars after the event; the label does not depend on it. A trade ends with the week at the latest, so
`label_horizon` is smaller for the last events of a week.

Noise: an exact share `noise` of the rows of each file gets one of the other two labels, with equal probability. Let p_c
be the share of windows with rule class c. Their label is then c with probability 1 - noise, and each other class with
probability noise / 2. In closed form:

- accuracy: following the rule scores 1 - noise, and nothing scores more while noise < 2/3;
- macro-F1: label c has the share l_c = noise / 2 + k p_c, with k = 1 - 3 noise / 2, and the rule's F1 for it
  is 2 (1 - noise) p_c / (p_c + l_c). A model that predicts c for a share q scores at most
  2 (noise q / 2 + k min(p_c, q)) / (q + l_c), which peaks at q = p_c when
  k p_c (1 - noise / 2) >= noise^2 / 4. If that holds for the rarest class, the rule is optimal;
- shuffled labels: only l_c can be known. The commonest class has the best accuracy; for macro-F1, predicting
  c for a share q scores 2 q l_c / (q + l_c), concave in q, best at q = l_c (Lagrange), a mean F1 of 1/3.
"""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.random import Generator, SeedSequence, default_rng
from numpy.typing import NDArray

from ctxtrain.bars.structure import Bars
from ctxtrain.labels import LABELS
from ctxtrain.limits import MAX_SAMPLE_ROWS
from ctxtrain.storage.atomic_files import make_folder, replace_atomically
from ctxtrain.storage.ownership import SAMPLE
from ctxtrain.storage.split_folder import require_split_folder
from ctxtrain.synthetic.bars import SYMBOLS, WEEK_BARS, Symbol, simulate
from ctxtrain.synthetic.trades import HORIZON, PROFIT_ATR, STOP_ATR, trade_events

PRICE_FIELDS = ("bar_index", "time", "open", "high", "low", "close", "volume", "delta")
RULE_FIELDS = (
    "ext_choch_up", "ext_choch_down", "fvg_up", "fvg_down", "fvg_retest",
    "ext_dir", "mgann_leg_index", "pb_wave_strength_ok",
)  # fmt: skip
MAX_EARLY_LEG = 2
MIN_SHARE = 0.02
MAX_NOISE = 2 / 3  # from here on the rule is no longer optimal
MAX_WINDOW_BARS = 500
MAX_BARS = 10_000_000  # simulated in total; takes some minutes

Bar = Mapping[str, Any]


def write_sample(
    folder: str | Path,
    *,
    train: int = 1200,
    val: int = 400,
    test: int = 400,
    seed: int = 0,
    noise: float = 0.08,
    mix: tuple[float, float, float] = (0.35, 0.35, 0.30),
    bars: tuple[int, int] = (30, 50),
    hide_flags: bool = False,
    shuffle_labels: bool = False,
) -> dict[str, Any]:
    """Write the three files and `sample.json` into `folder`, and return the contents of `sample.json`.

    `mix` is the share of each rule label before noise, in the order of `LABELS`; `bars` the shortest and the longest
    window, including the current bar. `hide_flags` keeps only prices, volume and delta on the bars. The best score is
    then an upper bound, because flags also depend on bars before the window. `shuffle_labels` permutes the labels
    within each file, so that nothing can be learned.
    """
    rows = {"train": train, "val": val, "test": test}
    _check_arguments(rows, seed, noise, mix, bars)
    folder = Path(folder)
    require_split_folder(folder, SAMPLE, rows)
    market, files = _Market(seed), {}
    with ExitStack() as written:  # all files are moved into place together, sample.json first
        for number, (name, count) in enumerate(rows.items()):
            rng = default_rng(SeedSequence(seed, spawn_key=(number,)))
            windows = _cut_windows(market, _class_counts(count, mix), bars, rng)
            labels, replaced = _noisy_labels([window.rule_label for window in windows], noise, rng)
            if shuffle_labels:
                labels = [labels[i] for i in rng.permutation(count)]
            make_folder(folder)
            lines, digest = written.enter_context(replace_atomically(folder / f"{name}.jsonl", 0)), hashlib.sha256()
            for window, label in zip(windows, labels, strict=True):
                line = _json(_row(window, label, hide_flags))
                lines.write(line)
                digest.update(line)
            files[name] = {**_file_facts(windows, labels, replaced), "sha256": digest.hexdigest()}
        facts = {
            "arguments": {
                **rows, "seed": seed, "noise": noise, "mix": list(mix), "bars": list(bars),
                "hide_flags": hide_flags, "shuffle_labels": shuffle_labels,
            },
            "outcome": {"profit": f"{PROFIT_ATR}atr", "stop": f"{STOP_ATR}atr", "horizon": HORIZON},
            "simulated_bars": market.weeks * len(SYMBOLS) * WEEK_BARS,
            "files": files,
            "expected": _expected_scores(noise, mix, shuffle_labels),
        }  # fmt: skip
        written.enter_context(replace_atomically(folder / SAMPLE, 0)).write(_json(facts, orjson.OPT_INDENT_2))
    return facts


def rule_label(bars: Sequence[Bar]) -> str:
    """The noiseless label of a window, from its own bars (oldest first, current bar last)."""
    for label in ("LONG", "SHORT"):
        if all(rule_conditions(bars, label).values()):
            return label
    return "SKIP"


def rule_conditions(bars: Sequence[Bar], label: str) -> dict[str, bool]:
    """Whether each of the six conditions of LONG, or of SHORT (the mirror image), holds at the last bar."""
    event = bars[-1]
    side, against, direction = ("up", "down", 1) if label == "LONG" else ("down", "up", -1)
    first_against = next((t for t, bar in enumerate(bars) if bar[f"ext_choch_{against}"]), len(bars))
    return {
        f"ext_choch_{against}_reclaimed": any(bar[f"ext_choch_{side}"] for bar in bars[first_against + 1 :]),
        f"fvg_{side}": bool(event[f"fvg_{side}"]),
        "fvg_retest": bool(event["fvg_retest"]),
        f"ext_dir_{side}": event["ext_dir"] == direction,
        "mgann_leg_early": event["mgann_leg_index"] <= MAX_EARLY_LEG,
        "pb_wave_strength_ok": bool(event["pb_wave_strength_ok"]),
    }


class _Market:
    """All symbols, one week at a time; prices continue from week to week."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.weeks = 0
        self.last_close: dict[str, float] = {}

    def next_week(self) -> list[tuple[Symbol, Bars]]:
        week = []
        for number, symbol in enumerate(SYMBOLS):
            rng = default_rng(SeedSequence(self.seed, spawn_key=(self.weeks, number)))
            first, last_close = self.weeks * WEEK_BARS, self.last_close.get(symbol.name)
            bars = simulate(rng, WEEK_BARS, symbol, first_bar=first, last_close=last_close)
            self.last_close[symbol.name] = float(bars["close"][-1])
            week.append((symbol, bars))
        self.weeks += 1
        return week


@dataclass(frozen=True)
class _Window:
    """Bars `first` to `event`, inclusive, of one week of one symbol."""

    symbol: Symbol
    week: Bars
    first: int
    event: int
    rule_label: str
    long_r: float
    short_r: float
    horizon: int  # bars that the outcome looks ahead

    @property
    def time(self) -> str:
        return str(np.datetime_as_string(self.week["time"][self.event], unit="ms", timezone="UTC"))


def _cut_windows(market: _Market, counts: dict[str, int], bars: tuple[int, int], rng: Generator) -> list[_Window]:
    """Windows in time order, `counts` of each rule label, drawn from as many new weeks as necessary."""
    windows_of_label: dict[str, list[_Window]] = {label: [] for label in LABELS}
    first_week = market.weeks
    while any(len(windows_of_label[label]) < count for label, count in counts.items()):
        for symbol, week in market.next_week():
            for window in _week_windows(symbol, week, bars, rng):
                windows_of_label[window.rule_label].append(window)
        # Extrapolated from the weeks so far, so that an infeasible request fails early.
        times_more = max(count / max(1, len(windows_of_label[label])) for label, count in counts.items())
        needed_weeks = first_week + times_more * (market.weeks - first_week)
        needed_bars = round(needed_weeks * len(SYMBOLS) * WEEK_BARS)
        if needed_bars > MAX_BARS:
            raise ValueError(
                f"the requested rows must fit into {MAX_BARS:,} simulated bars, but need about {needed_bars:,}. "
                "Request fewer rows, or a mix with more SKIP."
            )
    selected = []
    for label, count in counts.items():
        selected += [windows_of_label[label][i] for i in rng.choice(len(windows_of_label[label]), count, replace=False)]
    return sorted(selected, key=lambda window: (window.week["bar_index"][window.event], window.symbol.name))


def _week_windows(symbol: Symbol, week: Bars, bars: tuple[int, int], rng: Generator) -> list[_Window]:
    """One window for each event of the week with enough bars before it."""
    retest = week["fvg_retest"]
    events = np.flatnonzero(retest[1:] & ~retest[:-1]) + 1
    firsts = events + 1 - rng.integers(bars[0], bars[1], size=len(events), endpoint=True)
    rows = _bar_rows(week, 0, len(retest), RULE_FIELDS)
    outcomes = trade_events(week, events)
    return [
        _Window(symbol, week, first, event, rule_label(rows[first : event + 1]), *outcome)
        for first, event, outcome in zip(firsts.tolist(), events.tolist(), outcomes, strict=True)
        if first >= 0
    ]


def _bar_rows(bars: Bars, first: int, stop: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """Bars `first` to `stop`, exclusive, as JSON objects with the fields `names`."""
    columns = []
    for name in names:
        values = bars[name][first:stop]
        if name == "time":
            values = np.datetime_as_string(values, unit="ms", timezone="UTC")
        columns.append(values.tolist())
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _row(window: _Window, label: str, hide_flags: bool) -> dict[str, Any]:
    names = PRICE_FIELDS if hide_flags else tuple(window.week)
    bars = _bar_rows(window.week, window.first, window.event + 1, names)
    row = {
        "id": f"{window.symbol.name}_{window.time}",
        "symbol": window.symbol.name,
        "timeframe": "M1",
        "context_bars": bars[:-1],
        "current_bar": bars[-1],
        "label": label,
        "outcome": {"long_r": window.long_r, "short_r": window.short_r, "cost": 0.0},
        "label_horizon": window.horizon,
    }
    if not hide_flags:
        # The conditions for the side of the gap. They follow from the rule, not from the noisy label.
        conditions = rule_conditions(bars, "LONG" if bars[-1]["fvg_up"] else "SHORT")
        row["conditions_met"] = [name for name, holds in conditions.items() if holds]
        row["conditions_failed"] = [name for name, holds in conditions.items() if not holds]
    return row


def _class_counts(rows: int, mix: Sequence[float]) -> dict[str, int]:
    """Integer rows per label, as close to `mix` as possible: the largest remainders are rounded up."""
    exact = np.array(mix) * rows
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: rows - counts.sum()]] += 1
    return dict(zip(LABELS, counts.tolist(), strict=True))


def _noisy_labels(rule_labels: list[str], noise: float, rng: Generator) -> tuple[list[str], int]:
    labels = rule_labels.copy()
    replaced = rng.choice(len(labels), size=round(noise * len(labels)), replace=False)
    for i in replaced.tolist():
        others = [label for label in LABELS if label != labels[i]]
        labels[i] = others[rng.integers(len(others))]
    return labels, len(replaced)


def _file_facts(windows: list[_Window], labels: list[str], replaced: int) -> dict[str, Any]:
    confusion = np.zeros((len(LABELS), len(LABELS)))
    for window, label in zip(windows, labels, strict=True):
        confusion[LABELS.index(window.rule_label), LABELS.index(label)] += 1
    return {
        "rows": len(labels),
        "replaced_labels": replaced,
        "rule_labels": dict(zip(LABELS, confusion.sum(axis=1).astype(int).tolist(), strict=True)),
        "labels": dict(zip(LABELS, confusion.sum(axis=0).astype(int).tolist(), strict=True)),
        "rule": _score(confusion),
        "first_event": windows[0].time,
        "last_event": windows[-1].time,
    }


def _expected_scores(noise: float, mix: Sequence[float], shuffled: bool) -> dict[str, Any]:
    """Expected scores of the rule, and the best possible ones; derived in the module docstring."""
    shares = np.array(mix)
    keep = 1 - 1.5 * noise
    label_shares = noise / 2 + keep * shares
    if shuffled:
        rule = _score(np.outer(shares, label_shares))
        return {"rule": rule, "best": {"accuracy": float(label_shares.max()), "macro_f1": 1 / 3}}
    rule = _score(shares[:, None] * (noise / 2 + keep * np.eye(len(LABELS))))
    rule_is_best = keep * shares.min() * (1 - noise / 2) >= noise**2 / 4
    return {"rule": rule, "best": rule if rule_is_best else {**rule, "macro_f1": None}}


def _score(confusion: NDArray[np.float64]) -> dict[str, float]:
    """Accuracy and macro-F1 of predictions (rows) against labels (columns), from counts or shares.

    A class that neither occurs nor is predicted has no F1 and is excluded from the mean.
    """
    hits, either = confusion.diagonal(), confusion.sum(axis=0) + confusion.sum(axis=1)
    f1 = 2 * hits[either > 0] / either[either > 0]
    return {"accuracy": float(hits.sum() / confusion.sum()), "macro_f1": float(f1.mean())}


def _json(value: Any, option: int = 0) -> bytes:
    return orjson.dumps(value, option=option | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE)


def _check_arguments(
    rows: Mapping[str, int], seed: int, noise: float, mix: Sequence[float], bars: Sequence[int]
) -> None:
    """Raise ValueError with one line per invalid argument."""
    problems = [f"{name} must be at least 1 row, got {n}." for name, n in rows.items() if n < 1]
    problems += [
        f"{name} must be at most {MAX_SAMPLE_ROWS:,} rows, got {n}." for name, n in rows.items() if n > MAX_SAMPLE_ROWS
    ]
    if not 0 <= seed < 2**32:
        problems.append(f"seed must be at least 0 and below 2^32, got {seed}. Use 0 or a smaller number.")
    if not 0 <= noise < MAX_NOISE:
        problems.append(f"noise must be at least 0 and below 2/3, got {noise}. Use 0 for none.")
    if len(mix) != len(LABELS) or not abs(sum(mix) - 1) <= 1e-6 or min(mix) < MIN_SHARE:  # `not` also catches NaN
        rule = f"mix must be the shares of LONG, SHORT and SKIP, each at least {MIN_SHARE}, that sum to 1"
        problems.append(f"{rule}, got {tuple(mix)}. Use (0.35, 0.35, 0.30).")
    if len(bars) != 2 or not 2 <= bars[0] <= bars[1] <= MAX_WINDOW_BARS:
        rule = f"bars must be the shortest and the longest window, from 2 to {MAX_WINDOW_BARS} bars"
        problems.append(f"{rule}, got {tuple(bars)}. Use (30, 50).")
    if problems:
        raise ValueError("\n".join(problems))
