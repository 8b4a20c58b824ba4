"""How long does the server take for a window, and how many does it answer? Prints one line of JSON.

    python benchmarks/bench_serve.py                        # 1,000 requests and three loads; 1 minute on 2 quiet cores
    python benchmarks/bench_serve.py --model final_model.zip --seconds 5

`ctxtrain serve` runs in a process of its own, as it is started by default, with an export of the embedded base (made
from a few sample windows, since speed does not depend on what was learned). Windows have 50 bars with every field.
Clients are threads of this process with one kept-alive connection each, on the same cores as the server.

latency_ms        one client, one request after the other: from sending a request to having its whole answer
inside_ms         the part of it that the server reports: from the last byte of the body to the answer
windows_a_second  of 1, 8 and 32 clients that ask on for some seconds, one window a request
windows_a_pass    how many of those the model read together, on average
batch             windows per second of one client that sends 32 rows per request
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import orjson

from ctxtrain.synthetic.sample import write_sample

CLIENTS = (1, 8, 32)
BARS = 50
WARM_UP = 50  # requests


def make_rows(folder: Path) -> list[bytes]:
    write_sample(folder, train=64, val=32, test=256, seed=0)
    rows = [orjson.loads(line) for line in (folder / "test.jsonl").read_bytes().splitlines()]
    return [orjson.dumps(row) for row in rows if len(row["context_bars"]) + 1 == BARS]


def make_model(folder: Path) -> Path:
    from ctxtrain import Config, TrainingPipeline

    data = {name: str(folder / f"{name}.jsonl") for name in ("train", "val")}
    training = {"epochs": 1, "warmup_steps": 0}
    tree = {"data": data, "model": {"base": "embedded"}, "training": training, "output_dir": str(folder / "run")}
    TrainingPipeline(Config.parse(tree)).run()
    return folder / "run" / "final_model.zip"


@contextmanager
def serving(model: Path) -> Iterator[tuple[str, int]]:
    command = [sys.executable, "-m", "ctxtrain", "serve", str(model), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = re.search(r"http://([\d.]+):(\d+)", process.stdout.readline())
        assert told, "the server did not start"
        yield told[1], int(told[2])
        process.terminate()
    assert process.returncode == 0, process.returncode


def ask(connection: http.client.HTTPConnection, path: str, body: bytes | None = None) -> bytes:
    connection.request("POST" if body else "GET", path, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer = response.read()
    assert response.status == 200, answer
    return answer


def latencies(address: tuple[str, int], rows: list[bytes], count: int) -> dict[str, dict[str, float]]:
    connection, outside, inside = http.client.HTTPConnection(*address), [], []
    for number, row in zip(range(WARM_UP + count), cycle(rows), strict=False):
        start = time.perf_counter()
        answer = ask(connection, "/predict", row)
        if number >= WARM_UP:
            outside.append(1000 * (time.perf_counter() - start))
            inside.append(orjson.loads(answer)["processing_time_ms"])
    return {"latency_ms": shares(outside), "inside_ms": shares(inside)}


def shares(values: list[float]) -> dict[str, float]:
    found = {f"p{share}": float(np.percentile(values, share)) for share in (50, 95, 99)}
    return {name: round(value, 2) for name, value in (found | {"max": max(values)}).items()}


def passes(address: tuple[str, int]) -> tuple[float, float]:
    text = ask(http.client.HTTPConnection(*address), "/metrics").decode()
    found = re.findall(r"^ctxtrain_pass_windows_(sum|count) (\S+)$", text, re.MULTILINE)
    totals = dict(found)
    return float(totals["sum"]), float(totals["count"])


def throughput(address: tuple[str, int], bodies: list[bytes], path: str, clients: int, seconds: float) -> float:
    """Requests a second."""
    counts, end = [0] * clients, time.perf_counter() + seconds

    def ask_on(client: int) -> None:
        connection = http.client.HTTPConnection(*address)
        for number in cycle(range(len(bodies))):
            if time.perf_counter() >= end:
                return
            ask(connection, path, bodies[(number + client) % len(bodies)])
            counts[client] += 1

    threads = [threading.Thread(target=ask_on, args=(client,)) for client in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="instead of one made here; it must take rows with every field")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each load")
    parser.add_argument("--repeats", type=int, default=3, help="of the loads, in turn")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = make_rows(Path(scratch))
        model = options.model or make_model(Path(scratch))
        batch = [orjson.dumps({"rows": [orjson.loads(row) for row in islice(cycle(rows), 32)]})]
        with serving(model) as address:
            found = latencies(address, rows, options.requests)
            speeds: dict[str, list[float]] = {}
            together: dict[str, list[float]] = {}
            for _ in range(options.repeats):
                for clients in CLIENTS:
                    before = passes(address)
                    speed = throughput(address, rows, "/predict", clients, options.seconds)
                    windows, count = (new - old for new, old in zip(passes(address), before, strict=True))
                    speeds.setdefault(str(clients), []).append(speed)
                    together.setdefault(str(clients), []).append(windows / count)
                batches = throughput(address, batch, "/predict/batch", 1, options.seconds)
                speeds.setdefault("batch", []).append(32 * batches)
    result = {
        "requests": options.requests,
        "bytes_a_row": round(statistics.mean(map(len, rows))),
        "cores": os.cpu_count(),
        **found,
        "windows_a_second": {name: spread(values) for name, values in speeds.items()},
        "windows_a_pass": {name: round(statistics.median(values), 1) for name, values in together.items()},
    }
    print(json.dumps(result))


def spread(values: list[float]) -> list[float]:
    """Median, smallest, largest."""
    return [round(value, 1) for value in (statistics.median(values), min(values), max(values))]


if __name__ == "__main__":
    main()
