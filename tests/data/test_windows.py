"""JSONL → windows: both shapes, and every kind of fault with its place and its words."""

import gzip
import hashlib
import json
import os
import socket
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctxtrain.data.parse_window import parse_row
from ctxtrain.data.row_schema import BAR_FIELDS
from ctxtrain.data.window_file import WindowFile, load_windows
from ctxtrain.errors import DataError
from tests.helpers import Row, bars_of, make_row, make_window, read, walk, write_rows


def reasons(row: object, *, labelled: bool = True) -> list[str]:
    """Why a row is refused; the row passes through JSON, as in a file."""
    reading = read([json.dumps(row).encode()], labelled=labelled)
    assert reading.good == (not reading.faults)
    return [fault.removeprefix("rows.jsonl:1: ") for fault in reading.faults]


def bar_reasons(index: int, **changes: Any) -> list[str]:
    """Why a row is refused when one of its bars is changed."""
    row = make_row()
    bars_of(row)[index].update(changes)
    return reasons(row)


def without_bar_field(name: str, index: int) -> Row:
    row = make_row()
    del bars_of(row)[index][name]
    return row


def test_a_window_row_becomes_its_bars_oldest_first(tmp_path: Path) -> None:
    row = make_row("SHORT", bars=34, features={"spread": 0.25})
    (window,) = load_windows(write_rows(tmp_path / "rows.jsonl", [row]))
    assert (window.id, window.label, window.text, window.features) == ("row-0", 1, None, {"spread": 0.25})
    assert window.location == f"{tmp_path}/rows.jsonl:1"
    assert not {"bar_index", "time"} & window.bars.keys()
    for name, values in window.bars.items():
        assert values.dtype == np.float64
        assert values.tolist() == [float(bar[name]) for bar in bars_of(row)], name


def test_a_text_row_keeps_its_text() -> None:
    window, faults = parse_row({"context": "Trend up. Long?", "label": "skip", "id": 7}, "a:1", labelled=True)
    assert window is not None
    assert (window.text, window.label, window.id, window.bars, faults) == ("Trend up. Long?", 2, "7", {}, [])


@pytest.mark.parametrize("name", ["packed.jsonl.gz", "PACKED.JSONL.GZ", "packed.jsonl"])
def test_a_gzip_file_reads_like_the_plain_one_whatever_its_name(name: str, tmp_path: Path) -> None:
    plain = write_rows(tmp_path / "rows.jsonl", [make_row(seed=seed) for seed in range(3)])
    packed = tmp_path / name
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    for a, b in zip(load_windows(plain), load_windows(packed), strict=True):
        assert (a.id, a.label) == (b.id, b.label)
        assert all((a.bars[name] == b.bars[name]).all() for name in a.bars)


@pytest.mark.parametrize("cut", [-1, -9, 40, 200])
def test_a_gzip_file_that_was_cut_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(make_row()).encode())[:cut])
    with pytest.raises(
        DataError, match=r"rows\.jsonl\.gz: incomplete or damaged gzip file .*\. Compress or copy it again\."
    ):
        walk(path)


def test_a_gzip_file_with_broken_bytes_is_refused(tmp_path: Path) -> None:
    packed = gzip.compress(json.dumps(make_row()).encode())
    for at in (0, 60):
        (tmp_path / "rows.jsonl.gz").write_bytes(packed[:at] + bytes([packed[at] ^ 0xFF]) + packed[at + 1 :])
        with pytest.raises(DataError, match="incomplete or damaged gzip file"):
            load_windows(tmp_path / "rows.jsonl.gz")


def test_a_file_that_is_missing_or_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.gz").mkdir()
    for name in ("none.jsonl", "none.jsonl.gz", "", "folder.gz"):
        path = tmp_path / name
        fault = "rows must be in a file, but this is a folder" if path.exists() else "no such file"
        with pytest.raises(DataError, match=rf": {fault}\. Give a file, such as rows\.jsonl or rows\.parquet\."):
            walk(path)


@pytest.mark.parametrize(
    ("encoded", "said"),
    [
        (lambda content: content.decode().encode("utf-16"), "the file is UTF-16 or UTF-32 text. Save it as UTF-8."),
        (
            lambda content: b"\xfe\xff" + content.decode().encode("utf-16-be"),
            "the file is UTF-16 or UTF-32 text. Save it as UTF-8.",
        ),
        (
            lambda content: b"\xef\xbb\xbf" + content,
            "UTF-8 byte order mark (BOM) is not supported. Save the file as UTF-8 without BOM.",
        ),
    ],
)
def test_a_file_of_another_encoding_has_one_fault_with_the_remedy(
    encoded: Callable[[bytes], bytes], said: str, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [make_row(seed=seed) for seed in range(20)])
    path.write_bytes(encoded(path.read_bytes()))
    with pytest.raises(DataError) as caught:
        load_windows(path)
    assert caught.value.faults == [f"{path}:1:1: not valid JSON: {said}"]
    assert caught.value.total == 1


def test_a_row_over_several_lines_is_told_the_rule_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(make_row(), indent=2))
    assert walk(path).faults == [
        f"{path}:1:2: not valid JSON: unexpected end of data. A file has one JSON object per line, or one JSON array."
    ]


@pytest.mark.parametrize("content", ["", "\n", " \n\t\n\r\n"])
def test_a_file_without_rows_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    reading = walk(tmp_path / "rows.jsonl")
    assert reading.faults == [f"{tmp_path}/rows.jsonl: the file has no rows; at least one is required"]


def test_blank_lines_are_ignored_and_counted_as_lines(tmp_path: Path) -> None:
    row = json.dumps(make_row())
    (tmp_path / "rows.jsonl").write_text(f"\n{row}\r\n  \n{row}\n\n{row}")
    assert [w.location.rpartition(":")[2] for w in load_windows(tmp_path / "rows.jsonl")] == ["2", "4", "6"]


def test_a_broken_line_in_the_middle_is_named_by_line_and_column_and_the_rest_is_read(tmp_path: Path) -> None:
    rows = [make_row(), '{"label": LONG}', make_row(), '{"label": "LONG"', b"\xff".decode("latin-1"), make_row()]
    reading = walk(write_rows(tmp_path / "rows.jsonl", rows))
    assert (reading.rows, reading.good, reading.fault_total) == (6, 3, 3)
    assert [fault.partition(": not valid JSON: ")[0] for fault in reading.faults] == [
        f"{tmp_path}/rows.jsonl:{place}" for place in ("2:11", "4:17", "5:1")
    ]


def test_bytes_that_are_no_text_are_refused() -> None:
    (fault,) = read([b'{"label": "\xff"}\n']).faults
    assert fault.startswith("rows.jsonl:1:")
    assert "not valid JSON: str is not valid UTF-8" in fault


@pytest.mark.parametrize(("row", "shown"), [([1], "[1]"), ("LONG", '"LONG"'), (None, "null"), (True, "true")])
def test_a_row_that_is_no_object_is_refused(row: object, shown: str) -> None:
    assert reasons(row) == [f"a row must be a JSON object, got {shown}"]


def test_missing_fields_are_named() -> None:
    no_label = "label is missing; it must be LONG, SHORT, SKIP in any case"
    assert reasons({}) == [
        no_label,
        "a row must have context_bars and current_bar, or features, or context; it has none",
    ]
    assert reasons({"context_bars": make_row()["context_bars"]}) == [no_label, "current_bar is missing"]
    assert reasons(without_bar_field("close", 3)) == ["context_bars[3].close is missing"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"high": "2,000"}, 'high must be a valid number, got "2,000"'),
        ({"high": True}, "high must be a valid number, got true"),
        ({"open": None}, "open must be a valid number, got null"),
        ({"volume": -1}, "volume must be greater than or equal to 0, got -1"),
        ({"atr_14": -0.5}, "atr_14 must be greater than or equal to 0, got -0.5"),
        ({"delta": "x"}, 'delta must be a valid number, got "x"'),
        ({"ext_dir": 2}, "ext_dir must be -1, 0 or 1, got 2"),
        ({"ext_bos": "yes"}, 'ext_bos must be true, false, 0 or 1, got "yes"'),
        ({"fvg_up": 2}, "fvg_up must be true, false, 0 or 1, got 2"),
        ({"mgann_leg_index": -1}, "mgann_leg_index must be greater than or equal to 0, got -1"),
        ({"mgann_leg_index": 11}, "mgann_leg_index must be less than or equal to 10, got 11"),
        ({"mgann_leg_index": 1.5}, "mgann_leg_index must be a valid integer, got 1.5"),
        ({"wave_strength": 101}, "wave_strength must be less than or equal to 100, got 101"),
        ({"bar_index": "12a"}, 'bar_index must be a valid integer, got "12a"'),
        ({"delta": 1e16}, "delta must be less than or equal to 1000000000000000, got 1e+16"),
        ({"low": -1e300}, "low must be greater than or equal to -1000000000000000, got -1e+300"),
    ],
)
def test_a_bar_field_of_wrong_type_or_range_is_refused(changes: Row, message: str) -> None:
    assert bar_reasons(5, **changes) == [f"context_bars[5].{message}"]
    assert bar_reasons(-1, **changes) == [f"current_bar.{message}"]


@pytest.mark.parametrize("name", ["high", "volume", "delta", "atr_14", "wave_strength"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_number_that_is_not_finite_is_refused(name: str, value: float) -> None:
    row = make_row()
    row["current_bar"][name] = value
    window, (fault,) = parse_row(row, "row 1", labelled=True)
    assert window is None
    assert fault.startswith(f"current_bar.{name} must be a finite number, got ")


@pytest.mark.parametrize("written", ["1e999", "-1e999", "NaN", "Infinity"])
def test_a_number_that_json_cannot_hold_is_refused_with_its_column(written: str) -> None:
    line = json.dumps(make_row()).replace('"volume": ', f'"volume": {written}, "x": ', 1).encode()
    (fault,) = read([line]).faults
    place, _, reason = fault.partition(": not valid JSON: ")
    assert abs(int(place.rpartition(":")[2]) - line.index(written.encode())) <= len(written) + 1
    assert reason


@pytest.mark.parametrize("label", ["LONG", "long", "Short", "sKIP"])
def test_labels_are_read_in_any_case(label: str) -> None:
    window, _ = parse_row(make_row(label), "a:1", labelled=True)
    assert window is not None
    assert window.label == ["LONG", "SHORT", "SKIP"].index(label.upper())


@pytest.mark.parametrize(("label", "shown"), [("HOLD", '"HOLD"'), ("", '""'), (1, "1"), (["LONG"], '["LONG"]')])
def test_another_label_is_refused(label: Any, shown: str) -> None:
    assert reasons(make_row(label)) == [f"label must be LONG, SHORT, SKIP in any case, got {shown}"]


def test_a_label_is_required_only_where_rows_are_labelled() -> None:
    row = make_row()
    for unlabelled in ({**row, "label": None}, {name: row[name] for name in row if name != "label"}):
        assert reasons(unlabelled) == ["label is missing; it must be LONG, SHORT, SKIP in any case"]
        assert reasons(unlabelled, labelled=False) == []
    window, _ = parse_row({**row, "label": "no matter"}, "a:1", labelled=False)
    assert window is not None
    assert window.label is None


@pytest.mark.parametrize("bars", [2, 19, 257, 300])
def test_too_few_or_too_many_bars_are_refused(bars: int) -> None:
    assert reasons(make_row(bars=bars)) == [f"a window must have 20 to 256 bars, current_bar included, got {bars}"]


@pytest.mark.parametrize("bars", [30, 50])
def test_thirty_and_fifty_bars_are_enough(bars: int) -> None:
    assert len(make_window(make_row(bars=bars)).bars["close"]) == bars


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"open": 10, "high": 9, "low": 11, "close": 10}, "open 10, high 9, low 11, close 10"),
        ({"open": 10, "high": 11, "low": 9, "close": 8.5}, "open 10, high 11, low 9, close 8.5"),
        ({"open": 12.25, "high": 11, "low": 9, "close": 10}, "open 12.25, high 11, low 9, close 10"),
    ],
)
def test_prices_outside_high_and_low_are_refused(changes: Row, shown: str) -> None:
    rule = "must have low ≤ open, close ≤ high, got"
    assert bar_reasons(4, **changes) == [f"context_bars[4] {rule} {shown}"]
    assert bar_reasons(-1, **changes) == [f"current_bar {rule} {shown}"]


def test_bars_that_run_backwards_are_refused() -> None:
    rule = "bars must run oldest first, but"
    assert bar_reasons(7, bar_index=999) == [f"{rule} bar_index goes from 1006 to 999 at context_bars[7]"]
    assert bar_reasons(-1, bar_index=1028) == [f"{rule} bar_index goes from 1028 to 1028 at current_bar"]
    early = "2025-03-03T09:00:00Z"
    assert bar_reasons(7, time=early) == [
        f'{rule} time goes from "2025-03-03T10:06:00Z" to "{early}" at context_bars[7]'
    ]
    turned = make_row()
    turned["context_bars"].reverse()
    assert len(reasons(turned)) == 2


def test_times_are_compared_as_moments() -> None:
    row = make_row(place=False)
    for i, bar in enumerate(bars_of(row)):  # each bar is later, though the clock on the wall goes back
        bar["time"] = f"2025-03-03T{23 - i % 2 * 5:02d}:{i:02d}:00{'-05:00' if i % 2 else '+00:00'}"
    assert reasons(row) == []
    for i, bar in enumerate(bars_of(row)):
        bar["time"] = 1_740_000_000 + 60.5 * i
    assert reasons(row) == []
    row["current_bar"]["time"] = 0
    assert len(reasons(row)) == 1


@pytest.mark.parametrize(("time", "shown"), [("noon", '"noon"'), (True, "true"), ([1], "[1]")])
def test_a_time_that_is_none_is_refused(time: object, shown: str) -> None:
    assert bar_reasons(-1, time=time) == [f"time must be ISO 8601 text or a number, got {shown}"]


def test_optional_fields_given_as_null_count_as_absent() -> None:
    row = make_row()
    for bar in bars_of(row):
        bar.update(dict.fromkeys(("delta", "ext_dir", "fvg_up", "wave_strength", "time", "bar_index", "atr_14")))
    window = make_window(row | {"features": None, "id": None, "symbol": None})
    assert not {"delta", "ext_dir", "fvg_up", "wave_strength", "atr_14"} & window.bars.keys()
    assert {"int_dir", "fvg_down"} <= window.bars.keys()
    assert (window.id, window.features) == (None, {})


def test_a_field_that_one_bar_lacks_is_absent_from_the_window() -> None:
    assert "fvg_up" not in make_window(without_bar_field("fvg_up", 11)).bars


def test_delta_is_buying_minus_selling_volume_unless_it_is_given() -> None:
    row = make_row(delta=False)
    for bar in bars_of(row):
        bar |= {"buy_vol": 30.5, "sell_vol": 10}
    assert set(make_window(row).bars["delta"]) == {20.5}
    for bar in bars_of(row):
        bar["delta"] = -4
    assert set(make_window(row).bars["delta"]) == {-4.0}


@pytest.mark.parametrize(("identity", "name"), [("a-1", "a-1"), (12, "12"), (None, None)])
def test_ids_are_text_or_whole_numbers(identity: object, name: str | None) -> None:
    assert make_window(make_row(id=identity)).id == name


@pytest.mark.parametrize(("identity", "shown"), [(1.5, "1.5"), (True, "true"), ({"a": 1}, '{"a": 1}')])
def test_other_ids_are_refused(identity: object, shown: str) -> None:
    assert reasons(make_row(id=identity)) == [f"id must be text or a whole number, got {shown}"]


FEATURE_RULE = "features.a must be a number, with a point and no other marks, or a word of at most 64 characters"


def test_features_are_finite_numbers_by_name() -> None:
    for value in ("1,5", "1 000", "nan", "-inf", "1e400", "50%"):
        assert reasons(make_row(features={"a": value})) == [f"{FEATURE_RULE}, got {json.dumps(value)}"]
    assert reasons(make_row(features={"a": 1e16})) == ["features.a must be a number of at most 1e+15, got 1e+16"]
    assert reasons(make_row(features=[1])) == ["features must be a valid object, got [1]"]


def test_a_text_row_must_hold_text() -> None:
    assert reasons({"context": " \n", "label": "LONG"}) == ["context must contain text, got only blanks"]
    assert reasons({"context": 3, "label": "LONG"}) == ["context must be a valid string, got 3"]


def test_a_file_holds_one_shape(tmp_path: Path) -> None:
    rows = [make_row(), {"context": "a", "label": "LONG"}, make_row()]
    (fault,) = walk(write_rows(tmp_path / "rows.jsonl", rows)).faults
    mixed = "mixes window rows (context_bars) and text rows (context)"
    assert fault == f"{tmp_path}/rows.jsonl:2: {mixed}; a file must have one kind of row"


def test_all_faults_of_a_file_are_listed_in_one_pass(tmp_path: Path) -> None:
    several = make_row("HOLD", id=1.5)
    several["current_bar"]["high"] = 0
    rows = [make_row("UP"), make_row(), "{", several, make_row(bars=5)]
    with pytest.raises(DataError) as caught:
        load_windows(write_rows(tmp_path / "rows.jsonl", rows))
    lines = [fault.split(":")[1] for fault in caught.value.faults]
    assert lines == ["1", "3", "4", "4", "4", "5"]


def test_ten_rows_of_a_kind_of_fault_are_listed_and_the_others_counted(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ["7"] * 1234 + [make_row("UP")])
    with pytest.raises(DataError) as caught:
        load_windows(path)
    shown = str(caught.value).splitlines()
    assert len(shown) == 12
    assert shown[9].startswith(f"{path}:10: ")
    assert shown[10] == f'{path}:1235: label must be LONG, SHORT, SKIP in any case, got "UP"'
    assert shown[11] == "… and 1,224 more (1,235 in all): 1,224 × a row must be a JSON object"


def test_a_fault_of_every_bar_is_one_fault_of_its_row(tmp_path: Path) -> None:
    rows = [make_row(seed=seed) for seed in range(40)]
    for row in rows:
        for bar in bars_of(row):
            bar["last"] = bar.pop("close")
    with pytest.raises(DataError) as caught:
        load_windows(write_rows(tmp_path / "rows.jsonl", rows))
    shown = str(caught.value).splitlines()
    assert shown[0].endswith("rows.jsonl:1: context_bars[0].close is missing (and 29 more bars of the row)")
    assert (len(shown), shown[10]) == (11, "… and 30 more (40 in all): 30 × a bar.close is missing")


def test_a_hundred_faults_are_listed_at_most(tmp_path: Path) -> None:
    rows = []
    for name in BAR_FIELDS[:12]:
        row = make_row()
        row["current_bar"][name] = "x"
        rows += [row] * 10
    reading = walk(write_rows(tmp_path / "rows.jsonl", rows))
    assert (len(reading.faults), reading.hidden.total(), reading.fault_total) == (100, 20, 120)


def test_two_features_of_a_row_are_two_faults_of_one_kind(tmp_path: Path) -> None:
    rows = [make_row(features={f"a{n}": "1,5", f"b{n}": "nan"}) for n in range(6)]
    reading = walk(write_rows(tmp_path / "rows.jsonl", rows))
    assert (len(reading.faults), reading.fault_total) == (10, 12)
    assert [fault.rpartition(": ")[2] for fault in reading.faults[:2]] == [
        f'{FEATURE_RULE.replace("features.a", "features.a0")}, got "1,5"',
        f'{FEATURE_RULE.replace("features.a", "features.b0")}, got "nan"',
    ]
    assert reading.hidden == {FEATURE_RULE.replace("features.a", "a feature"): 2}


def test_fields_that_no_model_reads_are_counted() -> None:
    rows = [make_row(conditions_met=["a"]), make_row(conditions_met=[], mood="good", timeframe="M1", metadata={})]
    reading = read(json.dumps(row).encode() for row in rows)
    assert reading.ignored_fields == {"conditions_met": 2, "mood": 1}


def test_fields_of_bars_that_no_model_reads_are_counted_by_row() -> None:
    rows: list[dict[str, Any]] = [make_row(), make_row(), {"context": "text", "label": "SKIP", "features": {"a": 1}}]
    for bar in rows[0]["context_bars"][3:]:
        bar |= {"ext_chosh": 1, "label_reason": "x"}
    rows[1]["current_bar"]["ext_chosh"] = 0
    reading = read(json.dumps(row).encode() for row in rows)
    assert reading.ignored_fields == {"bars.ext_chosh": 2, "bars.label_reason": 1, "features": 1}


def closes(file: WindowFile) -> list[list[float]]:
    return [window.bars["close"].tolist() for window in file]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize("then", ["changed", "gone"])
def test_a_file_that_is_kept_is_read_once_whatever_becomes_of_it(tmp_path: Path, name: str, then: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [make_row(seed=seed) for seed in range(3)])
    if name.endswith(".gz"):
        path = path.with_name(name)
        path.write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    file = WindowFile(path)
    next(iter(file))  # a walk that is broken off keeps nothing
    first = closes(file)
    if then == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-9])
    assert closes(file) == first
    assert (file.report.good, file.report.sha256) == (3, digest)
    assert [file.id(row) for row in range(3)] == ["row-0", "row-1", "row-2"]


def test_a_pipe_that_is_kept_can_be_walked_again_and_one_without_a_writer_is_empty(tmp_path: Path) -> None:
    content = write_rows(tmp_path / "rows.jsonl", [make_row(seed=seed) for seed in range(3)]).read_bytes()
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["/bin/sh", "-c", f"cat > {tmp_path / 'pipe'}"], stdin=subprocess.PIPE) as writer:
        assert writer.stdin is not None
        with (tmp_path / "pipe").open("rb"):  # both ends are open before anything is written
            writer.stdin.write(content)
            writer.stdin.close()
            file = WindowFile(tmp_path / "pipe")
            assert closes(file) == closes(file) == closes(WindowFile(tmp_path / "rows.jsonl"))
            assert file.sha256() == hashlib.sha256(content).hexdigest()
    reading = walk(tmp_path / "pipe")
    assert reading.faults == [f"{tmp_path / 'pipe'}: the file has no rows; at least one is required"]


def test_a_device_and_a_socket_are_refused_at_once(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        for path in (Path("/dev/zero"), Path("/dev/null"), tmp_path / "s"):
            with pytest.raises(DataError, match="rows must be in a file or a pipe, but this is a device or a socket"):
                list(WindowFile(path))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_the_digest_is_that_of_the_bytes_on_the_disk(tmp_path: Path, name: str) -> None:
    """All of them: of a packed file also its header, further members and the zeros that may pad it."""
    lines = [json.dumps(make_row(seed=seed)).encode() + b"\n" for seed in range(40)]
    content = b"".join(lines)
    if name.endswith(".gz"):
        content = gzip.compress(b"".join(lines[:30])) + gzip.compress(b"".join(lines[30:])) + bytes(300_000)
    path = tmp_path / name
    path.write_bytes(content)
    reading = walk(path)
    assert reading.good == 40
    assert reading.sha256 == hashlib.sha256(content).hexdigest()


def test_a_walk_keeps_no_window(tmp_path: Path) -> None:
    """Memory in use after a walk through 1,000 rows is far below what their windows take."""
    file = WindowFile(write_rows(tmp_path / "rows.jsonl", [make_row(bars=50)] * 1000), keep=False)
    tracemalloc.start()
    try:
        for _ in file:
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000 < 1000 * 15 * 50 * 8
