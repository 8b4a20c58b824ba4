"""Rows in memory: the same windows as from a file, whatever holds them, and faults with the number of their row."""

import io
import json
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ctxtrain.data.sources import open_source
from ctxtrain.data.window_file import WindowFile, load_windows
from ctxtrain.errors import DataError
from tests.data.test_formats import facts, of_other_types, parquet, some_rows, table
from tests.helpers import Row, bars_of, make_row, write_rows


class Exporter:
    """A table of another library: all that is known of it is the Arrow protocol."""

    def __init__(self, content: pa.Table) -> None:
        self._content = content

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self._content.__arrow_c_stream__(requested_schema)


class Record:
    """A row of a database: names and values, but no Mapping."""

    def __init__(self, row: Row) -> None:
        self._row = row

    def keys(self) -> list[str]:
        return list(self._row)

    def __getitem__(self, name: str) -> Any:
        return self._row[name]


def of_python_types(rows: list[Row]) -> list[Row]:
    """The rows with values of numpy, pandas, torch, decimal and datetime."""
    for row in rows:
        row["label"] = np.str_(row["label"])
        row["features"] = {"spread": torch.tensor(row["features"]["spread"]), "gap": float("nan")}
        for n, bar in enumerate(bars_of(row)):
            moment = datetime.fromisoformat(bar["time"])
            naive = moment.replace(tzinfo=None)
            bar["time"] = (moment, pd.Timestamp(moment), pa.scalar(moment), pd.Timestamp(naive, tz="UTC"))[n % 4]
            bar["open"] = Decimal(str(bar["open"]))
            bar["high"] = np.float32(bar["high"])
            bar["volume"] = np.uint16(bar["volume"])
            bar["ext_choch"] = np.bool_(bar["ext_choch"]) if "ext_choch" in bar else None
            bar["wave_strength"] = bar.get("wave_strength", pd.NA)
            bar["atr_14"] = bar.get("atr_14", pd.NaT)
        row["context_bars"] = tuple(row["context_bars"])
    return rows


HOLDERS: dict[str, Callable[[list[Row]], Any]] = {
    "list": lambda rows: rows,
    "generator": lambda rows: (dict(reversed(row.items())) for row in rows),
    "records": lambda rows: [Record(row) for row in rows],
    "rows of other types": of_python_types,
    "pandas frame": pd.DataFrame,
    "pandas frame of Parquet": lambda rows: pd.read_parquet(io.BytesIO(parquet(table(rows)))),
    "pandas frame of JSON text": lambda rows: pd.DataFrame(rows).assign(
        context_bars=[json.dumps(row["context_bars"]) for row in rows]
    ),
    "table": table,
    "table of other types": of_other_types,
    "reader": lambda rows: table(rows).to_reader(),
    "exporter": lambda rows: Exporter(table(rows)),
}


NOTICES = {
    "rows of other types": [
        "NaN counts as not given: 74 values of bars.atr_14, bars.wave_strength, features.gap",
        "bars.high, features.spread: numbers of 32 bits have 7 digits",
    ],
    "pandas frame": ["NaN counts as not given: 1 value of id"],
    "pandas frame of JSON text": ["NaN counts as not given: 1 value of id"],
    "pandas frame of Parquet": [  # pandas has no whole numbers in a column with missing values
        "NaN counts as not given: 1 value of id",
        "numbers with a decimal point are read as whole in ext_dir, int_dir, mgann_leg_index",
    ],
    "table of other types": ["bars.atr_14, features: numbers of 32 bits have 7 digits"],
}


@pytest.mark.parametrize("how", HOLDERS)
def test_rows_in_memory_are_the_windows_of_a_file(how: str, tmp_path: Path) -> None:
    expected = facts(load_windows(write_rows(tmp_path / "rows.jsonl", some_rows())))
    file = WindowFile(open_source(HOLDERS[how](some_rows()), "train"))
    windows = list(file)
    assert facts(windows) == expected
    assert [window.location for window in file] == [window.location for window in windows]  # from the table
    assert [window.location for window in windows][4:] == ["train row 5", "train row 6"]
    assert file.name(4) == "row-4 (train row 5)"
    lines = list(file.report.notices.lines())
    assert [line.partition(" (")[0].partition(", and")[0] for line in lines] == NOTICES.get(how, [])


def test_the_digest_is_that_of_the_content() -> None:
    rows = some_rows()
    digests = [WindowFile(given).sha256() for given in (rows, [dict(reversed(row.items())) for row in rows])]
    assert digests[0] == digests[1] == WindowFile(pd.DataFrame(rows)).sha256()
    rows[5]["current_bar"]["close"] += 0.25
    assert WindowFile(rows).sha256() != digests[0]


def test_times_in_memory_keep_their_nanoseconds() -> None:
    first = pd.Timestamp("2025-03-03T14:00:00.123456789")
    for moments in (
        [first + pd.Timedelta(n) for n in range(30)],
        [np.datetime64(first.value + n, "ns") for n in range(30)],
    ):
        row = make_row()
        for bar, moment in zip(bars_of(row), moments, strict=True):
            bar["time"] = moment
        (window,) = load_windows([row])
        assert window.position.time is not None
        assert (window.position.time.first, window.position.time.step) == (first.value, 1)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (make_row(), "rows must be a list of rows, got a single dict. Pass [row]."),
        (7, "rows must be a list of dicts, a frame or a table, got int. Pass rows, or a path as text."),
        (b"{}", "rows must be a list of dicts, a frame or a table, got bytes. Pass rows, or a path as text."),
        ([make_row(), 7], "row 2: a row must be a JSON object, got 7"),
        ([make_row("UP")], 'row 1: label must be LONG, SHORT, SKIP in any case, got "UP"'),
        ([make_row(id=datetime(2025, 1, 1, tzinfo=UTC).tzinfo)], "row 1: id must be text or a whole number, got "),
        ([make_row(id=1 << 70, context_bars="[{]")], "row 1: context_bars is text that is not valid JSON: "),
        ([make_row(), make_row(features={1: 2.0})], "row 2: names of fields must be text, got 1 in features"),
        (
            [pd.DataFrame([make_row()])],
            "row 1: a row must be a mapping of names to values, got a DataFrame. Pass plain",
        ),
        ([], "rows: there are no rows; at least one is required"),
        (make_row()["context_bars"], "row 1: a row must be a window of bars, but this is one bar. Make windows of its"),
        (pd.DataFrame(make_row()["context_bars"]), "row 1: a row must be a window of bars, but this is one bar."),
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), ": the columns of a frame must differ, but a occurs twice."),
        (pa.table({"image": [b"x"]}), ": the column image must have text, numbers, times, lists or structs, but it"),
    ],
)
def test_what_holds_no_rows_is_refused_with_the_number_of_the_row(given: Any, said: str) -> None:
    with pytest.raises(DataError) as refused:
        load_windows(given)
    (fault,) = refused.value.faults
    assert fault.startswith(said)


def test_a_row_that_contains_itself_is_refused() -> None:
    row = make_row()
    row["metadata"] = row
    with pytest.raises(DataError, match=r"^row 2: a row must not be nested so deeply, or contain itself$"):
        load_windows([make_row(), row])


def test_a_fault_of_every_row_in_memory_is_counted() -> None:
    with pytest.raises(DataError) as refused:
        load_windows([make_row("UP", seed=seed) for seed in range(40)])
    assert (len(refused.value.faults), refused.value.hidden.total(), refused.value.total) == (10, 30, 40)


def test_rows_of_a_parquet_reader_are_read_as_a_stream(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(parquet(table(some_rows()), row_group_size=2))
    with pq.ParquetFile(tmp_path / "rows") as file:
        reader = pa.RecordBatchReader.from_batches(file.schema_arrow, file.iter_batches(2))
        assert facts(load_windows(reader)) == facts(load_windows(some_rows()))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("open", Decimal("sNaN"), 'bars.open must be a finite number, got "sNaN"'),
        ("atr_14", Decimal("1E+99999"), 'bars.atr_14 must be a finite number, got "1E+99999"'),
        ("open", Decimal("-9E+400"), 'bars.open must be a finite number, got "-9E+400"'),
        ("time", np.datetime64("3000-01-01"), "bars.time must be a time from 1678 to 2262, got 3000-01-01"),
        ("time", np.datetime64("1500", "Y"), "bars.time must be a time from 1678 to 2262, got 1500"),
    ],
)
def test_values_that_no_row_can_hold_are_refused_with_their_row(name: str, value: Any, said: str) -> None:
    row = make_row()
    row["current_bar"][name] = value
    with pytest.raises(DataError) as refused:
        load_windows([make_row(), row])
    assert str(refused.value) == f"row 2: {said}"


def test_long_doubles_are_read_as_the_nearest_number() -> None:
    rows = [make_row(), make_row()]
    for name in ("open", "atr_14"):
        rows[1]["current_bar"][name] = np.longdouble(rows[1]["current_bar"].get(name, 2.5))
        rows[0]["current_bar"].setdefault(name, 2.5)
    assert facts(load_windows(rows[1:])) == facts(load_windows(rows[:1]))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["a.jsonl"], 'got a list with "a.jsonl". Pass the path itself, without a list.'),
        ((Path("a.jsonl"),), 'got a list with "a.jsonl". Pass the path itself, without a list.'),
        (io.StringIO("{}\n"), 'rows must not be an open file, got "StringIO". Pass its path as text.'),
        (io.BytesIO(b"{}\n"), 'rows must not be an open file, got "BytesIO". Pass its path as text.'),
        (Path("memory://b"), "a URL must be given as text, which a Path shortens. Pass 'memory://b'."),
        (Path("s3://bucket/rows.jsonl"), "a Path shortens. Pass 's3://bucket/rows.jsonl'."),
    ],
)
def test_places_in_other_forms_than_text_are_refused_once(given: Any, said: str) -> None:
    with pytest.raises(DataError) as refused:
        load_windows(given)
    (fault,) = refused.value.faults
    assert fault.endswith(said)
