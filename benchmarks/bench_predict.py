"""Answers for many windows: ours against transformers' text-classification pipeline. Prints one line of JSON.

    python benchmarks/bench_predict.py                       # 2,000 windows; 4 minutes on 2 quiet CPU cores
    python benchmarks/bench_predict.py --windows 300         # where the machine is busy

Both sides answer the same texts with the embedded base and a random head, in float32, each in a process of its own, and
take turns. The head's weights are the same on both sides; ours has the environment that our command line sets.

ours  `Predictor` from windows in memory to lines of JSON: rendering, tokenising, the model, softmax, JSON.
peer  `pipeline("text-classification", top_k=None)` from the rendered texts to JSON, so it is spared the rendering. Its
      batch size is the fastest of some, each tried on a part of the texts beforehand.
floor our texts, then each operator of the formula once for as many tokens, on blocks of rows that stay in a cache, each
      thread with batches of its own. Nothing is padded, gathered or copied, and no JSON is made; but what the operators
      read is filled in within the time, so it is an estimate of the least, not a bound.

ratio             median over the rounds of peer's seconds / our seconds, with the smallest and the largest
cpu_ratio         the same of CPU seconds, which neighbours on the machine disturb less, and which choose the batch size
ratio_of_floor    median over the rounds of peer's seconds / the floor's
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
import torch.nn.functional as F
from sides import our_environment
from torch import Tensor

from ml.data.codec import Codec, fit_codec
from ml.data.rows import Window
from ml.data.windows import load_windows
from ml.labels import LABELS
from ml.model.answers import equal_batches
from ml.model.attention import LANES, SCORES_AT_A_TIME, turn
from ml.model.embedded import embedded_base
from ml.model.passes import add_times, inverse_rms, times
from ml.model.qwen import load_classifier, load_tokenizer
from ml.output.predictor import Predictor
from ml.runtime import side_by_side
from ml.sample import write_sample

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
TOKENS, ROWS = 12288, 2048  # of a batch of the floor and of a block of it, as ours has at this width
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


def floor_side(count: int) -> dict[str, Any]:
    windows, codec = make_windows(count)
    model = load_classifier(str(embedded_base()), 0).eval()
    predictor = Predictor(model, load_tokenizer("embedded"), codec, 1.0, 2048)

    def answer() -> bytes:
        lengths_N = predictor.tokenise(windows).lengths
        workers = torch.get_num_threads()
        each = -(-int(lengths_N.sum()) // (TOKENS * workers)) * workers
        with side_by_side(workers) as run:
            for _ in run(lambda rows: operators(model, lengths_N[rows]), equal_batches(lengths_N, each)):
                pass
        return b""

    return {"answer": answer}


@torch.inference_mode()
def operators(model: Any, lengths_B: np.ndarray) -> None:
    """Those that the formula asks for, whatever the code: what goes into them is of the right shape, and means nothing.

    Norms' weights are in those of the layers behind them, and what the first layer reads is made per token.
    """
    config, tokens = model.config, int(lengths_B.mean())
    x_ND, mixed_ND = (torch.full((int(lengths_B.sum()), config.hidden_size), 0.01) for _ in range(2))
    turns_1C = torch.ones(1, config.head_dim // 2, dtype=torch.complex64)
    *layers, last = model.model.layers

    def read(x_MD: Tensor, *linears: Any) -> list[Tensor]:
        x_MD = x_MD * inverse_rms(x_MD, config.rms_norm_eps)
        return [times(x_MD, linear.weight) for linear in linears]

    def turned(x_ME: Tensor) -> None:
        x_MHP = x_ME.view(len(x_ME), -1, config.head_dim)
        x_MHP.mul_(inverse_rms(x_MHP, config.rms_norm_eps))
        turn(x_MHP, turns_1C)

    for number, layer in enumerate(layers):
        own, mlp = layer.self_attn, layer.mlp
        if number:
            for block_MD in x_ND.split(ROWS):
                q_ME, k_ME, _ = read(block_MD, own.q_proj, own.k_proj, own.v_proj)
                turned(q_ME)
                turned(k_ME)
        attend(len(lengths_B), config.num_key_value_heads, own.num_key_value_groups, tokens, config.head_dim)
        for block_MD, mixed_MD in zip(x_ND.split(ROWS), mixed_ND.split(ROWS), strict=True):
            add_times(block_MD, mixed_MD, own.o_proj.weight)
            gate_MF, up_MF = read(block_MD, mlp.gate_proj, mlp.up_proj)
            add_times(block_MD, F.silu(gate_MF, inplace=True).mul_(up_MF), mlp.down_proj.weight)
    for block_MD in x_ND.split(ROWS):
        turned(read(block_MD, last.self_attn.k_proj, last.self_attn.v_proj)[0])


def attend(windows: int, heads: int, shared: int, tokens: int, width: int) -> None:
    """With the queries that share keys in one product, for as few tokens at a time as fill a vector."""
    together = max(1, SCORES_AT_A_TIME // (heads * shared * tokens * LANES))
    for first in range(0, windows, together):
        pairs = heads * min(together, windows - first)
        q, mixed = (np.full((pairs, tokens * shared, width), 0.01, dtype=np.float32) for _ in range(2))
        k = v = np.full((pairs, tokens, width), 0.01, dtype=np.float32)
        for start in range(0, tokens, LANES):
            stop = min(tokens, start + LANES)
            own, mask = slice(start * shared, stop * shared), torch.zeros((stop - start) * shared, stop - start)
            scores = torch.empty(pairs, own.stop - own.start, stop)
            np.matmul(q[:, own], k[:, :stop].mT, out=scores.numpy())
            scores[..., start:] += mask
            weights = torch.softmax(scores, dim=-1, out=scores).numpy()
            np.matmul(weights, v[:, :stop], out=mixed[:, own])


def live(pipe: Any, side: str, count: int, threads: int) -> None:
    """Build one side and answer each order with its seconds, by the clock and of the CPU, and its result."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    calls = {"ours": our_side, "peer": peer_side, "floor": floor_side}[side](count)
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
    for side in ("ours", "peer", "floor"):
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
    ask("floor", "answer")
    gap = float(np.abs(answers[0] - answers[1]).max())
    assert gap <= 1e-5, f"the two sides must give the same answers, they differ by {gap}"
    turns = (("ours", "answer"), ("peer", "answer"), ("floor", "answer"), ("ours", "text"))
    rounds = [[ask(*turn) for turn in turns] for _ in range(options.repeats)]
    for pipe in pipes.values():
        pipe.send("end")
    ratios, cpu_ratios = (sorted(peer[kind] / ours[kind] for ours, peer, *_ in rounds) for kind in (0, 1))
    seconds = [round(statistics.median(side[0] for side in column), 2) for column in zip(*rounds, strict=True)]
    ours, peer, _, text = (statistics.median(side[1] for side in column) for column in zip(*rounds, strict=True))
    result = {
        "windows": options.windows,
        "threads": options.threads,
        "rounds": options.repeats,
        "ratio": round(statistics.median(ratios), 2),
        "ratio_spread": [round(ratios[0], 2), round(ratios[-1], 2)],
        "cpu_ratio": round(statistics.median(cpu_ratios), 2),
        "cpu_ratio_spread": [round(cpu_ratios[0], 2), round(cpu_ratios[-1], 2)],
        "ratio_of_floor": round(statistics.median(peer[0] / floor[0] for _, peer, floor, _ in rounds), 2),
        "seconds": dict(zip(("ours", "peer", "floor"), seconds, strict=False)),
        "windows_per_cpu_second": {"ours": round(options.windows / ours), "peer": round(options.windows / peer)},
        "parts": {"text": round(text, 3), "all": round(ours, 3)},
        "batch_sizes": {size: round(speed) for size, speed in speeds.items()},
        "answers_agree": gap,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
