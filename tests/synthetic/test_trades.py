"""The outcome of a simulated event is that of the price path after it, within its week.

python -m pytest tests/synthetic/test_trades.py
"""

import json
from pathlib import Path

import numpy as np
import pytest

from ctxtrain.bars.structure import average_true_range
from ctxtrain.synthetic.bars import SYMBOLS, simulate
from ctxtrain.synthetic.sample import write_sample
from ctxtrain.synthetic.trades import HORIZON, trade_events
from tests.bars.test_triple_barrier import walk


def test_results_are_those_of_the_price_path_up_to_the_end_of_the_week() -> None:
    week = simulate(np.random.default_rng(2), 400, SYMBOLS[1])
    prices = week["open"], week["high"], week["low"], week["close"]
    atr = average_true_range(*prices[1:])
    events = np.array([30, 77, 150, 379, 380, 397, 398])
    found = trade_events(week, events)
    assert [horizon for *_, horizon in found] == [HORIZON, HORIZON, HORIZON, HORIZON, 19, 2, 1]
    for event, (long_r, short_r, horizon) in zip(events.tolist(), found, strict=True):
        for side, result in ((1, long_r), (-1, short_r)):
            expected, _, _ = walk(prices, event, side, 1.5 * atr[event], atr[event], horizon)
            assert result == pytest.approx(expected, abs=1e-6)


def test_an_event_on_the_last_bar_earns_nothing() -> None:
    week = simulate(np.random.default_rng(2), 100, SYMBOLS[1])
    assert trade_events(week, np.array([99])) == [(0.0, 0.0, 0)]


def test_every_row_of_a_sample_has_its_outcome_and_how_far_it_looks_ahead(tmp_path: Path) -> None:
    card = write_sample(tmp_path, train=300, val=20, test=20)
    assert card["outcome"] == {"profit": "1.5atr", "stop": "1atr", "horizon": HORIZON}
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert all(row["outcome"].keys() == {"long_r", "short_r", "cost"} for row in rows)
    assert {row["label_horizon"] for row in rows} <= set(range(HORIZON + 1))
    # The rule knows nothing of the future of simulated bars, so trades of either label earn about nothing.
    results = [row["outcome"][f"{row['label'].lower()}_r"] for row in rows if row["label"] != "SKIP"]
    assert abs(np.mean(results)) < 0.3
