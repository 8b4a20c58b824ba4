"""What do the baselines of a run cost, and what do the short cuts in them? Prints two Markdown tables.

    OMP_NUM_THREADS=1 python benchmarks/bench_baselines.py

CPU time of this process (`time.process_time`), on `ctxtrain sample` with all flags shown, where windows have the most
numbers: computing those once, then each baseline fitted without class weights and with them, and its answers. All of
them are to take less than 15 seconds at 1,200 training windows. The second table holds CatBoost's 63 borders a column
against its default of 254, macro-F1 on 400 test rows, flags shown and hidden.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from catboost import CatBoostClassifier
from numpy.typing import NDArray
from sklearn.metrics import f1_score

from ctxtrain.data.codec import Codec
from ctxtrain.data.codec_fitter import fit_codec
from ctxtrain.data.oversampling import labels_of
from ctxtrain.data.parse_window import Window
from ctxtrain.data.window_file import load_windows
from ctxtrain.evaluation.baseline_inputs import window_inputs
from ctxtrain.evaluation.baselines import fit_baselines
from ctxtrain.synthetic.sample import write_sample

NAMES = ("logistic_regression", "gradient_boosting", "extra_trees", "catboost")
BORDERS = (63, 254)
Splits = tuple[dict[str, list[Window]], dict[str, NDArray[np.int64]], Codec]


def sample(rows: int, seed: int, *, hide_flags: bool) -> Splits:
    with tempfile.TemporaryDirectory() as folder:
        write_sample(Path(folder), train=rows, val=400, test=400, seed=seed, hide_flags=hide_flags)
        windows = {name: load_windows(Path(folder) / f"{name}.jsonl") for name in ("train", "val", "test")}
    return windows, {name: labels_of(own) for name, own in windows.items()}, fit_codec("compact", windows["train"])


def seconds(rows: int) -> list[float]:
    """CPU seconds of the numbers, of each baseline without them, and of all together."""
    windows, labels, codec = sample(rows, 0, hide_flags=False)
    start = time.process_time()
    for own in windows.values():
        window_inputs(own, codec)
    inputs = time.process_time() - start
    found = [inputs]
    for names in (*([name] for name in NAMES), None):
        start = time.process_time()
        fit_baselines(windows, labels, "test", codec, 0, names)
        found.append(time.process_time() - start - (inputs if names else 0))
    return found


def borders(seed: int, *, hide_flags: bool) -> list[tuple[float, float]]:
    """Macro-F1 and CPU seconds for each of `BORDERS`; the other settings are the baseline's."""
    windows, labels, codec = sample(1200, seed, hide_flags=hide_flags)
    tables = {name: window_inputs(own, codec) for name, own in windows.items()}
    found = []
    for count in BORDERS:
        model = CatBoostClassifier(
            iterations=400,
            depth=5,
            learning_rate=0.06,
            rsm=0.3,
            border_count=count,
            random_seed=seed,
            thread_count=1,
            allow_writing_files=False,
            logging_level="Silent",
        )
        start = time.process_time()
        model.fit(tables["train"], labels["train"])
        took = time.process_time() - start
        called = model.predict_proba(tables["test"]).argmax(axis=1)
        found.append((float(f1_score(labels["test"], called, average="macro")), took))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1200, 300, 100])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    arguments = parser.parse_args()
    print(f"| windows | numbers | {' | '.join(NAMES)} | all, s |\n{'|---' * (3 + len(NAMES))}|")
    for rows in arguments.sizes:
        print(f"| {rows:,} | {' | '.join(f'{took:.1f}' for took in seconds(rows))} |")
    print(f"\n| flags | borders | macro-F1, mean of {len(arguments.seeds)} | standard error | s |\n{'|---' * 5}|")
    for hide_flags in (False, True):
        found = np.array([borders(seed, hide_flags=hide_flags) for seed in arguments.seeds])
        for count, own in zip(BORDERS, found.transpose(1, 2, 0), strict=True):
            error = own[0].std(ddof=1) / np.sqrt(len(own[0])) if len(own[0]) > 1 else np.nan
            which = "hidden" if hide_flags else "shown"
            print(f"| {which} | {count} | {own[0].mean():.3f} | {error:.3f} | {own[1].mean():.1f} |")


if __name__ == "__main__":
    main()
