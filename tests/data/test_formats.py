"""Files of rows in every format: the same rows give the same windows, and each fault is told with its place."""

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctxtrain.data.codec_fitter import fit_codec
from ctxtrain.data.parse_window import Window
from ctxtrain.data.sources import StandardInput
from ctxtrain.data.table_cache import TableCache
from ctxtrain.data.window_file import WindowFile, load_windows
from ctxtrain.errors import DataError
from tests.helpers import Row, make_row, walk, write_rows

LABELS = ("LONG", "SHORT", "SKIP")


def some_rows() -> list[Row]:
    """Rows of all labels and types, some without id or with fewer fields."""
    rows = [make_row(LABELS[n % 3], 30 + n, seed=n, flags=n != 4, features={"spread": n / 8}) for n in range(6)]
    del rows[3]["id"]
    return rows


def zstd(content: bytes) -> bytes:
    packed = pa.BufferOutputStream()
    with pa.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(content)
    return bytes(packed.getvalue().to_pybytes())


def lines(rows: list[Row]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def facts(windows: list[Window]) -> list[tuple[Any, ...]]:
    """Everything that training reads of windows, and their texts; not the place of their rows."""
    texts = fit_codec("compact", windows).render_all(windows)
    return [
        (
            window.id,
            window.label,
            window.symbol,
            {name: values.tobytes() for name, values in window.bars.items()},
            window.features,
            window.position,
            text,
        )
        for window, text in zip(windows, texts, strict=True)
    ]


def table(rows: list[Row]) -> pa.Table:
    """The rows as columns with structs, which have the fields of all rows."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})


def parquet(content: pa.Table, **options: Any) -> bytes:
    buffer = pa.BufferOutputStream()
    pq.write_table(content, buffer, **options)
    return bytes(buffer.getvalue().to_pybytes())


def arrow(content: pa.Table, *, is_stream: bool = False, **options: Any) -> bytes:
    buffer = pa.BufferOutputStream()
    new = pa.ipc.new_stream if is_stream else pa.ipc.new_file
    with new(buffer, content.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(content, max_chunksize=4)
    return bytes(buffer.getvalue().to_pybytes())


def retyped(content: pa.Table, bar_types: dict[str, pa.DataType]) -> pa.Table:
    """The table with other types of fields of its bars."""
    fields = content.schema.field("current_bar").type
    bar = pa.struct([(item.name, bar_types.get(item.name, item.type)) for item in fields])
    types = {"context_bars": pa.list_(bar), "current_bar": bar}
    return content.cast(pa.schema([(item.name, types.get(item.name, item.type)) for item in content.schema]))


def with_columns(content: pa.Table, **columns: pa.Array) -> pa.Table:
    for name, column in columns.items():
        content = content.set_column(content.schema.get_field_index(name), name, column)
    return content


def as_json(rows: list[Row]) -> pa.Table:
    """Bars and features as JSON text."""
    names = ("context_bars", "current_bar", "features")
    return with_columns(table(rows), **{name: pa.array([json.dumps(row[name]) for row in rows]) for name in names})


def of_other_types(rows: list[Row]) -> pa.Table:
    bar_types = {
        "time": pa.timestamp("ns", "America/New_York"),
        "open": pa.decimal128(12, 2),
        "volume": pa.uint16(),
        "bar_index": pa.int16(),
        "atr_14": pa.float32(),
    }
    features = pa.array([list(row["features"].items()) for row in rows], pa.map_(pa.string(), pa.float16()))
    content = with_columns(retyped(table(rows), bar_types), features=features)
    return with_columns(
        content,
        label=content["label"].combine_chunks().dictionary_encode(),
        symbol=content["symbol"].cast(pa.large_string()),
    )


WRITERS: dict[str, Callable[[list[Row]], bytes]] = {
    "lines": lines,
    "lines in gzip": lambda rows: gzip.compress(lines(rows)),
    "lines in zstd": lambda rows: zstd(lines(rows)),
    "lines in two frames of zstd": lambda rows: zstd(lines(rows[:2])) + zstd(lines(rows[2:])),
    "array": lambda rows: json.dumps(rows).encode(),
    "array over many lines": lambda rows: json.dumps(rows, indent=1).encode() + b"\n",
    "array in gzip": lambda rows: gzip.compress(json.dumps(rows).encode()),
    "array in zstd": lambda rows: zstd(b"\n" + json.dumps(rows).encode()),
    "Parquet": lambda rows: parquet(table(rows)),
    "Parquet in small groups": lambda rows: parquet(table(rows), row_group_size=4, compression="zstd"),
    "Parquet in gzip": lambda rows: gzip.compress(parquet(table(rows))),
    "Parquet of JSON text": lambda rows: parquet(as_json(rows)),
    "Parquet of other types": lambda rows: parquet(of_other_types(rows)),
    "Arrow": lambda rows: arrow(table(rows)),
    "Feather": lambda rows: arrow(table(rows), compression="lz4"),
    "Arrow in zstd": lambda rows: zstd(arrow(table(rows))),
    "Arrow stream": lambda rows: arrow(of_other_types(rows), is_stream=True),
}


@pytest.mark.parametrize("how", WRITERS)
@pytest.mark.parametrize("name", ["rows", "rows.txt", "rows.jsonl.gz"])
def test_the_same_rows_are_the_same_windows_in_every_format_whatever_the_name(
    how: str, name: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(WRITERS[how](some_rows()))
    file = WindowFile(path)
    windows = list(file)
    assert facts(windows) == facts(load_windows(write_rows(tmp_path / "plain.jsonl", some_rows())))
    assert file.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()
    place = f"{path}:" if how.startswith("lines") else f"{path}:row "
    assert windows[4].location == f"{place}5"
    assert (file.name(4), file.name(3)) == (f"row-4 ({place}5)", f"{place}4")


@pytest.mark.parametrize("how", ["array in zstd", "Parquet", "Arrow stream"])
def test_a_pipe_and_standard_input_may_have_any_format(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, expected = WRITERS[how](some_rows()), facts(load_windows(some_rows()))
    (tmp_path / "rows").write_bytes(content)
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["/bin/sh", "-c", f"cat {tmp_path / 'rows'} > {tmp_path / 'pipe'}"]):
        file = WindowFile(tmp_path / "pipe")
        assert facts(list(file)) == expected
    assert file.sha256() == hashlib.sha256(content).hexdigest()
    with io.TextIOWrapper(io.BytesIO(content)) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        windows = load_windows(StandardInput())
    assert facts(windows) == expected
    assert windows[0].location == "standard input:row 1"


def test_a_kept_table_has_the_places_of_its_format(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(some_rows()))
    for _ in range(2):
        file = WindowFile(path, cache=TableCache(tmp_path / "cache"))
        assert [window.location for window in file][1] == f"{path}:row 2"
        assert file.name(1) == f"row-1 ({path}:row 2)"


def faults(path: Path) -> list[str]:
    return [fault.removeprefix(f"{path}:") for fault in walk(path).faults]


def test_a_fault_within_an_array_has_its_row_or_its_line_and_column_and_the_rest_is_read(tmp_path: Path) -> None:
    good = json.dumps(make_row())
    twice = good.replace('"label": "LONG"', '"label":\n "LONG", "label": "SHORT"')
    path = tmp_path / "rows.json"
    nan = '{"label": NaN}'
    path.write_text(f"[{good},\n {twice},\n\n  {nan}, {json.dumps(make_row('UP'))}, 7, {good}]")
    column = twice.partition("\n")[2].index('"label"') + 1
    assert faults(path) == [
        f"3:{column}: not valid JSON: duplicate key 'label' in an object",
        "5:13: not valid JSON: unexpected character, expected a JSON value",
        'row 4: label must be LONG, SHORT, SKIP in any case, got "UP"',
        "row 5: a row must be a JSON object, got 7",
    ]
    assert walk(path).good == 2


@pytest.mark.parametrize(
    ("written", "fault"),
    [
        ('[{"a": 1} {"b": 2}]', "1:11: not valid JSON: a comma or ] must follow row 1"),
        ('[{"a": 1}\n,]', "2:2: not valid JSON: Expecting value"),
        ('[{"a": 1},\n', "2:1: not valid JSON: Expecting value"),
        ('[{"a": 1}', "1:10: not valid JSON: a comma or ] must follow row 1"),
        ('[{"a": 1}, {"b": "x', "1:18: not valid JSON: Unterminated string starting at"),
        ('[{"a": 1}]\n [', "2:2: not valid JSON: text follows the end of the array"),
        ('[{"a": 1}, ' + "[" * 5000, "1:12: not valid JSON: nested too deeply"),
        ("\ufeff[{}]", "1:1: UTF-8 byte order mark (BOM) is not supported. Save the file as UTF-8 without BOM"),
    ],
)
def test_an_array_that_breaks_off_is_read_to_there(written: str, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(written)
    assert faults(path)[-1] == f"{fault}. The rest of the file is not read."
    assert walk(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_row_of_an_array_may_be_as_long_as_a_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    for length, good in ((1_000_000, 2), ((16 << 20) + 1, 1)):
        path.write_text(json.dumps([make_row(), make_row(metadata="x" * length)]))
        assert walk(path).good == good
    assert "a row may have at most 16 MiB" in faults(path)[0]


def test_bytes_of_an_array_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b'[{"id": "\xff"}, ' + json.dumps(make_row()).encode() + b"]")
    assert walk(path).good == 1
    assert faults(path)[0].startswith("1:")


def test_a_walk_through_an_array_keeps_no_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([make_row(bars=50)] * 200))
    file = WindowFile(path, keep=False)
    tracemalloc.start()
    try:
        for _ in file:
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_500_000 < path.stat().st_size


def test_bars_in_place_of_rows_are_told_once_with_the_command_for_them(tmp_path: Path) -> None:
    bars = make_row()["context_bars"]
    path = tmp_path / "bars"
    rule = "a row must be a window of bars, but this is one bar. Make windows of its bars with `ctxtrain windows`"
    for place, content in (("row 1", json.dumps(bars)), ("1", "".join(f"{json.dumps(bar)}\n" for bar in bars))):
        path.write_text(content)
        assert faults(path) == [f"{place}: {rule} (docs/own-windows.md)."]


@pytest.mark.parametrize("cut", [-1, -9, 40, 200])
def test_a_zstd_file_that_was_cut_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(zstd(lines(some_rows()))[:cut])
    with pytest.raises(DataError, match=r"rows\.jsonl\.zst: incomplete or damaged zstd file .*\. Compress or copy"):
        walk(path)


def test_a_zstd_file_with_broken_bytes_or_others_after_it_is_refused(tmp_path: Path) -> None:
    packed = zstd(lines(some_rows()))
    for content in (b"x" + packed[1:], packed[:4] + b"\xff" * 9 + packed[13:], packed + b"more"):
        (tmp_path / "rows.zst").write_bytes(content)
        with pytest.raises(DataError, match="incomplete or damaged zstd file"):
            walk(tmp_path / "rows.zst")


DAMAGED = {
    "Parquet": ("rows.parquet", parquet(table(some_rows()))),
    "Arrow": ("rows.feather", arrow(table(some_rows()))),
    "Arrow stream": ("rows.arrow", arrow(table(some_rows()), is_stream=True)),
}


@pytest.mark.parametrize("kind", DAMAGED)
@pytest.mark.parametrize("cut", [6, 60, -100, -1])
def test_a_parquet_or_arrow_file_that_was_cut_is_refused(kind: str, cut: int, tmp_path: Path) -> None:
    name, content = DAMAGED[kind]
    path = tmp_path / name
    path.write_bytes(content[: cut - 10 if kind == "Arrow stream" else cut])
    with pytest.raises(DataError) as refused:
        walk(path)
    (fault,) = refused.value.faults
    assert fault.startswith(f"{path}: incomplete or damaged {kind.partition(' ')[0]} file (")
    assert fault.endswith("). Write or copy it again.")


@pytest.mark.parametrize("kind", DAMAGED)
def test_flipped_bytes_are_refused_or_change_a_value_and_never_end_the_process(kind: str, tmp_path: Path) -> None:
    name, content = DAMAGED[kind]
    path = tmp_path / name
    refused = 0
    for at in range(4, len(content), len(content) // 60):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
        try:
            walk(path)
        except DataError as error:
            refused += "incomplete or damaged" in str(error)
    assert refused > 5


def test_a_parquet_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(parquet(table(some_rows())))
    windows = iter(WindowFile(path))
    next(windows)
    path.write_bytes(parquet(table(some_rows()[:5])))
    with pytest.raises(DataError, match=r"rows: (the file was changed while|incomplete or damaged)"):
        list(windows)


def test_columns_that_no_row_can_have_are_all_named(tmp_path: Path) -> None:
    content = table(some_rows()).append_column("image", pa.array([b"x"] * 6))
    bars = pa.array([{"open": 1.0, "raw": b"x", "held": 5}] * 6)
    held = pa.struct([("open", pa.float64()), ("raw", pa.large_binary()), ("held", pa.duration("s"))])
    path = tmp_path / "rows"
    path.write_bytes(parquet(with_columns(content, current_bar=bars.cast(held))))
    with pytest.raises(DataError) as refused:
        walk(path)
    rule = "must have text, numbers, times, lists or structs, but it has"
    assert refused.value.faults == [
        f"{path}: the column current_bar.raw {rule} bytes. Write it as text or numbers, or leave it out.",
        f"{path}: the column current_bar.held {rule} a duration. Write it as a number, or leave it out.",
        f"{path}: the column image {rule} bytes. Write it as text or numbers, or leave it out.",
    ]


def test_a_fault_on_every_row_of_columns_is_counted(tmp_path: Path) -> None:
    rows = [make_row("UP", seed=seed) for seed in range(40)]
    path = tmp_path / "rows"
    path.write_bytes(parquet(table(rows)))
    report = walk(path)
    assert report.faults[9] == f'{path}:row 10: label must be LONG, SHORT, SKIP in any case, got "UP"'
    assert (len(report.faults), report.hidden.total(), report.fault_total) == (10, 30, 40)


def test_json_text_in_a_column_is_as_strict_as_a_line(tmp_path: Path) -> None:
    texts = [json.dumps(row["current_bar"]) for row in some_rows()]
    texts[1], texts[4] = texts[1].replace('"low"', '"high"'), "[NaN"
    path = tmp_path / "rows"
    path.write_bytes(parquet(with_columns(as_json(some_rows()), current_bar=pa.array(texts))))
    first, second = walk(path).faults
    assert first.startswith(
        f"{path}:row 2: current_bar is text that is not valid JSON: duplicate key 'high' in an object (column "
    )
    assert second.startswith(f"{path}:row 5: current_bar is text that is not valid JSON: unexpected character")


def test_fields_that_a_row_lacks_are_absent_and_those_that_some_bars_lack_are_noticed(tmp_path: Path) -> None:
    rows = some_rows()
    del rows[2]["context_bars"][0]["delta"]
    path = tmp_path / "rows"
    path.write_bytes(parquet(table(rows)))
    notices = walk(path).notices
    assert notices.lacking == {"delta": (1, 1)}
    assert len(list(notices.lines())) == 1


def test_nan_counts_as_not_given_and_is_told_once(tmp_path: Path) -> None:
    rows = some_rows()
    rows[0]["current_bar"]["delta"] = rows[1]["context_bars"][3]["delta"] = rows[1]["features"]["spread"] = float("nan")
    for row in rows:
        for bar in (*row["context_bars"], row["current_bar"]):
            bar["delta"] = float(bar["delta"])
    path = tmp_path / "rows"
    path.write_bytes(arrow(table(rows)))
    file = WindowFile(path)
    windows = list(file)
    assert [("delta" in window.bars, "spread" in window.features) for window in windows[:3]] == [
        (False, True), (False, False), (True, True),
    ]  # fmt: skip
    assert next(file.report.notices.lines()) == "NaN counts as not given: 3 values of bars.delta, features.spread"
    rows[0]["current_bar"]["close"] = float("nan")
    path.write_bytes(arrow(table(rows)))
    assert faults(path) == ["row 1: current_bar.close is missing"]


def test_prices_of_32_bits_are_read_as_they_were_written_and_told_once(tmp_path: Path) -> None:
    rows = some_rows()
    for row in rows:
        for bar in (*row["context_bars"], row["current_bar"]):
            bar.update({name: bar[name] + 0.1 for name in ("open", "high", "low", "close")})
    prices = dict.fromkeys(("open", "high", "low", "close"), pa.float32())
    path = tmp_path / "rows"
    path.write_bytes(parquet(retyped(table(rows), prices)))
    file = WindowFile(path, cache=TableCache(tmp_path / "cache"))
    assert [window.bars["close"][0] for window in file] == [row["context_bars"][0]["close"] for row in rows]
    again = WindowFile(path, cache=TableCache(tmp_path / "cache"))
    assert len(list(again)) == 6
    for notices in (file.report.notices, again.report.notices):
        (line,) = notices.lines()
        assert line == (
            "bars.close, bars.high, bars.low, bars.open: numbers of 32 bits have 7 digits, and are read as the "
            "shortest decimal number that they stand for, such as 4135.7 for 4135.7001953125"
        )


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_times_of_columns_keep_every_digit(unit: str, tmp_path: Path) -> None:
    step = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}[unit]
    first = 1_741_010_400_123_456_789 // step
    rows = [make_row(seed=seed) for seed in range(2)]
    for row in rows:
        for n, bar in enumerate((*row["context_bars"], row["current_bar"])):
            bar["time"] = first + n
    path = tmp_path / "rows"
    path.write_bytes(parquet(retyped(table(rows), {"time": pa.timestamp(unit)}), coerce_timestamps=None))
    place = load_windows(path)[0].position
    assert place.time is not None
    assert (place.time.first, place.time.last, place.time.step) == (first * step, (first + 29) * step, step)
    assert place.unit == "ISO 8601 text without a zone, taken as UTC"


def test_a_walk_through_parquet_keeps_no_row(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(parquet(table([make_row(bars=50)] * 400)))
    file = WindowFile(path, keep=False)
    tracemalloc.start()
    try:
        count = sum(1 for _ in file)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 400
    assert peak < 12_000_000
