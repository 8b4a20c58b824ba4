"""Rows that are almost right: each is read or refused with its file and line, in every part that looks at rows."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.random import Generator

from ctxtrain.data.check import check_files
from ctxtrain.data.codec_fitter import CodecFitter
from ctxtrain.data.profile import row_notices, survey
from ctxtrain.data.row_schema import BAR_FIELDS
from ctxtrain.data.walk_forward import walk_forward
from ctxtrain.data.window_file import WindowFile
from ctxtrain.errors import ConfigError, DataError
from ctxtrain.evaluation.baseline_inputs import window_inputs
from ctxtrain.evaluation.blocks import assign_blocks
from ctxtrain.evaluation.worst_errors import confident_mistakes
from tests.conftest import Amount
from tests.helpers import Row, bars_of, dated_rows, make_row
from tests.reliability.conftest import Figure

ROWS_A_FILE = 25
FIELDS = (*BAR_FIELDS, "bar_index", "time")
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, -0.0, 0.5, 5e-324, 1e-300, 1e-9, 1e9, 1e15, -1e15, 1.1e15, 1e16, 1e300, -1e300,
    2**53, 2**63, 2**64, 10**30, "", " ", "0", "1.5", "NaN", "null", "LONG", "é", "😀", "\u0000", "\ud83d", "x" * 5000,
    "1e400", [], [1], [[]], {}, {"a": 1}, {"open": 1}, [None] * 30,
]  # fmt: skip
TIMES: list[Any] = [
    0, 60, -60, 1, 99_999_999, 100_000_000, 1_700_000_000, 1.7e9, 1_700_000_000_000, 1.7e15, 1_700_000_000_000_000_000,
    20250303, 20250303140000, 7_258_118_400, 10**12, 10**19, -(10**18), "2025-03-03", "2025-03-03T14:00:00Z",
    "20250303T14", "2025-03-03T14:00:00.123456789+05:30", "2025-03-03 14:00", "2025-02-30", "0001-01-01",
    "9999-12-31T23:59:59.999999Z", "9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+23:59", "1970-01-01",
    "14:00:00", "2025-W10-1", "now", "03/03/2025", "2025-03-03T24:00:00", "2025-03-03T14:00:60Z", "1700000000",
]  # fmt: skip
NAMES = ["timestamp", "Date", "ts", "t", "open_time", "Time", "TIME", "close-time", "datetime", "epoch"]
PRICES = ("open", "high", "low", "close")

Mutation = Callable[[Row, Generator], object]


def pick(rng: Generator, values: Any) -> Any:
    return values[int(rng.integers(len(values)))]


def some_bars(row: Row, rng: Generator) -> list[Row]:
    """One bar, a few, the first, the last, or all."""
    bars = bars_of(row)
    few = [bars[n] for n in rng.integers(0, len(bars), int(rng.integers(1, 5)))]
    return pick(rng, [[pick(rng, bars)], few, bars[:1], bars[-1:], bars])


def odd_value(row: Row, rng: Generator) -> None:
    name, value = pick(rng, FIELDS), pick(rng, ODD)
    for bar in some_bars(row, rng):
        bar[name] = value


def odd_of_each(row: Row, rng: Generator) -> None:
    name = pick(rng, FIELDS)
    for bar in some_bars(row, rng):
        bar[name] = pick(rng, ODD)


def odd_time(row: Row, rng: Generator) -> None:
    name, value = pick(rng, ["time", "bar_index", *NAMES]), pick(rng, TIMES)
    for bar in some_bars(row, rng):
        bar[name] = value


def times_of_a_unit(row: Row, rng: Generator) -> None:
    """All times of the row in some unit, under some name, shifted, doubled, turned or lacking here and there."""
    step, start = pick(rng, [(1, 1.7e9), (1e3, 1.7e12), (1e6, 1.7e15), (1e9, 1.7e18), (1, 0), (1, 9.99999e7), (1, 2e8)])
    bars = bars_of(row)
    times = [int(start + 60 * step * n) for n in range(len(bars))]
    if rng.random() < 0.3:
        times[int(rng.integers(len(times)))] += pick(rng, [60, -60, 10**6, -(10**9), 10**12])
    if rng.random() < 0.2:
        times.reverse()
    name = pick(rng, ["time", "time", *NAMES])
    kind = pick(rng, [int, int, float, str])
    for bar, time in zip(bars, times, strict=True):
        bar.pop("time", None)
        if rng.random() > pick(rng, [0, 0, 0.1]):
            bar[name] = kind(time)


def other_zone(row: Row, rng: Generator) -> None:
    for bar in some_bars(row, rng):
        zone = pick(rng, ["", "Z", "+00:00", "-05:00", "+05:45", "+14:00", "+24:00", " UTC", "z", "[Europe/Paris]"])
        bar["time"] = bar["time"].rstrip("Z") + zone


def missing(row: Row, rng: Generator) -> None:
    name = pick(rng, FIELDS)
    for bar in some_bars(row, rng):
        bar.pop(name, None)


def swapped(row: Row, rng: Generator) -> None:
    one, other = pick(rng, FIELDS), pick(rng, FIELDS)
    for bar in some_bars(row, rng):
        bar[one], bar[other] = bar.get(other), bar.get(one)


def scaled(row: Row, rng: Generator) -> None:
    factor = pick(rng, [0.0, -1.0, 1e-12, 1e6, 1e12, 1 + 2e-16, 1e-300])
    names = pick(rng, [PRICES, PRICES, ("volume",), ("delta",), ("high",), ("low",)])
    for bar in some_bars(row, rng):
        bar.update({name: bar[name] * factor for name in names if isinstance(bar.get(name), int | float)})


def flat(row: Row, rng: Generator) -> None:
    value = pick(rng, [0, 2.0, -1e15, 5e-324, 1e15])
    for bar in bars_of(row):
        bar.update(dict.fromkeys(PRICES, value) | {"volume": pick(rng, [0, 0, 5]), "delta": 0})


def wild(row: Row, rng: Generator) -> None:
    for bar in some_bars(row, rng):
        name, value = pick(
            rng, [("high", 1e15), ("high", 1e6), ("low", -1e15), ("low", 0), ("volume", 1e15), ("delta", -1e15)]
        )
        bar[name] = value


def odd_in_row(row: Row, rng: Generator) -> None:
    row[pick(rng, ["label", "id", "symbol", "features", "context_bars", "current_bar", "context", "é\u0000"])] = pick(
        rng, ODD
    )


def odd_bars(row: Row, rng: Generator) -> None:
    bars = row["context_bars"]
    kind = int(rng.integers(6))
    if kind == 0:
        bars[int(rng.integers(len(bars)))] = pick(rng, ODD)
    elif kind == 1:
        bars *= 2
    elif kind == 2:
        bars.reverse()
    elif kind == 3:
        bars.append(row["current_bar"])
    elif kind == 4:
        del bars[int(rng.integers(len(bars))) :]
    else:
        row["current_bar"] = bars


def odd_features(row: Row, rng: Generator) -> None:
    names = ["a", "b", "", "é", "features.a", "a.b", "😀", "\u0000", "label"]
    row["features"] = {pick(rng, names): pick(rng, [*ODD, 1.0, 2.0]) for _ in range(int(rng.integers(0, 6)))}


def nested(row: Row, rng: Generator) -> None:
    value: Any = pick(rng, ODD)
    for _ in range(int(rng.choice([2, 20, 200]))):
        value = pick(rng, [[value], {"a": value}])
    target = pick(rng, [row, row["current_bar"], *row["context_bars"][:3]])
    target[pick(rng, ["x", "label", "open", "time", "features", "context_bars"])] = value


def own_fields(row: Row, rng: Generator) -> None:
    for bar in some_bars(row, rng):
        bar[pick(rng, ["Open", "o", "session", "é", "", "vwap", *NAMES])] = pick(rng, ODD)


def as_text(row: Row, rng: Generator) -> None:
    row["context"] = pick(rng, ["up", " ", "", 1, None, "<|endoftext|>", "\u0000"])
    if rng.random() < 0.7:
        row.pop("context_bars")
    if rng.random() < 0.5:
        row.pop("current_bar")


MUTATIONS: list[Mutation] = [
    odd_value, odd_of_each, odd_time, times_of_a_unit, times_of_a_unit, other_zone, missing, swapped, scaled, flat,
    wild, odd_in_row, odd_bars, odd_features, nested, own_fields, as_text,
]  # fmt: skip


def cut(line: bytes, rng: Generator) -> bytes:
    return line[: int(rng.integers(len(line)))]


def other_bytes(line: bytes, rng: Generator) -> bytes:
    changed = bytearray(line)
    for place in rng.integers(0, len(changed), int(rng.integers(1, 4))):
        changed[place : place + int(rng.integers(0, 3))] = rng.bytes(int(rng.integers(0, 3))).replace(b"\n", b" ")
    return bytes(changed)


def key_twice(line: bytes, rng: Generator) -> bytes:
    name = pick(rng, [b'"open"', b'"time"', b'"label"', b'"id"', b'"volume"'])
    return line.replace(name, name + b": " + pick(rng, [b"1", b"null", b'"x"', b"1e400", b"NaN"]) + b", " + name, 1)


def mutated(rng: Generator) -> bytes:
    """A line: a valid row with one to three mutations, sometimes of its bytes."""
    row = make_row(
        pick(rng, ["LONG", "SHORT", "SKIP"]),
        int(rng.integers(30, 51)),
        int(rng.integers(10**6)),
        flags=bool(rng.random() < 0.5),
        features={"a": float(rng.normal())},
    )
    for _ in range(int(rng.integers(1, 4))):
        mutation = pick(rng, MUTATIONS)
        try:
            mutation(row, rng)
        except (AttributeError, KeyError, TypeError, IndexError):  # what an earlier one left is no row any more
            break
    line = json.dumps(row, ensure_ascii=bool(rng.random() < 0.5)).encode("utf-8", "surrogatepass")
    if rng.random() < 0.15:
        line = pick(rng, [cut, other_bytes, key_twice])(line, rng)
    return line or b"{"


def looked_at(path: Path, rows: int) -> Counter[str]:
    """Every part that looks at rows of a file looks at these; how many rows it read and refused."""
    surveyed, error = survey(WindowFile(path))
    reading = surveyed.file.report
    assert reading.rows == rows
    places = {match[1] for fault in reading.faults if (match := re.match(rf"{re.escape(str(path))}:(\d+)[:]", fault))}
    assert all(fault.startswith(f"{path}:") for fault in reading.faults), reading.faults
    assert len(places) + reading.good >= rows or reading.hidden
    assert (error is None) == (reading.fault_total == 0)
    windows = list(surveyed.file)
    kinds = {window.kind for window in windows}
    if len(kinds) == 1:
        fitter = CodecFitter()
        for window in windows:
            fitter.add(window)
        for kind in ("compact", "json"):
            try:
                codec = fitter.fit(kind)
            except DataError:
                assert kinds == {"features"}  # rows without a feature in common
                break
            assert len(list(codec.render_all(windows))) == len(windows)
        else:
            assert codec.rows in kinds
        if kinds == {"window"}:
            table = window_inputs(windows, codec)
            assert not np.isinf(table).any()
    if windows:
        assert len(assign_blocks(surveyed.positions).block_N) == len(windows)
        labels_N = np.zeros(len(windows), dtype=np.int64)
        json.dumps(confident_mistakes(surveyed.file.take, labels_N, np.tile([0.2, 0.5, 0.3], (len(windows), 1))))
        assert all(row_notices({"rows": surveyed}))
        with suppress(ConfigError):  # rows without a place, or a class
            walk_forward(surveyed, 2)
    report = check_files({"train": path, "val": path})
    assert json.dumps(report)
    assert report["fault_total"] >= reading.fault_total
    return Counter(read=reading.good, refused=rows - reading.good)


@pytest.mark.promise("E7")
def test_any_row_that_is_almost_right_is_read_or_refused_by_its_line(
    tmp_path: Path, amount: Amount, figure: Figure
) -> None:
    """Files of mutated rows alone, whose units may clash, and of good ones with one mutated row among them."""
    seen: Counter[str] = Counter()
    tried = amount(300, 10_000)
    good = [json.dumps(row).encode() for row in dated_rows(12, seed=1, apart=60)]
    for number in range(tried // ROWS_A_FILE):
        rng = np.random.default_rng(number)
        lines = [mutated(rng) for _ in range(ROWS_A_FILE)]
        path = tmp_path / "rows.jsonl"
        path.write_bytes(b"".join(line.replace(b"\n", b" ") + b"\n" for line in lines))
        seen += looked_at(path, ROWS_A_FILE)
        path.write_bytes(b"".join(line + b"\n" for line in [*good, lines[0].replace(b"\n", b" ")]))
        looked_at(path, len(good) + 1)
    assert seen["read"] > 0.1 * tried
    assert seen["refused"] > 0.3 * tried
    figure("E7", "{} mutated rows, {} of them read and {} refused", tried, seen["read"], seen["refused"])
