"""Anonymous memory of reading, checking and tokenising a file of windows, for files of growing numbers of rows.

    python benchmarks/check_memory.py                              # 10,000 and 100,000 rows
    python benchmarks/check_memory.py --rows 10000 100000 1000000  # about an hour, and 6 GB of disk

Each file has windows of 30 bars that share none, one market, labels at random. A process of its own calls
`load_dataset`, as `ctxtrain train` does, and looks every 20 ms at `RssAnon` of /proc/self/status: the memory that is
neither a file's nor shared. Linux only. Prints a JSON line a file:

peak_mb       largest anonymous memory while reading, less what the imports and the tokenizer took before
bytes_a_row   how that grew from the file before, by row
seconds       of `load_dataset`
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

BARS = 30
LABELS = ("LONG", "SHORT", "SKIP")


def lines(rows: int, seed: int) -> Iterator[str]:
    rng = np.random.default_rng(seed)
    start, price = datetime(2000 + 10 * seed, 1, 3, tzinfo=UTC), 2000.0
    for number in range(rows):
        moves = rng.normal(0, 0.5, size=(BARS, 4)).round(2)
        bars = []
        for place, (gap, move, up, down) in enumerate(moves.tolist()):
            opened, closed = price + gap, price + gap + move
            when = start + timedelta(minutes=number * BARS + place)
            bars.append(
                f'{{"time":"{when:%Y-%m-%dT%H:%M:%SZ}","open":{opened:.2f},"close":{closed:.2f},'
                f'"high":{max(opened, closed) + abs(up):.2f},"low":{min(opened, closed) - abs(down):.2f},'
                f'"volume":{100 + place * 7 + number % 90}}}'
            )
            price = 2000 + (closed - 2000) * 0.99
        facts = f'"id":"r{seed}-{number}","label":"{LABELS[int(rng.integers(3))]}"'
        yield f'{{{facts},"context_bars":[{",".join(bars[:-1])}],"current_bar":{bars[-1]}}}\n'


def anonymous_mb() -> float:
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) / 1024


def read(pipe: Any, train: str, val: str) -> None:
    from ctxtrain.data.dataset import Inputs, load_dataset
    from ctxtrain.data.window_file import WindowFile
    from ctxtrain.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("embedded", None)
    peak, before, over = 0.0, anonymous_mb(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.02):
            peak = max(peak, anonymous_mb())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start = time.perf_counter()
    data = load_dataset(
        Inputs({"train": WindowFile(train), "val": WindowFile(val)}),
        tokenizer,
        codec="compact",
        max_tokens=512,
        oversampling="none",
        max_repeat=None,
        weights="none",
        purge=True,
    )
    seconds = time.perf_counter() - start
    over.set()
    watcher.join()
    pipe.send({"rows": len(data.names["train"]), "peak_mb": max(peak, anonymous_mb()) - before, "seconds": seconds})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    options = parser.parse_args()
    context, last = multiprocessing.get_context("spawn"), None
    with tempfile.TemporaryDirectory() as scratch:
        val = Path(scratch) / "val.jsonl"
        val.write_text("".join(lines(1000, seed=2)))
        for rows in options.rows:
            train = Path(scratch) / "train.jsonl"
            with train.open("w") as stream:
                stream.writelines(lines(rows, seed=1))
            mine, theirs = context.Pipe()
            process = context.Process(target=read, args=(theirs, str(train), str(val)))
            process.start()
            theirs.close()
            found = mine.recv()
            process.join()
            found |= {"megabytes": round(train.stat().st_size / 1e6), "peak_mb": round(found["peak_mb"], 1)}
            if last:
                grown = (found["peak_mb"] - last["peak_mb"]) * 2**20
                found["bytes_a_row"] = round(grown / (found["rows"] - last["rows"]))
            print(json.dumps(found | {"seconds": round(found["seconds"], 1)}), flush=True)
            last = found


if __name__ == "__main__":
    main()
