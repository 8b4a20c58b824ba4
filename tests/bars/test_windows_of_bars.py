"""Windows, labels and splits of bars: equal for every program, and without a look at later bars.

python -m pytest tests/bars/test_windows_of_bars.py
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ctxtrain.bars.card_text import describe_windows
from ctxtrain.bars.file_bars import ReadOptions
from ctxtrain.bars.options import WindowOptions, parse_read_options, parse_window_options
from ctxtrain.bars.structure import Bars, average_true_range
from ctxtrain.bars.write import write_windows
from ctxtrain.data.dataset import read_splits
from ctxtrain.data.window_file import WindowFile
from ctxtrain.errors import ConfigError, DataError
from tests.bars import exporters
from tests.bars.test_reading import EXPORTS
from tests.bars.test_triple_barrier import walk

Row = dict[str, Any]
SPLITS = ("train", "val", "test")
DEFAULTS: Row = {
    "events": "7", "bars": 30, "structure": False, "higher": None, "label": "triple-barrier", "profit": None,
    "stop": None, "horizon": None, "cost": None, "split": "70,15,15", "max_gap": None,
}  # fmt: skip


def options(**given: Any) -> WindowOptions:
    return parse_window_options(**DEFAULTS | given)


def make(
    paths: Path | list[Path], folder: Path, read: Row | None = None, **given: Any
) -> tuple[Row, dict[str, list[Row]]]:
    """The data card and the rows of each file."""
    paths = [paths] if isinstance(paths, Path) else paths
    card = write_windows(paths, folder, ReadOptions(**read or {}), options(**given))
    return card, {name: read_rows(folder / f"{name}.jsonl") for name in SPLITS}


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def all_rows(rows: Mapping[str, list[Row]]) -> list[Row]:
    return [row for name in SPLITS for row in rows[name]]


def bars_of(row: Row) -> list[Row]:
    return [*row["context_bars"], row["current_bar"]]


@pytest.fixture(scope="module")
def market() -> Bars:
    return exporters.make_market()


@pytest.fixture(scope="module")
def written(market: Bars, tmp_path_factory: pytest.TempPathFactory) -> tuple[Row, dict[str, list[Row]]]:
    folder = tmp_path_factory.mktemp("windows")
    return make(exporters.ninjatrader(folder, market), folder / "out", {"symbol": "GC"}, cost="0.05")


@pytest.mark.parametrize(("write", "read"), EXPORTS, ids=lambda value: getattr(value, "__name__", ""))
def test_every_program_gives_the_same_windows(
    write: Any, read: Row, market: Bars, written: tuple[Row, dict[str, list[Row]]], tmp_path: Path
) -> None:
    _, rows = make(write(tmp_path, market), tmp_path / "out", read | {"symbol": "GC"}, cost="0.05")
    names = ("time", "open", "high", "low", "close", "volume")
    for name in SPLITS:
        assert len(rows[name]) == len(written[1][name])
        for row, other in zip(rows[name], written[1][name], strict=True):
            bars = [{field: bar[field] for field in names} for bar in bars_of(row)]
            assert bars == bars_of(other)
            assert {**row, "context_bars": 0, "current_bar": 0} == {**other, "context_bars": 0, "current_bar": 0}


def test_outcomes_and_labels_are_those_of_the_price_path(
    market: Bars, written: tuple[Row, dict[str, list[Row]]]
) -> None:
    prices = market["open"], market["high"], market["low"], market["close"]
    atr = average_true_range(*prices[1:])
    place = {f"{when:%Y-%m-%dT%H:%M:%SZ}": n for n, when in enumerate(market["when"].tolist())}
    rows = all_rows(written[1])
    assert len(rows) > 250
    for row in rows:
        event = place[row["current_bar"]["time"]]
        stop = atr[event]
        (long, long_at, long_won), (short, short_at, short_won) = (
            walk(prices, event, side, 1.5 * stop, stop, 20) for side in (1, -1)
        )
        assert row["outcome"] == pytest.approx({"long_r": long, "short_r": short, "cost": 0.05 / stop}, abs=1e-6)
        first = "LONG" if long_won and (not short_won or long_at < short_at) else "SHORT" if short_won else "SKIP"
        assert row["label"] == first
        assert row["label_horizon"] == 20
        assert [bar["time"] for bar in bars_of(row)] == [
            f"{when:%Y-%m-%dT%H:%M:%SZ}" for when in market["when"][event - 29 : event + 1]
        ]


def rows_by_id(rows: Mapping[str, list[Row]]) -> dict[str, Row]:
    return {row["id"]: row for row in all_rows(rows)}


def test_no_bar_after_the_horizon_changes_a_row_and_none_after_the_event_a_window(market: Bars, tmp_path: Path) -> None:
    given = {"structure": True, "higher": 3, "events": "fvg_retest"}
    names = ("open", "high", "low", "close", "volume")
    _, before = make(exporters.freqtrade_parquet(tmp_path, market), tmp_path / "a", {"symbol": "GC"}, **given)
    same = window_only = 0
    for cut in (900, 1601, 2200):
        changed = {name: values.copy() for name, values in market.items()}
        for name in names:
            changed[name][cut:] = changed[name][cut:][::-1]
        path = exporters.freqtrade_parquet(tmp_path, changed)
        _, after = make(path, tmp_path / f"b{cut}", {"symbol": "GC"}, **given)
        place = {f"{when:%Y-%m-%dT%H:%M:%SZ}": n for n, when in enumerate(market["when"].tolist())}
        old, new = rows_by_id(before), rows_by_id(after)
        for name, row in old.items():
            event = place[row["current_bar"]["time"]]
            if event + 20 < cut and name in new:
                assert new[name] == row
                same += 1
            elif event < cut and name in new:
                assert bars_of(new[name]) == bars_of(row)
                window_only += 1
    assert same > 150
    assert window_only > 2


def test_splits_share_no_bar_and_purge_and_embargo_find_nothing(
    written: tuple[Row, dict[str, list[Row]]], market: Bars, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    card, rows = make(exporters.tradingview(tmp_path, market), folder, events="every")
    last_used = ""
    times = [f"{when:%Y-%m-%dT%H:%M:%SZ}" for when in market["when"].tolist()]
    for name in SPLITS:
        assert bars_of(rows[name][0])[0]["time"] > last_used
        last_used = times[times.index(rows[name][-1]["current_bar"]["time"]) + 20]
    assert card["left_out"]["crosses_a_split"] == 2 * (29 + 20)
    files = {name: WindowFile(folder / f"{name}.jsonl") for name in SPLITS}
    surveys, separation, _ = read_splits(files)
    assert (separation.purge, separation.embargo) == (True, 20)
    assert {name: surveyed.file.dropped for name, surveyed in surveys.items()} == dict.fromkeys(SPLITS, 0)


def test_the_card_counts_every_event_and_has_what_repeats_the_run(
    written: tuple[Row, dict[str, list[Row]]], market: Bars, tmp_path: Path
) -> None:
    path = exporters.metatrader(tmp_path, market)
    card, rows = make(path, tmp_path / "out", {"time_zone": "Europe/Athens"}, structure=True)
    assert json.loads((tmp_path / "out" / "windows.json").read_bytes()) == card
    events = card["events"]
    assert events["events"] == len(market["open"]) // 7
    assert events["events"] == events["windows"] + sum(card["left_out"].values())
    assert events["windows"] == sum(file["rows"] for file in card["files"].values())
    for name, file in card["files"].items():
        content = (tmp_path / "out" / f"{name}.jsonl").read_bytes()
        assert file["sha256"] == hashlib.sha256(content).hexdigest()
        assert file["labels"] == {
            label: sum(row["label"] == label for row in rows[name]) for label in ("LONG", "SHORT", "SKIP")
        }
        assert file["first_event"] == rows[name][0]["current_bar"]["time"]
    (source,) = card["sources"]
    assert source["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert card["arguments"]["time_zone"] == "Europe/Athens"
    assert card["bars"]["bars"] == len(market["open"])


def test_the_same_files_and_options_give_the_same_bytes(market: Bars, tmp_path: Path) -> None:
    path = exporters.nested_export(tmp_path, market)
    for folder in ("a", "b", "a"):  # the third replaces the first
        make(path, tmp_path / folder, structure=True)
    for name in ("train.jsonl", "val.jsonl", "test.jsonl", "windows.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_window_over_a_gap_is_counted_or_left_out(market: Bars, tmp_path: Path) -> None:
    path = exporters.freqtrade_feather(tmp_path, market)
    counts = {}
    for max_gap in (None, 37, 36, 0):
        card, _ = make(path, tmp_path / "out", events="every", max_gap=max_gap)
        counts[max_gap] = (card["events"]["windows_that_span_a_gap"], card["left_out"]["gap_longer_than_max_gap"])
    # A gap lies in the windows of 29 events after it, and in the horizon of 20 events before it.
    assert counts == {None: (58, 0), 37: (58, 0), 36: (29, 49), 0: (0, 98)}


def test_a_trade_without_a_range_is_left_out(tmp_path: Path) -> None:
    flat = exporters.make_market(1500, 1)
    for name in ("open", "high", "low", "close"):
        flat[name][:300] = 2000.0
    path = exporters.freqtrade_parquet(tmp_path, flat)
    card, _ = make(path, tmp_path / "out", events="every", bars=20, horizon=5, max_gap=100)
    assert card["left_out"]["stop_or_profit_without_distance"] == 300 - 19
    card, _ = make(path, tmp_path / "out", events="every", bars=20, horizon=5, stop="0.1%", profit="1", max_gap=100)
    assert card["left_out"]["stop_or_profit_without_distance"] == 0


def flattened(folder: Path, stop: int) -> Path:
    """1,457 bars, the prices of which are equal from bar 300 to `stop`."""
    bars = exporters.make_market(1500, 1)
    price = bars["close"][300]
    for name in ("open", "high", "low", "close"):
        bars[name][300 if stop < 1000 else 0 : stop] = price
    return exporters.freqtrade_parquet(folder, bars)


def test_a_long_flat_stretch_gives_no_trades_although_its_atr_never_reaches_0(tmp_path: Path) -> None:
    card, rows = make(flattened(tmp_path, 700), tmp_path / "out", events="every", bars=20, horizon=5, max_gap=100)
    assert 250 < card["left_out"]["stop_or_profit_without_distance"] < 400
    results = [row["outcome"][side] for row in all_rows(rows) for side in ("long_r", "short_r")]
    assert max(map(abs, results)) < 1e4


@pytest.mark.parametrize(
    ("stop", "profit", "flat"),
    [("0.00000001", "1atr", 0), ("1%", "0.0000001%", 0), ("0.5", "1atr", 2000), ("1atr", "0.5", 2000)],
)
def test_a_distance_below_the_resolution_of_the_price_is_none(
    stop: str, profit: str, flat: int, tmp_path: Path
) -> None:
    path = flattened(tmp_path, flat)
    with pytest.raises(DataError, match=r"no event can be used; .* 1,4.. stop or profit without distance"):
        make(path, tmp_path / "out", events="every", bars=20, horizon=5, stop=stop, profit=profit, max_gap=100)


def test_a_distance_is_in_atr_in_percent_or_in_price(market: Bars, tmp_path: Path) -> None:
    path = exporters.freqtrade_parquet(tmp_path, market)
    for stop, profit in (("0.1%", "0.25%"), ("2", "5")):
        _, rows = make(path, tmp_path / "out", stop=stop, profit=profit, cost="0.01%")
        best = {max(row["outcome"]["long_r"], row["outcome"]["short_r"]) for row in all_rows(rows)}
        assert max(best) == 2.5
        row = rows["train"][0]
        close = row["current_bar"]["close"]
        unit = close / 1000 if stop == "0.1%" else 2.0
        assert row["outcome"]["cost"] == pytest.approx(close / 10_000 / unit, abs=1e-6)


def labelled(folder: Path, market: Bars, labels: list[Any]) -> Path:
    path = folder / "GC.jsonl"
    lines = [
        {"time": when.isoformat(), "open": o, "high": h, "low": low, "close": c, "volume": v, "call": label}
        for (when, o, h, low, c, v), label in zip(exporters.rows(market), labels, strict=True)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.mark.parametrize("words", [("LONG", "short", "Skip"), (1, -1, 0), ("1", "-1", "0"), (1.0, -1.0, 0.0)])
def test_labels_may_come_from_a_column(words: tuple[Any, ...], market: Bars, tmp_path: Path) -> None:
    count = len(market["open"])
    labels = [None if n % 5 == 0 else words[n % 3] for n in range(count)]
    card, rows = make(labelled(tmp_path, market, labels), tmp_path / "out", label="call", events="every")
    place = {f"{when:%Y-%m-%dT%H:%M:%SZ}": n for n, when in enumerate(market["when"].tolist())}
    for row in all_rows(rows):
        assert row["label"] == ("LONG", "SHORT", "SKIP")[place[row["current_bar"]["time"]] % 3]
        assert not {"outcome", "label_horizon"} & row.keys()
        assert "call" not in row["current_bar"]
    assert card["left_out"]["no_label"] == sum(n % 5 == 0 for n in range(29, count))
    assert card["left_out"]["horizon_beyond_the_end"] == 0
    _, rows = make(tmp_path / "GC.jsonl", tmp_path / "out", label="call", horizon=8)
    assert {row["label_horizon"] for row in all_rows(rows)} == {8}
    assert all(row["outcome"]["cost"] == 0 for row in all_rows(rows))


def test_a_column_that_holds_no_labels_is_refused(market: Bars, tmp_path: Path) -> None:
    path = labelled(tmp_path, market, ["BUY"] * len(market["open"]))
    with pytest.raises(DataError, match='must have LONG, SHORT and SKIP, or 1, -1 and 0, got "BUY"'):
        make(path, tmp_path / "out", label="call")
    with pytest.raises(ConfigError, match="label must be triple-barrier or a column of every file, got 'side'"):
        make(path, tmp_path / "out", label="side")
    with pytest.raises(ConfigError, match="fields must not have the label column, which the model would read"):
        make(path, tmp_path / "out", {"fields": ("call",)}, label="call")
    assert not (tmp_path / "out").exists()


def test_bars_without_volume_make_windows_without_volume(market: Bars, tmp_path: Path) -> None:
    path = tmp_path / "GC.csv"
    lines = ["time,open,high,low,close"]
    lines += [f"{when.isoformat()},{','.join(map(str, prices))}" for when, *prices, _ in exporters.rows(market)]
    path.write_text("\n".join(lines))
    _, rows = make(path, tmp_path / "out", structure=True, events="ext_bos")
    assert set(rows["train"][0]["current_bar"]) >= {"time", "open", "high", "low", "close", "ext_dir", "wave_strength"}
    assert "volume" not in rows["train"][0]["current_bar"]


def test_own_fields_are_written_and_flags_are_true_or_false(market: Bars, tmp_path: Path) -> None:
    path = exporters.nested_export(tmp_path, market)
    _, rows = make(path, tmp_path / "out", {"fields": ("session", "bar.volume_stats.cum_delta")})
    bar = rows["train"][0]["current_bar"]
    assert (bar["session"], bar["bar.volume_stats.cum_delta"]) == ("Asia", -281)
    bars = [bar for row in all_rows(rows) for bar in bars_of(row)]
    assert {bar["ext_bos_down"] for bar in bars} == {False}
    assert {bar["ext_bos_up"] for bar in bars} == {False, True}
    assert all(type(bar["ext_bos_up"]) is bool for bar in bars)
    assert (bar["ext_dir"], bar["htf_dir"] in (-1, 0, 1)) == (-1, True)
    assert isinstance(bar["volume"], int)
    assert isinstance(bar["delta"], int)


def test_too_little_data_says_why(market: Bars, tmp_path: Path) -> None:
    few = {name: values[:60] for name, values in market.items()}
    path = exporters.freqtrade_parquet(tmp_path, few)
    with pytest.raises(
        DataError, match="train has no windows; of 60 events, left out: 29 too few bars before, 20 horizon"
    ):
        make(path, tmp_path / "out", events="every")
    with pytest.raises(DataError, match="no event can be used; of 0 events"):
        make(path, tmp_path / "out", events="70")


def test_foreign_rows_are_not_replaced(market: Bars, tmp_path: Path) -> None:
    path = exporters.freqtrade_parquet(tmp_path, market)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "val.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="folder must contain no rows except those of a set of windows, but windows"):
        make(path, tmp_path / "out")
    assert (tmp_path / "out" / "val.jsonl").read_text() == "{}\n"
    make(path, tmp_path / "own")
    with (tmp_path / "own" / "train.jsonl").open("a") as stream:
        stream.write("{}\n")
    with pytest.raises(ConfigError, match=r"does not list the SHA-256 of train\.jsonl"):
        make(path, tmp_path / "own")


def test_all_wrong_options_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        options(events="0", bars=10, higher=1, horizon=0, profit="x", stop="0atr", split="50,50", max_gap=-1)
    begins = [fault.split(" must")[0] for fault in refused.value.faults]
    assert begins == ["events", "bars", "higher", "horizon", "max-gap", "split", "profit", "stop"]
    none: Row = dict.fromkeys(("symbol", "time_zone", "fields"))
    with pytest.raises(ConfigError) as refused:
        parse_read_options(
            **none, stamp="end", bar_length="x", columns="price=1", decimal="x", separator="ab", dates="ymd"
        )  # fmt: skip
    begins = [fault.split(" must")[0] for fault in refused.value.faults]
    assert begins == ["columns", "stamp", "decimal", "dates", "separator", "bar-length"]


def test_the_length_of_a_bar_may_be_given(market: Bars, tmp_path: Path) -> None:
    path = exporters.freqtrade_parquet(tmp_path, market)
    read = parse_read_options(
        symbol=None, time_zone=None, stamp=None, bar_length="1m", columns=None, decimal=None, separator="tab",
        dates=None, fields=None,
    )  # fmt: skip
    card = write_windows([path], tmp_path / "out", read, options())
    assert card["timeframe"] == "M1"
    assert card["bars"]["gaps"] == len(market["open"]) - 1


def test_several_symbols_are_split_at_the_same_times(market: Bars, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    paths = [exporters.freqtrade_parquet(tmp_path / "a", market), exporters.tradingview(tmp_path, market)]
    card, rows = make(paths, tmp_path / "out")
    assert card["symbols"] == ["COMEX_GC1!", "GC_USD"]
    for name in SPLITS:
        of = {symbol: [row for row in rows[name] if row["symbol"] == symbol] for symbol in card["symbols"]}
        first, second = ([row["current_bar"]["time"] for row in part] for part in of.values())
        assert first == second
        times = [row["current_bar"]["time"] for row in rows[name]]
        assert times == sorted(times)


def test_times_below_a_second_are_written_with_their_fraction(tmp_path: Path) -> None:
    lines = ["time,open,high,low,close"]
    lines += [f"{1_704_187_800_000 + 250 * n},{n % 5 + 1},9,0.5,{n % 3 + 1}" for n in range(300)]
    (tmp_path / "GC.csv").write_text("\n".join(lines))
    card, rows = make(tmp_path / "GC.csv", tmp_path / "out", bars=20, horizon=2, events="every")
    assert card["timeframe"] == "MS250"
    assert bars_of(rows["train"][0])[1]["time"] == "2024-01-02T09:30:00.250Z"


def test_own_columns_are_declared_in_the_card_and_read_with_that_declaration(market: Bars, tmp_path: Path) -> None:
    path = exporters.tradingview(tmp_path, market)
    lines = path.read_text().splitlines()
    names = ("rsi", "session", "armed", "touches")
    values = [f"{30 + n % 40}.5,{('Asia', 'NY')[n % 2]},{('true', 'false')[n % 2]},{n % 5}" for n in range(len(lines))]
    own = [
        lines[0] + "," + ",".join(names),
        *(f"{line},{value}" for line, value in zip(lines[1:], values, strict=False)),
    ]
    path.write_text("\n".join(own))
    card, rows = make(path, tmp_path / "out", {"fields": names})
    assert card["fields"] == {"rsi": "number", "session": "category", "armed": "flag", "touches": "count"}
    file = WindowFile(tmp_path / "out" / "train.jsonl", own=card["fields"])
    windows = list(file)
    assert file.report.faults == []
    assert windows[0].bars["rsi"].tolist() == [bar["rsi"] for bar in bars_of(rows["train"][0])]
    assert windows[0].bar_words["session"][:2] in (("Asia", "NY"), ("NY", "Asia"))
    declared = "rsi: number, session: category, armed: flag, touches: count"
    assert f"to train on them, set data.fields: {{{declared}}}" in describe_windows(tmp_path / "out", card)
