"""Adapters in the last quarter of the layers against adapters in all: time and macro-F1. Prints a JSON line per seed.

    python benchmarks/bench_last_layers.py                   # 3 seeds; about 6 minutes on 2 quiet CPU cores
    python benchmarks/bench_last_layers.py --rates 1e-3 3e-3 # learning rates of the last layers, each a run of its own

Each seed writes its own `ctxtrain sample` (1,200 rows to train on, 400 to choose the epoch, 1,000 to score it once) and
trains the embedded base, which has four layers, with `lora.layers` all and last:1. All sides have the demo's settings,
10 epochs, and one process; they take turns by the epoch. Seconds are those of optimizer steps and validation; for
last:1 they include the one pass of all rows through the three layers below.

ratio             seconds of all layers / seconds of the last ones, over all epochs; then of CPU seconds, which
                  neighbours on the machine disturb less
epoch_ratios      the same for the first epoch, with that one pass, and the median of the others, with the smallest and
                  the largest
macro_f1          on the test rows, at the epoch with the best macro-F1 on the validation rows
logits_agree      largest difference between validation logits from kept states and from plain transformers and PEFT
kept_mb           size of the file of states
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from ctxtrain.config.schema import Config
from ctxtrain.data.batches import collate, evaluation_batches
from ctxtrain.data.oversampling import labels_of
from ctxtrain.data.tokens import tokenise
from ctxtrain.data.window_file import load_windows
from ctxtrain.model.forward import logits
from ctxtrain.model.lora import load_trainable_state, trainable_state
from ctxtrain.synthetic.sample import write_sample
from ctxtrain.train import TrainingPipeline

TRAIN, VAL, TEST, EPOCHS = 1200, 400, 1000, 10
TRAINING = {"batch_size": 16, "gradient_accumulation": 1, "warmup_steps": 10, "epochs": EPOCHS}


class Side:
    """One run, epoch by epoch."""

    def __init__(self, folder: Path, layers: str, rate: float, seed: int) -> None:
        config = Config.parse(
            {
                "data": {"train": str(folder / "train.jsonl"), "val": str(folder / "val.jsonl")},
                "lora": {"layers": layers},
                "oversampling": {"max_repeat": 5},
                "loss": {"class_weights": "none"},
                "training": {**TRAINING, "learning_rate": rate, "seed": seed},
                "output_dir": str(folder / f"{layers}-{rate:g}".replace(":", "-")),
            }
        )
        self.run = TrainingPipeline(config)
        self.run.load_data()
        self.run.setup_model()
        self.best, self.weights = -1.0, trainable_state(self.run.learner.model)
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []

    def epoch(self) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self.run.train_epoch()
        score = self.run.evaluate()["macro_f1"]
        self.seconds.append(time.perf_counter() - wall)
        self.cpu_seconds.append(time.process_time() - cpu)
        if score > self.best:
            self.best, self.weights = score, trainable_state(self.run.learner.model)

    def score(self, test: Path) -> float:
        """Macro-F1 of the best epoch on other rows."""
        load_trainable_state(self.run.learner.model, self.weights)
        windows = load_windows(test)
        texts = list(self.run.data.codec.render_all(windows))
        self.run.data.tokens["val"] = tokenise(texts, self.run.tokenizer, 2048)
        self.run.data.labels["val"] = labels_of(windows)
        return float(self.run.evaluate()["macro_f1"])

    def logits_gap(self) -> float:
        """Between the learner's validation logits and those of the model's own forward pass."""
        learner, tokens = self.run.learner, self.run.data.tokens["val"]
        ours_NC = learner.logits(tokens, 32, lambda _: None)
        model: PeftModel = learner.model
        model.eval()
        with torch.no_grad():
            return max(
                float((logits(model, collate(tokens, rows)) - ours_NC[rows]).abs().max())
                for rows in evaluation_batches(tokens.lengths, 32)
            )

    def kept_bytes(self) -> int:
        cache = getattr(self.run.learner.engine, "frozen_cache", None)
        return os.fstat(cache.file.fileno()).st_size if cache is not None and cache.file is not None else 0


def compare(seed: int, rate: float, rates: list[float]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_sample(folder, train=TRAIN, val=VAL, test=TEST, seed=seed)
        whole, lasts = Side(folder, "all", rate, seed), [Side(folder, "last:1", each, seed) for each in rates]
        for _ in range(EPOCHS):
            for side in (whole, *lasts):
                side.epoch()
        last = lasts[0]
        gap = last.logits_gap()
        assert gap <= 1e-4, f"kept states must give the plain path's logits, they differ by {gap}"
        kept = last.kept_bytes()
        ratios = [a / b for a, b in zip(whole.seconds, last.seconds, strict=True)]
        later = sorted(ratios[1:])
        return {
            "seed": seed,
            "threads": torch.get_num_threads(),
            "ratio": round(sum(whole.seconds) / sum(last.seconds), 2),
            "cpu_ratio": round(sum(whole.cpu_seconds) / sum(last.cpu_seconds), 2),
            "epoch_ratios": [round(ratio, 2) for ratio in (ratios[0], statistics.median(later), later[0], later[-1])],
            "seconds": {"all": round(sum(whole.seconds), 1), "last": round(sum(last.seconds), 1)},
            "cpu_seconds": {"all": round(sum(whole.cpu_seconds), 1), "last": round(sum(last.cpu_seconds), 1)},
            "macro_f1": {
                "all": round(whole.score(folder / "test.jsonl"), 4),
                **{f"last, {side_rate:g}": round(side.score(folder / "test.jsonl"), 4)
                   for side_rate, side in zip(rates, lasts, strict=True)},
            },
            "logits_agree": gap,
            "kept_mb": round(kept / 1e6, 1),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of the adapters in all layers")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3], help="of those in the last layer")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    results = []
    for seed in options.seeds:
        results.append(compare(seed, options.rate, options.rates))
        print(json.dumps(results[-1]), flush=True)
    ratios = sorted(result["ratio"] for result in results)
    lost = {
        name: round(float(np.mean([r["macro_f1"]["all"] - r["macro_f1"][name] for r in results])), 4)
        for name in results[0]["macro_f1"]
        if name != "all"
    }
    print(json.dumps({"ratio": statistics.median(ratios), "spread": [ratios[0], ratios[-1]], "macro_f1_lost": lost}))


if __name__ == "__main__":
    main()
