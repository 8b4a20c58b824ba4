"""Rows and windows, built small and valid; a test changes what it is about."""

import hashlib
import json
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ctxtrain.data.json_rows import line_rows
from ctxtrain.data.parse_report import ParseReport, parse_rows
from ctxtrain.data.parse_window import Window, parse_row
from ctxtrain.data.window_file import WindowFile
from ctxtrain.model.base_config import HEAD

Row = dict[str, Any]

PULSES = (
    "ext_bos", "ext_choch", "ext_choch_up", "ext_choch_down", "int_bos", "int_choch", "sweep_prev_high",
    "sweep_prev_low", "fvg_retest",
)  # fmt: skip
DRIFT = {"LONG": 1.0, "SHORT": -1.0, "SKIP": 0.0}


def make_row(
    label: str = "LONG",
    bars: int = 30,
    seed: int = 0,
    *,
    drift: float = 0.0,
    delta: bool = True,
    flags: bool = True,
    place: bool = True,
    **changes: Any,
) -> Row:
    """A valid window row: `bars` M1 bars, current_bar included, that walk on a tick grid of 0.25 around 2000.

    `drift` is the mean move of a bar in points; `delta` brings delta, `flags` the structure flags and atr_14, `place`
    bar_index and time. `changes` are fields of the row, such as id, features or label_reason.
    """
    rng = np.random.default_rng(seed)
    ticks = np.rint(4 * (drift + rng.normal(0, 1, bars)))
    closes = 2000 + ticks.cumsum() / 4
    opens = closes - ticks / 4
    highs = np.maximum(opens, closes) + rng.integers(0, 5, bars) / 4
    lows = np.minimum(opens, closes) - rng.integers(0, 5, bars) / 4
    rows: list[Row] = []
    for i in range(bars):
        bar: Row = {"open": opens[i], "high": highs[i], "low": lows[i], "close": closes[i]}
        bar = {name: float(price) for name, price in bar.items()}
        bar["volume"] = int(rng.integers(50, 500))
        if place:
            bar |= {"bar_index": 1000 + i, "time": f"2025-03-03T{10 + i // 60:02d}:{i % 60:02d}:00Z"}
        if delta:
            bar["delta"] = int(rng.integers(-50, 50))
        if flags:
            bar |= {name: bool(rng.random() < 0.1) for name in PULSES}
            bar |= {"ext_dir": int(rng.integers(-1, 2)), "int_dir": int(rng.integers(-1, 2))}
            bar |= {name: bool(rng.random() < 0.5) for name in ("fvg_up", "fvg_down", "pb_wave_strength_ok")}
            bar |= {"mgann_leg_index": int(rng.integers(1, 11)), "wave_strength": float(rng.integers(0, 101))}
            bar["atr_14"] = 2.5
        rows.append(bar)
    row = {"id": f"row-{seed}", "symbol": "GC", "context_bars": rows[:-1], "current_bar": rows[-1], "label": label}
    return row | changes


def learnable_rows(count: int, seed: int, bars: int = 30) -> list[Row]:
    """Rows whose label is learnable: LONG drifts up, SHORT down, SKIP not; three, three and four in ten."""
    rng = np.random.default_rng(seed)
    few = round(0.3 * count)
    labels = rng.permutation(["LONG"] * few + ["SHORT"] * few + ["SKIP"] * (count - 2 * few)).tolist()
    return [
        make_row(label, bars, seed * 100_000 + i, drift=DRIFT[label], flags=False) for i, label in enumerate(labels)
    ]


def dated_rows(count: int, seed: int, apart: int) -> list[Row]:
    """Learnable rows whose events lie `apart` minutes from each other; a window has 30 of them."""
    rows = learnable_rows(count, seed)
    start = np.datetime64("2025-03-03T00:00:00")
    for n, row in enumerate(rows):
        for place, bar in enumerate(bars_of(row)):
            bar["bar_index"] = apart * n + place
            bar["time"] = f"{start + np.timedelta64(60 * (apart * n + place), 's')}Z"
    return rows


def write_rows(path: Path, rows: Iterable[object]) -> Path:
    """One JSON line per row; text is written as it is, as a line of its own."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def bars_of(row: Row) -> list[Row]:
    """All bars of a window row, oldest first, to read or to change in place."""
    return [*row["context_bars"], row["current_bar"]]


def make_window(row: Row | None = None) -> Window:
    """The window of a row that must be valid."""
    window, reasons = parse_row(row or make_row(), "rows.jsonl:1", labelled=False)
    assert window is not None, reasons
    return window


def read(lines: Iterable[bytes], *, labelled: bool = True) -> ParseReport:
    """What a walk through the lines of a file finds."""
    reading = ParseReport("rows.jsonl")
    rows = line_rows(lines, reading.notices)
    assert len(list(parse_rows(rows, reading, labelled=labelled))) == reading.good
    return reading


VERBS = "loading reading checking scoring predicting training exporting simulating pretraining writing"
PROGRESS = tuple(f"{verb} " for verb in VERBS.split(" "))


def without_progress(stderr: str) -> str:
    """Standard error less the lines that say what a command is doing."""
    return "".join(line for line in stderr.splitlines(keepends=True) if not line.startswith(PROGRESS))


def errors(stderr: str) -> list[str]:
    """The lines of an error without their prefix; the others say what a command is doing, or are notes."""
    lines = without_progress(stderr).splitlines()
    assert all(line.startswith(("error: ", "note: ")) for line in lines), stderr
    return [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]


def walk(path: Path) -> ParseReport:
    """What a walk through a file finds."""
    file = WindowFile(path)
    assert len(list(file)) == file.report.good
    return file.report


def threads_of_a_new_thread() -> int:
    """How many threads torch has in a thread that starts now."""
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]


def frozen_sha256(model: torch.nn.Module) -> str:
    """SHA-256 over name, dtype, shape and bytes of every frozen weight except PEFT's unused copy of the head."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        if not weight.requires_grad and f"{HEAD}.original_module" not in name:
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
            digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
