"""Simulated bars, and the sample files cut from them.

python -m pytest tests/synthetic/test_sample.py
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ctxtrain.bars.structure import Bars
from ctxtrain.labels import LABELS
from ctxtrain.synthetic.bars import SESSION_BARS, SYMBOLS, Symbol, simulate
from ctxtrain.synthetic.sample import PRICE_FIELDS, rule_label, write_sample

Row = dict[str, Any]
FILES = ("train.jsonl", "val.jsonl", "test.jsonl")
SIZES: Row = {"train": 160, "val": 60, "test": 60}
BAR_FIELDS = {
    *(
        "bar_index",
        "time",
        "open",
        "high",
        "low",
        "close",
        "volume",
        "delta",
        "buy_vol",
        "sell_vol",
        "atr_14",
    ),
    *("ext_dir", "ext_bos", "ext_choch", "ext_choch_up", "ext_choch_down", "int_dir", "int_bos", "int_choch"),
    *("sweep_prev_high", "sweep_prev_low", "fvg_up", "fvg_down", "fvg_retest"),
    *("mgann_leg_index", "wave_strength", "pb_wave_strength_ok"),
}


def write(folder: Path, **options: Any) -> Row:
    return write_sample(folder, noise=0.1, **SIZES, **options)


def read(folder: Path, name: str) -> list[Row]:
    return [json.loads(line) for line in (folder / name).read_bytes().splitlines()]


def window(row: Row) -> list[Row]:
    return [*row["context_bars"], row["current_bar"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sample")
    write(path / "made")
    return path / "made"


@pytest.fixture(scope="module")
def rows(folder: Path) -> dict[str, list[Row]]:
    return {name: read(folder, name) for name in FILES}


@pytest.fixture(scope="module", params=SYMBOLS, ids=lambda symbol: symbol.name)
def market(request: pytest.FixtureRequest) -> tuple[Symbol, Bars]:
    symbol: Symbol = request.param
    return symbol, simulate(np.random.default_rng(3), 3 * SESSION_BARS, symbol)


# Simulated bars


def test_bars_are_valid_and_on_the_tick_grid(market: tuple[Symbol, Bars]) -> None:
    symbol, bars = market
    assert (bars["high"] >= np.maximum(bars["open"], bars["close"])).all()
    assert (bars["low"] <= np.minimum(bars["open"], bars["close"])).all()
    for name in ("open", "high", "low", "close"):
        ticks = bars[name] / symbol.tick
        assert np.allclose(ticks, np.rint(ticks), atol=1e-6), name
    assert bars["volume"].dtype.kind == "i"
    assert bars["volume"].min() >= 1
    assert min(bars["buy_vol"].min(), bars["sell_vol"].min()) >= 0
    assert (bars["buy_vol"] + bars["sell_vol"] == bars["volume"]).all()
    assert (bars["buy_vol"] - bars["sell_vol"] == bars["delta"]).all()


def test_time_steps_are_a_minute_within_a_session_and_an_hour_more_between(
    market: tuple[Symbol, Bars],
) -> None:
    steps = np.diff(market[1]["time"]).astype(int)
    breaks = np.flatnonzero(steps != 1)
    assert breaks.tolist() == [SESSION_BARS - 1, 2 * SESSION_BARS - 1]
    assert steps[breaks].tolist() == [61, 61]


def test_volatility_clusters_and_volume_follows_the_session_and_the_move(market: tuple[Symbol, Bars]) -> None:
    bars = market[1]
    move = (bars["close"] - bars["open"]) / bars["open"]
    size = np.abs(move)
    # Regimes and the session alone reach about 0.15.
    assert np.corrcoef(size[:-1], size[1:])[0, 1] > 0.22
    assert np.corrcoef(move, bars["delta"])[0, 1] > 0.4
    assert np.corrcoef(size, bars["volume"])[0, 1] > 0.3
    minute = bars["bar_index"] % SESSION_BARS
    new_york, night = np.abs(minute - 960) < 60, minute < 240
    assert bars["volume"][new_york].mean() > 1.8 * bars["volume"][night].mean()
    assert size[new_york].mean() > 1.2 * size[night].mean()


def test_a_later_stretch_goes_on_from_price_and_time() -> None:
    rng = np.random.default_rng(0)
    first = simulate(rng, 100, SYMBOLS[0])
    second = simulate(rng, 100, SYMBOLS[0], first_bar=100, last_close=7000.0)
    assert second["bar_index"][0] == first["bar_index"][-1] + 1
    assert second["time"][0] - first["time"][-1] == np.timedelta64(1, "m")
    assert abs(second["open"][0] - 7000.0) < 1.0


# The label rule


def long_window() -> list[Row]:
    quiet = {"ext_choch_up": False, "ext_choch_down": False}
    event = {
        "fvg_up": True,
        "fvg_down": False,
        "fvg_retest": True,
        "ext_dir": 1,
        "mgann_leg_index": 2,
        "pb_wave_strength_ok": True,
    }
    bars: list[Row] = [{**quiet, **event} for _ in range(30)]
    bars[5]["ext_choch_down"] = bars[12]["ext_choch_up"] = True
    return bars


def swap_sides(bars: list[Row]) -> list[Row]:
    other = {"up": "down", "down": "up"}
    return [
        {
            (name[: -len(side)] + other[side] if (side := name.rpartition("_")[2]) in other else name): (
                -value if name == "ext_dir" else value
            )
            for name, value in bar.items()
        }
        for bar in bars
    ]


def set_event(**values: Any) -> Callable[[list[Row]], None]:
    return lambda bars: bars[-1].update(values)


def reclaim_first(bars: list[Row]) -> None:
    bars[5], bars[12] = bars[12], bars[5]


def no_reclaim(bars: list[Row]) -> None:
    bars[12]["ext_choch_up"] = False


def test_all_six_conditions_make_the_label() -> None:
    assert rule_label(long_window()) == "LONG"
    assert rule_label(swap_sides(long_window())) == "SHORT"


@pytest.mark.parametrize(
    "spoil",
    [
        set_event(fvg_up=False, fvg_down=True),
        set_event(fvg_retest=False),
        set_event(ext_dir=0),
        set_event(mgann_leg_index=3),
        set_event(pb_wave_strength_ok=False),
        reclaim_first,
        no_reclaim,
    ],
)
def test_one_missing_condition_makes_it_skip(spoil: Callable[[list[Row]], None]) -> None:
    bars = long_window()
    spoil(bars)
    assert rule_label(bars) == "SKIP"
    assert rule_label(swap_sides(bars)) == "SKIP"


# Files


def test_same_arguments_same_bytes(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "again")
    write(tmp_path / "other", seed=1)
    for name in (*FILES, "sample.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != (folder / name).read_bytes()


def test_rows_have_the_shape_of_an_export(rows: dict[str, list[Row]]) -> None:
    every = [row for name in FILES for row in rows[name]]
    assert len({row["id"] for row in every}) == len(every)
    assert {row["symbol"] for row in every} == {symbol.name for symbol in SYMBOLS}
    assert {len(window(row)) for row in every} == set(range(30, 51))
    for row in every:
        assert row["label"] in LABELS
        assert row["timeframe"] == "M1"
        assert row["id"] == f"{row['symbol']}_{row['current_bar']['time']}"
        bars = window(row)
        assert all(bar.keys() == BAR_FIELDS for bar in bars)
        assert np.diff([bar["bar_index"] for bar in bars]).tolist() == [1] * (len(bars) - 1)
        event, before = bars[-1], bars[-2]
        assert event["fvg_retest"]
        assert not before["fvg_retest"]
        assert event["fvg_up"] != event["fvg_down"]


def test_bar_values_have_their_types_and_ranges(rows: dict[str, list[Row]]) -> None:
    for row in rows["test.jsonl"]:
        for bar in window(row):
            assert {bar["ext_dir"], bar["int_dir"]} <= {-1, 0, 1}
            assert 1 <= bar["mgann_leg_index"] <= 10
            assert 0 <= bar["wave_strength"] <= 100
            assert bar["time"].endswith(":00.000Z")
            for name in ("ext_choch", "fvg_up", "sweep_prev_low", "pb_wave_strength_ok"):
                assert isinstance(bar[name], bool)
            for name in ("bar_index", "volume", "delta", "buy_vol", "sell_vol", "mgann_leg_index"):
                assert type(bar[name]) is int


def test_labels_follow_the_rule_but_for_the_replaced(folder: Path, rows: dict[str, list[Row]]) -> None:
    facts = json.loads((folder / "sample.json").read_text())
    assert facts["arguments"]["noise"] == 0.1
    assert facts["files"]["train"]["rule_labels"] == {"LONG": 56, "SHORT": 56, "SKIP": 48}
    for name, size in SIZES.items():
        made = rows[f"{name}.jsonl"]
        wrong = [(rule_label(window(row)), row["label"]) for row in made if rule_label(window(row)) != row["label"]]
        stated = facts["files"][name]
        assert len(made) == stated["rows"] == size
        assert len(wrong) == stated["replaced_labels"] == size // 10
        assert Counter(row["label"] for row in made) == stated["labels"]
        assert Counter(rule_label(window(row)) for row in made) == stated["rule_labels"]


def test_noise_goes_to_both_other_labels(tmp_path: Path) -> None:
    write_sample(tmp_path, train=150, val=1, test=1, noise=0.6)
    pairs = Counter((rule_label(window(row)), row["label"]) for row in read(tmp_path, "train.jsonl"))
    assert sum(count for (rule, label), count in pairs.items() if rule != label) == 90
    for rule in LABELS:
        for label in LABELS:
            assert pairs[rule, label] > (5 if rule != label else 0), (rule, label)


def test_conditions_tell_of_the_rule(rows: dict[str, list[Row]]) -> None:
    for row in rows["train.jsonl"]:
        assert len(row["conditions_met"]) + len(row["conditions_failed"]) == 6
        assert (not row["conditions_failed"]) == (rule_label(window(row)) != "SKIP")
    failed = Counter(len(row["conditions_failed"]) for row in rows["train.jsonl"])
    assert failed[1] > 0, "no near miss among the SKIP rows"


@pytest.mark.parametrize("mix", [(0.02, 0.08, 0.90), (0.49, 0.49, 0.02)])
def test_mix_is_met(tmp_path: Path, mix: tuple[float, float, float]) -> None:
    facts = write_sample(tmp_path, train=200, val=50, test=51, mix=mix, noise=0.0)
    for name in FILES:
        made = read(tmp_path, name)
        counts = Counter(rule_label(window(row)) for row in made)
        assert facts["files"][name.partition(".")[0]]["labels"] == {label: counts[label] for label in LABELS}
        for label, share in zip(LABELS, mix, strict=True):
            assert abs(counts[label] - share * len(made)) < 1


def test_files_follow_each_other_in_time_and_share_no_bar(rows: dict[str, list[Row]]) -> None:
    last_event, seen = "", set[tuple[str, int]]()
    for name in FILES:
        times = [row["current_bar"]["time"] for row in rows[name]]
        assert times == sorted(times)
        assert min(window(row)[0]["time"] for row in rows[name]) > last_event
        used = {(row["symbol"], bar["bar_index"]) for row in rows[name] for bar in window(row)}
        assert not used & seen
        last_event, seen = times[-1], seen | used


def test_a_bar_is_the_same_in_every_window(rows: dict[str, list[Row]]) -> None:
    bars: dict[tuple[str, int], Row] = {}
    for row in rows["train.jsonl"]:
        for bar in window(row):
            assert bars.setdefault((row["symbol"], bar["bar_index"]), bar) == bar


def test_hide_flags_leaves_the_same_prices_and_labels(rows: dict[str, list[Row]], tmp_path: Path) -> None:
    write(tmp_path, hide_flags=True)
    for name in FILES:
        for hidden, full in zip(read(tmp_path, name), rows[name], strict=True):
            assert hidden.keys() == full.keys() - {"conditions_met", "conditions_failed"}
            assert (hidden["id"], hidden["label"]) == (full["id"], full["label"])
            for bar, full_bar in zip(window(hidden), window(full), strict=True):
                assert bar == {field: full_bar[field] for field in PRICE_FIELDS}


def test_shuffled_labels_keep_their_counts_and_tell_nothing(folder: Path, tmp_path: Path) -> None:
    facts = write(tmp_path, shuffle_labels=True)
    plain = json.loads((folder / "sample.json").read_text())
    for name in SIZES:
        assert facts["files"][name]["labels"] == plain["files"][name]["labels"]
        assert [row["id"] for row in read(tmp_path, f"{name}.jsonl")] == [
            row["id"] for row in read(folder, f"{name}.jsonl")
        ]
    assert facts["arguments"]["shuffle_labels"]
    assert facts["files"]["train"]["rule"]["accuracy"] < 0.45
    assert facts["expected"]["best"]["macro_f1"] == pytest.approx(1 / 3)
    assert facts["expected"]["best"]["accuracy"] == pytest.approx(0.05 + 0.85 * 0.35)


# Scores


def scores(confusion: NDArray[np.float64]) -> tuple[float, float]:
    """Accuracy and macro-F1 by way of precision and recall; rows are predictions, columns labels."""
    precision = confusion.diagonal() / confusion.sum(axis=1)
    recall = confusion.diagonal() / confusion.sum(axis=0)
    f1 = 2 * precision * recall / (precision + recall)
    return confusion.trace() / confusion.sum(), f1.mean()


def test_file_scores_are_those_of_the_rule(folder: Path, rows: dict[str, list[Row]]) -> None:
    facts = json.loads((folder / "sample.json").read_text())
    for name in SIZES:
        confusion = np.zeros((3, 3))
        for row in rows[f"{name}.jsonl"]:
            confusion[LABELS.index(rule_label(window(row))), LABELS.index(row["label"])] += 1
        stated = facts["files"][name]["rule"]
        assert (stated["accuracy"], stated["macro_f1"]) == pytest.approx(scores(confusion))


@pytest.mark.parametrize(
    ("noise", "mix", "known"),
    [(0.08, (0.35, 0.35, 0.3), True), (0.15, (0.02, 0.08, 0.9), True), (0.5, (0.02, 0.08, 0.9), False)],
)
def test_no_use_of_the_rule_scores_more_than_the_best(
    tmp_path: Path, noise: float, mix: tuple[float, float, float], known: bool
) -> None:
    expected = write_sample(tmp_path, train=3, val=3, test=3, noise=noise, mix=mix)["expected"]
    rng = np.random.default_rng(0)
    rule_classes = rng.choice(3, size=400_000, p=mix)
    moved = rng.random(rule_classes.size) < noise
    labels = (rule_classes + moved * rng.integers(1, 3, size=rule_classes.size)) % 3
    drawn = np.zeros((3, 3))
    np.add.at(drawn, (rule_classes, labels), 1 / rule_classes.size)
    assert (expected["rule"]["accuracy"], expected["rule"]["macro_f1"]) == pytest.approx(scores(drawn), abs=3e-3)

    # Whatever a model does, it predicts each class with some chance given the rule's class.
    tried = [rng.dirichlet(np.full(3, spread), size=3) for spread in (0.05, 0.3, 1.0) for _ in range(1000)]
    tried += [0.9 * np.eye(3) + 0.1 * chances for chances in tried]
    exact = np.array(mix)[:, None] * (noise / 2 + (1 - 1.5 * noise) * np.eye(3))
    reached = np.array([scores(chances.T @ exact) for chances in tried])
    assert reached[:, 0].max() <= expected["best"]["accuracy"]
    if known:
        assert reached[:, 1].max() <= expected["best"]["macro_f1"]
    else:
        assert expected["best"]["macro_f1"] is None
        assert reached[:, 1].max() > expected["rule"]["macro_f1"]


# Refusals


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"train": 0}, "train must be at least 1 row, got 0"),
        ({"val": -2}, "val must be at least 1 row, got -2"),
        ({"seed": -1}, "seed must be at least 0 and below 2^32, got -1"),
        ({"seed": 10**26}, "seed must be at least 0 and below 2^32, got 100000"),
        ({"mix": (float("nan"),) * 3}, "sum to 1, got (nan, nan, nan)"),
        ({"noise": -0.1}, "noise must be at least 0 and below 2/3, got -0.1"),
        ({"noise": 1.0}, "got 1.0. Use 0"),
        ({"mix": (0.5, 0.5, 0.5)}, "sum to 1, got (0.5, 0.5, 0.5)"),
        ({"mix": (0.5, 0.5)}, "sum to 1, got (0.5, 0.5)"),
        ({"mix": (0.01, 0.19, 0.8)}, "each at least 0.02"),
        ({"bars": (50, 30)}, "got (50, 30). Use (30, 50)"),
        ({"bars": (1, 30)}, "from 2 to 500 bars, got (1, 30)"),
        ({"train": 10_000_000}, "fit into 10,000,000 simulated bars, but need about"),
    ],
)
def test_refusals_state_rule_value_and_remedy(tmp_path: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as refused:
        write_sample(tmp_path, **arguments)
    assert words in str(refused.value)


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refused:
        write_sample(tmp_path / "new", train=0, noise=2.0, bars=(9, 8))
    assert len(str(refused.value).splitlines()) == 3
    assert not (tmp_path / "new").exists()


def test_a_simulation_of_no_bars_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        simulate(np.random.default_rng(0), 0, SYMBOLS[0])
