"""Macro-F1 with the compact text and with JSON: same windows, model, LoRA and optimizer steps. Prints JSON.

    python benchmarks/bench_codec.py                 # 5 seeds; half an hour on 2 CPU cores, nearly all of it for JSON

Each seed simulates its own `ctxtrain sample` and trains the embedded base on it twice, with `data.codec` compact and
json. The embedded base reads at most 2,048 tokens, so of a window's JSON it sees the newest bars only, as a user's own
run with `model.max_tokens` at its default does; and it was pre-trained on the compact text. So this says what the codec
is worth to who uses this package, and not what JSON would be worth to a large Qwen with a long context.

difference   macro-F1 on 400 test rows, compact minus json, at the epoch that is best on the validation rows
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench_base import best_run, test_score

from ctxtrain.synthetic.sample import write_sample


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args(arguments)
    differences = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_sample(folder, train=options.windows, val=100, test=400, seed=seed)
            scores = {}
            for codec in ("compact", "json"):
                changes = {"data": {"codec": codec}, "training": {"epochs": options.epochs, "seed": seed}}
                run = best_run(folder, folder / "train.jsonl", changes)
                scores[codec] = test_score(run, folder / "test.jsonl")
        differences.append(scores["compact"] - scores["json"])
        print(json.dumps({"seed": seed} | {name: round(score, 3) for name, score in scores.items()}), flush=True)
    print(
        json.dumps(
            {
                "windows": options.windows,
                "epochs": options.epochs,
                "difference": round(statistics.median(differences), 3),
                "difference_spread": [round(min(differences), 3), round(max(differences), 3)],
            }
        )
    )


if __name__ == "__main__":
    main()
