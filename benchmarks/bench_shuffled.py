"""What does the demo's config claim where there is nothing to learn? Prints a Markdown table and a verdict.

    python benchmarks/bench_shuffled.py                   # 10 seeds; about a quarter of an hour on 2 CPU cores
    python benchmarks/bench_shuffled.py --seeds 0 1

Each seed runs `ctxtrain sample --shuffle-labels` and `ctxtrain train configs/demo.yaml`, test rows included, in
processes of their own. A target that a run calls met is then held against chance: with the run's own predictions,
how often do randomly ordered test labels meet it? A classifier that says LONG to almost every window has a LONG recall
near 1, and chance allows that; a precision of 0.6 it does not. Beyond chance is what happens less often than 0.05
divided by the number of targets judged (Bonferroni).

Exits with 1 if a target is met beyond chance, or if a run that misses targets does not say so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ctxtrain.labels import LABELS

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"
ORDERS = 10_000
LEVEL = 0.05


def run_seed(seed: int, overrides: list[str]) -> dict[str, Any]:
    """Summary and last words of one run on labels that mean nothing."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _ctxtrain("sample", scratch, "--shuffle-labels", "--seed", str(seed))
        files = [f"data.{name}={folder / name}.jsonl" for name in ("train", "val", "test")]
        said = _ctxtrain(
            "train", str(CONFIG), *files, f"output_dir={folder / 'run'}", f"training.seed={seed}", *overrides
        )
        summary = json.loads((folder / "run" / "training_summary.json").read_text(encoding="utf-8"))
    missed = [target["metric"] for target in summary["targets"] if not target["met"]]
    return {
        "seed": seed,
        "macro_f1": summary["test"]["macro_f1"],
        "accuracy": summary["test"]["accuracy"],
        "confusion": summary["test"]["confusion"],
        "met": {target["metric"]: target["target"] for target in summary["targets"] if target["met"]},
        "says_missed": f"{len(missed)} of {len(summary['targets'])} targets missed on" in said,
        "targets": len(summary["targets"]),
    }


def _ctxtrain(*arguments: str) -> str:
    command = [sys.executable, "-m", "ctxtrain", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout + done.stderr


def chance_of(metric: str, least: float, confusion: list[list[int]], rng: np.random.Generator) -> float:
    """Share of random orders of the labels in which these predictions score at least `least`."""
    counts, classes = np.array(confusion), np.arange(len(LABELS))
    labels, predicted = np.repeat(classes, counts.sum(axis=1)), np.repeat(classes, counts.sum(axis=0))
    cells = [rng.permutation(labels) * len(classes) + predicted for _ in range(ORDERS)]
    tables = np.stack([np.bincount(cell, minlength=len(classes) ** 2).reshape(counts.shape) for cell in cells])
    hits = int((_scores(metric, tables) >= least).sum())
    return (hits + 1) / (ORDERS + 1)  # never 0, as the order at hand is one of them


def _scores(metric: str, tables: Any) -> Any:
    """A target's metric of confusion tables, of shape (orders, labels, predictions)."""
    right, of_label, of_guess = np.diagonal(tables, axis1=1, axis2=2), tables.sum(axis=2), tables.sum(axis=1)
    if metric == "accuracy":
        return right.sum(axis=1) / tables.sum(axis=(1, 2))
    if metric == "macro_f1":
        return (2 * right / np.maximum(of_label + of_guess, 1)).mean(axis=1)
    label, _, score = metric.partition("_")
    c = LABELS.index(label.upper())
    return right[:, c] / np.maximum((of_guess if score == "precision" else of_label)[:, c], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time; set OMP_NUM_THREADS so that they fit")
    parser.add_argument("overrides", nargs="*", help="section.key=value, as for ctxtrain train")
    arguments = parser.parse_args()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        runs = list(pool.map(partial(run_seed, overrides=arguments.overrides), arguments.seeds))
    judged = sum(run["targets"] for run in runs)
    silent = [run["seed"] for run in runs if len(run["met"]) < run["targets"] and not run["says_missed"]]
    beyond = []
    print(
        "| seed | test accuracy | test macro-F1 | targets met, and how often chance meets them | says that it missed |"
    )
    print("|---|---|---|---|---|")
    for run in runs:
        rng = np.random.default_rng(run["seed"])
        chances = {name: chance_of(name, least, run["confusion"], rng) for name, least in run["met"].items()}
        beyond += [(run["seed"], name) for name, chance in chances.items() if chance < LEVEL / judged]
        met = ", ".join(f"{name} ({chance:.2g})" for name, chance in chances.items()) or "none"
        said = "yes" if run["says_missed"] else "no"
        print(f"| {run['seed']} | {run['accuracy']:.3f} | {run['macro_f1']:.3f} | {met} | {said} |")
    print(f"\n{judged} targets judged, {len(beyond)} met beyond chance: {beyond}; runs that do not say so: {silent}")
    sys.exit(bool(beyond or silent))


if __name__ == "__main__":
    main()
