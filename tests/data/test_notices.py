"""What the reader drops, guesses or puts right is counted and reported, once per file."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from ctxtrain.cli.process import main
from ctxtrain.data.check import check_files
from ctxtrain.data.dataset import Inputs, load_dataset
from ctxtrain.data.notices import time_unit_message
from ctxtrain.data.window_file import WindowFile
from ctxtrain.model.tokenizer import load_tokenizer
from tests.helpers import Row, bars_of, dated_rows, make_window, read, write_rows


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer("embedded", None)


def said(rows: list[Row]) -> list[str]:
    reading = read([json.dumps(row).encode() for row in rows])
    assert reading.faults == []
    return list(reading.notices.lines())


def lacking(rows: list[Row], field: str, *bars: int) -> list[Row]:
    for row in rows:
        for bar in bars:
            bars_of(row)[bar][field] = None
    return rows


@pytest.mark.parametrize(("field", "bars"), [("delta", (0,)), ("delta", (3, 29)), ("ext_dir", (7,))])
def test_a_field_that_one_bar_of_every_row_lacks_is_counted_and_said(
    field: str, bars: tuple[int, ...], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = dated_rows(12, seed=1, apart=60)
    for row in rows:
        for bar in bars_of(row):
            bar["ext_dir"] = 1
    lacking(rows, field, *bars)
    path = write_rows(tmp_path / "rows.jsonl", rows[:9])
    val = write_rows(tmp_path / "val.jsonl", rows[9:])
    report = check_files({"train": path, "val": val})
    assert report["incomplete_fields"]["train"] == {field: {"rows": 9, "bars": 9 * len(bars)}}
    line = (
        f"{field} is missing on {9 * len(bars)} bars in 9 of 9 rows, and is dropped from these rows: the model reads "
        "only fields that every bar of every row has. Fill it in, or omit these bars"
    )
    assert report["noticed"]["train"] == [line]
    data = load_dataset(
        Inputs({"train": WindowFile(path), "val": WindowFile(val)}),
        tokenizer, codec="compact", max_tokens=512,
        oversampling="none", max_repeat=None, weights="none", allow_leakage=True,
    )  # fmt: skip
    assert f"train: {line}" in data.notes()
    assert data.summary()["incomplete_fields"]["val"] == {field: {"rows": 3, "bars": 3 * len(bars)}}


@pytest.mark.parametrize("flow", ["buy_vol", "sell_vol"])
def test_one_side_of_the_volume_without_the_other_is_said(flow: str) -> None:
    rows = dated_rows(2, seed=1, apart=60)
    for row in rows:
        for bar in bars_of(row):
            del bar["delta"]
            bar[flow] = 3.0
    other = "sell_vol" if flow == "buy_vol" else "buy_vol"
    (line,) = said(rows)
    assert line.startswith(f"{other} is missing on 60 bars in 2 of 2 rows, and is dropped")


def test_a_delta_that_buying_and_selling_give_is_not_missing() -> None:
    rows = lacking(dated_rows(2, seed=1, apart=60), "delta", 0)
    for row in rows:
        for bar in bars_of(row):
            bar |= {"buy_vol": 5.5, "sell_vol": 3.0}
    assert said(rows) == []
    assert set(make_window(rows[0]).bars["delta"]) == {2.5}


def test_null_features_count_as_not_given_and_are_said(tmp_path: Path) -> None:
    rows = dated_rows(12, seed=1, apart=60)
    for n, row in enumerate(rows):
        row["features"] = {"rsi": None if n < 3 else 50.0, "spread": None}
    assert make_window(rows[5]).features == {"rsi": 50.0}
    report = check_files({"train": write_rows(tmp_path / "rows.jsonl", rows)})
    assert report["faults"] == []
    assert report["partial_fields"] == {"train": {"features.rsi": 9}}
    assert report["noticed"]["train"] == [
        "features.rsi is null in 3 of 12 rows, and treated as missing there",
        "features.spread is null in 12 of 12 rows, and treated as missing there",
    ]


def test_rows_without_a_symbol_among_others_and_blank_lines_are_said() -> None:
    rows = dated_rows(4, seed=1, apart=60)
    del rows[2]["symbol"]
    lines = [line for row in rows for line in (json.dumps(row).encode(), b" \n")]
    market, blank = read(lines).notices.lines()
    assert market.startswith("1 of 4 rows have no symbol and are treated as a separate market")
    assert blank == "4 blank lines ignored"
    assert said([row | {"symbol": None} for row in rows]) == []


@pytest.mark.parametrize("blank", ["", " ", "\t"])
def test_a_blank_symbol_is_none(blank: str, tmp_path: Path) -> None:
    rows = dated_rows(4, seed=1, apart=60)
    for row in rows[::2]:
        row["symbol"] = blank
    (line,) = said(rows)
    assert line.startswith("2 of 4 rows have no symbol and are treated as a separate market")
    assert make_window(rows[0]).symbol is None
    assert check_files({"train": write_rows(tmp_path / "rows.jsonl", rows)})["times"]["train"]["symbols"] == ["GC"]


def test_a_prompt_beside_bars_is_an_unused_field(tmp_path: Path) -> None:
    rows = [row | {"context": "a prompt of my own", "timeframe": "M1"} for row in dated_rows(12, seed=1, apart=60)]
    assert check_files({"train": write_rows(tmp_path / "rows.jsonl", rows)})["unused_fields"] == ["context"]
    texts = [{"context": f"prompt {n}", "label": "LONG", "symbol": "GC"} for n in range(3)]
    assert check_files({"train": write_rows(tmp_path / "rows.jsonl", texts)})["unused_fields"] == []


@pytest.mark.parametrize("every", [2, 3])
def test_bars_without_a_trade_that_are_written_as_zeros_are_counted_and_said(
    every: int, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = dated_rows(12, seed=1, apart=60)
    for row in rows[:5]:
        for bar in bars_of(row)[:-1:every]:
            bar.update(dict.fromkeys(("open", "high", "low", "close", "volume"), 0))
    paths = {"train": write_rows(tmp_path / "a.jsonl", rows[:9]), "val": write_rows(tmp_path / "b.jsonl", rows[9:])}
    report = check_files(dict(paths))
    line = (
        f"all prices and the volume are 0 on {5 * len(range(0, 29, every))} bars in 5 of 9 rows, but not on all "
        "bars: for a bar without trades, repeat the previous close as its prices, or omit the bar"
    )
    assert report["noticed"] == {"train": [line], "val": []}
    assert report["wild_prints"]["train"]["price"]["rows"] == 5
    data = load_dataset(
        Inputs({name: WindowFile(path) for name, path in paths.items()}), tokenizer, codec="compact", max_tokens=512,
        oversampling="none", max_repeat=None, weights="none", allow_leakage=True,
    )  # fmt: skip
    assert f"train: {line}" in data.notes()
    assert [note for note in data.notes() if note.startswith("train: 5 rows have a price outlier")]
    assert said([json.loads(json.dumps(row)) for row in rows[9:]]) == []


def test_fields_that_training_rows_do_not_have_are_said(tmp_path: Path) -> None:
    train, val = dated_rows(12, seed=1, apart=60), dated_rows(12, seed=2, apart=60)
    for row in val:
        row["features"] = {"rsi": 1.0}
        for bar in bars_of(row):
            bar["atr_14"] = 2.0
    paths = {"train": write_rows(tmp_path / "a.jsonl", train), "val": write_rows(tmp_path / "b.jsonl", val)}
    report = check_files(dict(paths))
    assert report["noticed"] == {
        "train": [],
        "val": ["the model does not read atr_14, features.rsi, which the training rows lack"],
    }


@pytest.mark.parametrize("factor", [1 + 2e-16, 1 - 2e-16, 1 + 5e-10, 1 + 1.5e-7])
def test_prices_that_are_off_by_rounding_are_put_right_and_counted(factor: float) -> None:
    (row,) = dated_rows(1, seed=1, apart=60)
    for bar in bars_of(row)[:4]:
        bar.update(open=104321.7, close=104321.7, low=104300.0, high=104321.7 / factor if factor > 1 else 104321.7)
        bar["open"] = bar["high"] * max(factor, 1 / factor)
    window = make_window(row)
    assert (window.bars["high"] >= window.bars["open"]).all()
    (line,) = said([row])
    assert (
        line
        == "high or low had a rounding error (half of its last decimal, or float32) on 4 bars in 1 of 1 rows and was "
        "corrected"
    )


@pytest.mark.parametrize(("extreme", "decimals"), [("high", 1), ("low", 0), ("high", 2)])
def test_a_high_or_low_with_fewer_decimals_than_the_close_is_corrected(extreme: str, decimals: int) -> None:
    (row,) = dated_rows(1, seed=1, apart=60)
    sign = 1 if extreme == "high" else -1
    for bar in bars_of(row):
        bar.update(open=4137.0, close=4137.0, low=4136.0, high=4138.0)
    reference = bars_of(row)[5]
    reference[extreme] = round(4137 + sign * 10.0**-decimals, decimals)
    bars_of(row)[7].update({extreme: 4137.0, "close": 4137 + sign * 0.4 * 10.0**-decimals})
    window = make_window(row)
    assert window.rounded == 1
    assert window.bars[extreme][7] == window.bars["close"][7]
    bars_of(row)[7].update({extreme: 4137.0, "close": 4137 + sign * 0.6 * 10.0**-decimals})
    assert read([json.dumps(row).encode()]).fault_total == 1


@pytest.mark.parametrize("off", [1e-6, 1e-3])
def test_prices_that_are_off_by_more_are_refused_with_all_their_digits(off: float) -> None:
    (row,) = dated_rows(1, seed=1, apart=60)
    high, opened = 104321.7, 104321.7 * (1 + off)
    bars_of(row)[0].update(open=opened, close=104310.0, low=104300.0, high=high)
    (fault,) = read([json.dumps(row).encode()]).faults
    assert fault.endswith(
        f"must have low ≤ open, close ≤ high, got open {opened!r}, high {high!r}, low 104300, close 104310"
    )


def test_windows_with_a_print_that_is_far_off_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = dated_rows(12, seed=1, apart=60)
    bars_of(rows[2])[4]["high"] = 1e6
    bars_of(rows[7])[4]["low"] = 0.0
    bars_of(rows[7])[9]["volume"] = 1e14
    path = write_rows(tmp_path / "rows.jsonl", rows)
    names = [f"{rows[n]['id']} ({path}:{n + 1})" for n in (2, 7)]
    assert check_files({"train": path})["wild_prints"]["train"] == {
        "price": {"rows": 2, "examples": names},
        "volume": {"rows": 1, "examples": names[1:]},
    }
    with pytest.raises(SystemExit) as ended:
        main(["check", str(path)])
    assert ended.value.code == 0
    told = "It is moved closer and marked in the text; correct it if it is an error."
    out = capsys.readouterr().out
    assert f"warning: train: 2 rows have a price outlier within the window: {', '.join(names)}. {told}" in out
    assert f"warning: train: 1 row has a volume outlier within the window: {names[1]}. {told}" in out
    assert "train: times are ISO 8601 text, events from 2025-03-03T00:29:00+00:00 to 2025-03-03T11:29:00+00:00" in out


def test_a_run_says_the_unit_of_each_file_once(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows: Any = dated_rows(12, seed=1, apart=60)
    for row in rows[9:]:
        for bar in bars_of(row):
            bar["time"] = 1_800_000_000_000 + 60_000 * bar["bar_index"]
    paths = {"train": write_rows(tmp_path / "a.jsonl", rows[:9]), "val": write_rows(tmp_path / "b.jsonl", rows[9:])}
    data = load_dataset(
        Inputs({name: WindowFile(path) for name, path in paths.items()}), tokenizer, codec="compact", max_tokens=512,
        oversampling="none", max_repeat=None, weights="none",
    )  # fmt: skip
    assert [note for note in data.notes() if "times" in note] == [
        "times are read as ISO 8601 text in train; milliseconds since 1970 in val"
    ]
    alike = dict.fromkeys(("train", "val", "test"), "ISO 8601 text")
    assert time_unit_message(alike) == "times are read as ISO 8601 text in train, val and test"
