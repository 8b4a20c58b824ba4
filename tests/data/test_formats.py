"""Files of rows in every format: the same rows give the same windows, and each fault is told with its place."""

import gzip
import hashlib
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from ctxtrain.data.codec import fit_codec
from ctxtrain.data.parse_window import Window
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


WRITERS: dict[str, Callable[[list[Row]], bytes]] = {
    "lines": lines,
    "lines in gzip": lambda rows: gzip.compress(lines(rows)),
    "lines in zstd": lambda rows: zstd(lines(rows)),
    "lines in two frames of zstd": lambda rows: zstd(lines(rows[:2])) + zstd(lines(rows[2:])),
    "array": lambda rows: json.dumps(rows).encode(),
    "array over many lines": lambda rows: json.dumps(rows, indent=1).encode() + b"\n",
    "array in gzip": lambda rows: gzip.compress(json.dumps(rows).encode()),
    "array in zstd": lambda rows: zstd(b"\n" + json.dumps(rows).encode()),
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
    path.write_text(json.dumps([make_row(bars=50)] * 400))
    file = WindowFile(path, keep=False)
    tracemalloc.start()
    try:
        for _ in file:
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3_000_000 < path.stat().st_size


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
