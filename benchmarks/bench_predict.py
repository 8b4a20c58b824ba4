"""Answers for many windows: ours against transformers' text-classification pipeline. Prints one line of JSON.

    python benchmarks/bench_predict.py                       # 2,000 windows; 4 minutes on 2 quiet CPU cores
    python benchmarks/bench_predict.py --windows 300         # where the machine is busy

Both sides answer the same texts with the embedded base and a random head, in float32, each in a process of its own, and
take turns. The head's weights are the same on both sides; ours has the environment that our command line sets.

ours  `Predictor` from windows in memory to lines of JSON: rendering, tokenising, the model, softmax, JSON.
peer  `pipeline("text-classification", top_k=None)` from the rendered texts to JSON, so it is spared the rendering. Its
      batch size is the fastest of some, each tried on a part of the texts beforehand.

ratio             median over the rounds of peer's seconds / our seconds, with the smallest and the largest
cpu_ratio         the same of CPU seconds, which neighbours on the machine disturb less, and which choose the batch size
answers_agree     largest difference of a probability
batch_sizes       windows per CPU second of the peer for each batch size that was tried
parts             our CPU seconds for rendering and tokenising alone, and for all
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from sides import our_environment

from ctxtrain.data.codec import Codec
from ctxtrain.data.codec_fitter import fit_codec
from ctxtrain.data.parse_window import Window
from ctxtrain.data.window_file import load_windows
from ctxtrain.export.predictor import Predictor
from ctxtrain.labels import LABELS
from ctxtrain.model.base import load_classifier
from ctxtrain.model.embedded import embedded_base
from ctxtrain.model.tokenizer import load_tokenizer
from ctxtrain.synthetic.sample import write_sample

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
TRIED = 200  # windows, or a fifth of them, for each batch size


def make_windows(count: int) -> tuple[list[Window], Codec]:
    with tempfile.TemporaryDirectory() as folder:
        write_sample(Path(folder), train=count, val=10, test=10, seed=0)
        windows = load_windows(Path(folder) / "train.jsonl")
    return windows, fit_codec("compact", windows)


def our_side(count: int) -> dict[str, Any]:
    windows, codec = make_windows(count)
    tokenizer = load_tokenizer("embedded")
    predictor = Predictor(load_classifier(str(embedded_base()), 0), tokenizer, codec, 1.0, 2048)

    def answer() -> bytes:
        return b"".join(orjson.dumps(line) for line in predictor.predict_windows(windows))

    def text() -> None:
        predictor.tokenise(windows)

    return {"answer": answer, "text": text}


def peer_side(count: int) -> dict[str, Any]:
    from transformers import pipeline

    windows, codec = make_windows(count)
    texts = list(codec.render_all(windows))
    model = load_classifier(str(embedded_base()), 0).eval()
    pipe = pipeline("text-classification", model=model, tokenizer=load_tokenizer("embedded"), device="cpu")
    speeds: dict[int, float] = {}

    def choose() -> dict[int, float]:
        part = texts[: min(TRIED, count // 5)]
        for size in BATCH_SIZES * 2:
            start = time.process_time()
            pipe(part, batch_size=size, top_k=None)
            speeds[size] = max(len(part) / (time.process_time() - start), speeds.get(size, 0.0))
        return speeds

    def answer() -> bytes:
        best = max(speeds, key=speeds.__getitem__)
        found = [{one["label"]: one["score"] for one in each} for each in pipe(texts, batch_size=best, top_k=None)]
        return b"".join(orjson.dumps({"probabilities": each}) for each in found)

    return {"answer": answer, "choose": choose}


def live(pipe: Any, side: str, count: int, threads: int) -> None:
    """Build one side and answer each order with its seconds, by the clock and of the CPU, and its result."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    calls = {"ours": our_side, "peer": peer_side}[side](count)
    while (order := pipe.recv()) != "end":
        start, cpu = time.perf_counter(), time.process_time()
        result = calls[order]()
        pipe.send((time.perf_counter() - start, time.process_time() - cpu, result))


def probabilities(answer: bytes) -> np.ndarray:
    lines = orjson.loads(b"[" + answer.replace(b"}{", b"},{") + b"]")
    return np.array([[line["probabilities"][label] for label in LABELS] for line in lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    context, pipes = get_context("spawn"), {}
    for side in ("ours", "peer"):
        pipes[side], theirs = context.Pipe()
        arguments = (theirs, side, options.windows, options.threads)
        with nullcontext() if side == "peer" else our_environment():
            context.Process(target=live, args=arguments, daemon=True).start()
        theirs.close()  # so that the end of a process ends the waiting for its answer

    def ask(side: str, order: str) -> Any:
        pipes[side].send(order)
        return pipes[side].recv()

    speeds = ask("peer", "choose")[2]
    answers = [probabilities(ask(side, "answer")[2]) for side in ("ours", "peer")]
    gap = float(np.abs(answers[0] - answers[1]).max())
    assert gap <= 1e-5, f"the two sides must give the same answers, they differ by {gap}"
    turns = (("ours", "answer"), ("peer", "answer"), ("ours", "text"))
    rounds = [[ask(*turn) for turn in turns] for _ in range(options.repeats)]
    for pipe in pipes.values():
        pipe.send("end")
    ratios, cpu_ratios = (sorted(peer[kind] / ours[kind] for ours, peer, _ in rounds) for kind in (0, 1))
    seconds = [round(statistics.median(side[0] for side in column), 2) for column in zip(*rounds, strict=True)]
    ours, peer, text = (statistics.median(side[1] for side in column) for column in zip(*rounds, strict=True))
    result = {
        "windows": options.windows,
        "threads": options.threads,
        "rounds": options.repeats,
        "ratio": round(statistics.median(ratios), 2),
        "ratio_spread": [round(ratios[0], 2), round(ratios[-1], 2)],
        "cpu_ratio": round(statistics.median(cpu_ratios), 2),
        "cpu_ratio_spread": [round(cpu_ratios[0], 2), round(cpu_ratios[-1], 2)],
        "seconds": dict(zip(("ours", "peer"), seconds, strict=False)),
        "windows_per_cpu_second": {"ours": round(options.windows / ours), "peer": round(options.windows / peer)},
        "parts": {"text": round(text, 3), "all": round(ours, 3)},
        "batch_sizes": {size: round(speed) for size, speed in speeds.items()},
        "answers_agree": gap,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
