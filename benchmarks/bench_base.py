"""How well does LoRA on a base learn from few labelled windows, against a run's baselines? Prints a Markdown table.

    python benchmarks/bench_base.py                       # the embedded base, 5 seeds; 12 minutes on 2 CPU cores
    python benchmarks/bench_base.py --sizes 100 --seeds 0 1
    python benchmarks/bench_base.py --base runs/pretrain
    python benchmarks/bench_base.py --pattern divergence  # one that the base was not made for; see patterns.py
    python benchmarks/bench_base.py --pattern flags       # the sample with its flags shown
    python benchmarks/bench_base.py --pattern features    # the same flags at the event as features, without bars
    python benchmarks/bench_base.py --bars 120            # windows of 120 bars instead of 30 to 50
    python benchmarks/bench_base.py --mirror              # LoRA and the baselines get the mirrored rows too

Each seed simulates its own `ctxtrain sample --hide-flags`: the pattern has to be read off prices, volume and delta.
Smaller sizes are random parts of the training rows, the same for all. LoRA has the specification's settings; the epoch
is chosen on the validation rows and scored once on the test rows. The baselines are those of every run, on the same
rows (`ctxtrain/evaluation/baselines.py`), and the one to beat is chosen on the validation rows too.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from patterns import PATTERNS, write_pattern
from transformers import Qwen3ForCausalLM

from ctxtrain.config.schema import Config
from ctxtrain.data.codec_fitter import fit_codec
from ctxtrain.data.oversampling import labels_of
from ctxtrain.data.row_schema import PRICES
from ctxtrain.data.tokens import tokenise
from ctxtrain.data.window_file import load_windows
from ctxtrain.evaluation.baselines import best_on_validation, fit_baselines
from ctxtrain.model.embedded import base_config, build_tokenizer
from ctxtrain.model.lora import load_trainable_state, trainable_state
from ctxtrain.pretraining.run import Architecture
from ctxtrain.synthetic.sample import write_sample
from ctxtrain.train import TrainingPipeline

TRAIN, VAL, TEST = 1200, 400, 1000
BASELINES = {
    "extra_trees": "extra trees",
    "catboost": "CatBoost",
    "gradient_boosting": "boosting",
    "logistic_regression": "logistic",
}
# Passes over the rows: a small file needs more of them for the same number of optimizer steps.
TRAINING = {"batch_size": 16, "gradient_accumulation": 1, "learning_rate": 1.0e-3, "warmup_steps": 10}
EPOCHS = {100: 10, 300: 6, 1200: 4}
Row = dict[str, Any]  # size, seed, best, and scores by name


def lora_score(folder: Path, train: Path, base: str, seed: int, size: int, *, mirror: bool) -> float:
    """Macro-F1 on the test rows, at the epoch with the best macro-F1 on the validation rows."""
    epochs = next((count for rows, count in EPOCHS.items() if size <= rows), 4)
    training = {"epochs": epochs // 2 if mirror else epochs, "seed": seed}  # a mirrored epoch has twice the rows
    run = best_run(folder, train, {"model": {"base": base}, "training": training, "augmentation": {"mirror": mirror}})
    return test_score(run, folder / "test.jsonl")


def best_run(folder: Path, train: Path, changes: Mapping[str, Mapping[str, Any]]) -> TrainingPipeline:
    """A run without checkpoints or export, trained, with the weights of its best epoch on the validation rows."""
    config = Config.parse(
        {
            "data": {"train": str(train), "val": str(folder / "val.jsonl"), **changes.get("data", {})},
            "augmentation": dict(changes.get("augmentation", {})),
            "model": dict(changes.get("model", {})),
            "training": {**TRAINING, **changes.get("training", {})},
            "output_dir": str(folder / "run"),
        }
    )
    run = TrainingPipeline(config)
    run.load_data()
    run.setup_model()
    best, weights = -1.0, None
    for _ in range(config.training.epochs):
        run.train_epoch()
        score = run.evaluate()["macro_f1"]
        if score > best:
            best, weights = score, trainable_state(run.learner.model)
    assert weights is not None
    load_trainable_state(run.learner.model, weights)
    return run


def test_score(run: TrainingPipeline, path: Path) -> float:
    """Macro-F1 of a run on the rows of a file."""
    windows = load_windows(path)
    run.data.tokens["val"] = tokenise(run.data.codec.render_all(windows), run.tokenizer, run.data.max_tokens)
    run.data.labels["val"] = labels_of(windows)
    return float(run.evaluate()["macro_f1"])


def baseline_scores(files: Mapping[str, Path], seed: int, *, mirror: bool) -> dict[str, float | str]:
    """Macro-F1 of each baseline on the test rows, and the name of the best one on the validation rows."""
    windows = {name: load_windows(path) for name, path in files.items()}
    labels = {name: labels_of(own) for name, own in windows.items()}
    found, _ = fit_baselines(windows, labels, "test", fit_codec("compact", windows["train"]), seed, mirror=mirror)
    scores = {name: baseline.scores for name, baseline in found.items()}
    return {**{name: own["macro_f1"] for name, own in scores.items()}, "best": best_on_validation(scores)}


def write_random_base(folder: str, seed: int) -> None:
    """A Qwen3 of the same sizes and tokenizer, with transformers' own random weights."""
    tokenizer = build_tokenizer()
    config = base_config(tokenizer, **Architecture().model_dump())
    torch.manual_seed(seed)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def keep_event_features(path: Path) -> None:
    """Replace the bars of each row by what is known at the event, as a labeller without bars writes it."""
    lines = []
    for line in path.read_text("utf-8").splitlines():
        row = json.loads(line)
        event = row["current_bar"]
        hour = int(event["time"][11:13])
        features = {name: value for name, value in event.items() if name not in ("time", "bar_index", *PRICES)}
        features["session"] = "Asia" if hour < 7 else "London" if hour < 13 else "NY" if hour < 21 else "Other"
        kept = {name: row[name] for name in ("id", "symbol", "timeframe", "label")}
        lines.append(json.dumps(kept | {"time": event["time"], "features": features}) + "\n")
    path.write_text("".join(lines), "utf-8")


def run_seed(
    base: str,
    random_base: str | None,
    pattern: str,
    bars: tuple[int, int],
    seed: int,
    sizes: list[int],
    *,
    mirror: bool,
) -> list[Row]:
    results: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if pattern in ("sample", "flags", "features"):
            hidden = pattern == "sample"
            write_sample(folder, train=TRAIN, val=VAL, test=TEST, seed=seed, hide_flags=hidden, bars=bars)
            for name in ("train", "val", "test") if pattern == "features" else ():
                keep_event_features(folder / f"{name}.jsonl")
        else:
            write_pattern(pattern, folder, train=TRAIN, val=VAL, test=TEST, seed=seed)
        lines = (folder / "train.jsonl").read_bytes().splitlines(keepends=True)
        for size in sizes:
            picked = np.sort(np.random.default_rng(seed).permutation(len(lines))[:size])
            part = folder / f"train_{size}.jsonl"
            part.write_bytes(b"".join(lines[row] for row in picked))
            files = {"train": part, "val": folder / "val.jsonl", "test": folder / "test.jsonl"}
            result: Row = {"size": size, "seed": seed, **baseline_scores(files, seed, mirror=mirror)}
            if base:
                result["lora"] = lora_score(folder, part, base, seed, size, mirror=mirror)
            if random_base and size == max(sizes):
                result["random"] = lora_score(folder, part, random_base, seed, size, mirror=mirror)
            print(json.dumps(result), flush=True)
            results.append(result)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="embedded", help="embedded, a folder or a hub id")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1200, 300, 100])
    parser.add_argument("--pattern", choices=["sample", "flags", "features", *PATTERNS], default="sample")
    parser.add_argument("--bars", type=int, help="bars of each window of the sample, for example 120")
    parser.add_argument("--no-random", action="store_true", help="leave the randomly initialised base out")
    parser.add_argument("--mirror", action="store_true", help="augmentation.mirror, with half of the epochs")
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time, each on one thread")
    arguments = parser.parse_args()
    bars = (arguments.bars, arguments.bars) if arguments.bars else (30, 50)
    with tempfile.TemporaryDirectory() as scratch, _workers(arguments.jobs) as pool:
        random_base = None
        if not arguments.no_random:
            random_base = str(Path(scratch) / "random")
            write_random_base(random_base, seed=0)
        one_seed = partial(
            run_seed,
            arguments.base,
            random_base,
            arguments.pattern,
            bars,
            sizes=arguments.sizes,
            mirror=arguments.mirror,
        )
        rows = [row for of_seed in pool.map(one_seed, arguments.seeds) for row in of_seed]
    columns = ["windows", "seed", "LoRA", *BASELINES.values(), "best on validation", "LoRA − best", "random base"]
    print(f"\n| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for size in arguments.sizes:
        of_size = [row for row in rows if row["size"] == size]
        for row in of_size:
            row["lead"] = row.get("lora", np.nan) - row[row["best"]]
            print(_line(str(row["seed"]), row))
        names = set.intersection(*(set(row) for row in of_size)) - {"best"}
        print(_line("mean", {name: float(np.mean([row[name] for row in of_size])) for name in names}))


def _workers(count: int) -> ProcessPoolExecutor:
    # Small models gain little from a second thread, and two busy ones beside a neighbour lose much.
    return ProcessPoolExecutor(count, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,))


def _line(title: str, row: Row) -> str:
    scores = [f"{row.get(name, np.nan):.3f}" for name in ("lora", *BASELINES)]
    best = BASELINES.get(row["best"], row["best"]) if "best" in row else ""
    cells = [f"{int(row['size']):,}", title, *scores, best, f"{row['lead']:+.3f}"]
    return f"| {' | '.join(cells)} | {row['random']:.3f} |" if "random" in row else f"| {' | '.join(cells)} | |"


if __name__ == "__main__":
    main()
