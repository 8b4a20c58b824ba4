"""Do the 95 % intervals of a run cover the truth 95 times in 100? Simulated scores with a known truth; prints a table.

    python benchmarks/bench_coverage.py                        # 1,000 data sets a setting; some minutes on 2 CPU cores
    python benchmarks/bench_coverage.py --sets 300 --out coverage.json

A setting has its rows, blocks and class mix. In a block (a session) the mix of classes and the model's leaning to one
class are its own, so that rows of a block resemble each other; the truth is each score over blocks without end
(4,000,000 rows). The baseline reads the same rows with less signal and half of the model's noise. Beside the product's
intervals stand the usual two from 2,000 plain draws of blocks: percentile, and BCa (Efron 1987) with a jackknife.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax
from scipy.stats import norm

from ctxtrain.evaluation.bootstrap import REPLICATES, block_sums, difference_intervals, score_intervals
from ctxtrain.evaluation.metric_formulas import ScoredRows, confusion_scores, log_losses
from ctxtrain.labels import LABELS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SCORES = (
    "accuracy", "macro_f1", *(f"{label} precision" for label in LABELS), *(f"{label} recall" for label in LABELS),
    "nll", "brier", "difference",
)  # fmt: skip
EVEN, RARE = (0.35, 0.35, 0.30), (0.12, 0.08, 0.80)
TRUTH_ROWS = 4_000_000
LOWEST, HIGHEST = 0.92, 0.98


@dataclass(frozen=True)
class Setting:
    """`own` is the standard deviation of a block's own class mix and leaning, on the logit scale."""

    rows: int
    blocks: int
    mix: tuple[float, float, float]
    own: float = 0.7
    signal: float = 2.0
    baseline_signal: float = 1.4

    @property
    def name(self) -> str:
        kind = "even" if self.mix == EVEN else "rare"
        return f"{self.rows} rows, {'independent' if self.blocks == self.rows else f'{self.blocks} blocks'}, {kind}"


def independent(rows: int, mix: tuple[float, float, float]) -> Setting:
    return Setting(rows, rows, mix, own=0.0)


REALISTIC = [
    *(independent(rows, mix) for rows in (120, 400, 1000) for mix in (EVEN, RARE)),
    *(Setting(rows, blocks, mix) for rows, blocks in ((120, 30), (400, 60), (1000, 40)) for mix in (EVEN, RARE)),
]
FEW = [Setting(400, blocks, mix) for blocks in (3, 5, 8, 10, 12, 15, 20) for mix in (EVEN, RARE)]


def simulate(setting: Setting, rng: np.random.Generator, times: int = 1) -> tuple[ScoredRows, ScoredRows, Ints]:
    """Model, baseline and block numbers of `times` data sets of the setting, one after another."""
    sizes = [block_sizes(setting, rng) for _ in range(times)]
    block_N = np.repeat(np.arange(setting.blocks * times), np.concatenate(sizes))
    shape_G, shape_N = (setting.blocks * times, len(LABELS)), (len(block_N), len(LABELS))
    mix_GC = softmax(np.log(setting.mix) + rng.normal(0, setting.own, shape_G), axis=1)
    labels_N = (rng.random((len(block_N), 1)) > mix_GC[block_N].cumsum(axis=1)[:, :-1]).sum(axis=1)
    shared_NC = rng.normal(0, np.sqrt(0.5), shape_N)
    judged = []
    for signal in (setting.signal, setting.baseline_signal):
        logits_NC = signal * np.eye(len(LABELS))[labels_N] + 0.7 * np.log(setting.mix)
        logits_NC += shared_NC + rng.normal(0, np.sqrt(0.5), shape_N) + rng.normal(0, setting.own, shape_G)[block_N]
        predicted_NC = np.eye(len(LABELS))[logits_NC.argmax(axis=1)]
        judged.append(ScoredRows(labels_N, softmax(logits_NC, axis=1), predicted_NC, log_losses(logits_NC, labels_N)))
    return judged[0], judged[1], block_N


def block_sizes(setting: Setting, rng: np.random.Generator) -> Ints:
    """Uneven sizes that add up to the rows, each at least 1."""
    shares = rng.gamma(4.0, 1.0, setting.blocks)
    return 1 + rng.multinomial(setting.rows - setting.blocks, shares / shares.sum())


def scores_of(sums_RK: Floats) -> Floats:
    """`SCORES` from summed columns of model and baseline, of shape (…, scores)."""
    model, other = np.split(sums_RK, 2, axis=-1)
    found, base = (confusion_scores(half[..., :9].reshape(*half.shape[:-1], 3, 3)) for half in (model, other))
    means = model[..., 10:12] / model[..., 9:10]
    overall = np.stack([found["accuracy"], found["macro_f1"]], axis=-1)
    difference = (found["macro_f1"] - base["macro_f1"])[..., None]
    return np.concatenate([overall, found["precision"], found["recall"], means, difference], axis=-1)


def truth_of(setting: Setting) -> Floats:
    total, times = 0.0, 20
    for part in range(times):
        rng = np.random.default_rng([part, 99])
        model, other, block_N = simulate(setting, rng, TRUTH_ROWS // setting.rows // times)
        one = np.zeros_like(block_N)
        total = total + np.concatenate([block_sums(model, one), block_sums(other, one)], axis=1)[0]
    return scores_of(np.asarray(total))


def product(model: ScoredRows, other: ScoredRows, block_N: Ints, seed: int) -> Floats:
    """The intervals of a run, of shape (2, scores); unknown is everything."""
    found = score_intervals(model, block_N, seed)
    shares = [found["per_class"][label][name] for name in ("precision", "recall") for label in LABELS]
    difference = difference_intervals(model, other, block_N, seed)["macro_f1"]["interval"]
    ends = [found["accuracy"], found["macro_f1"], *shares, found["nll"], found["brier"], difference]
    return np.array([(-np.inf, np.inf) if pair is None else pair for pair in ends]).T


def plain(model: ScoredRows, other: ScoredRows, block_N: Ints, seed: int) -> tuple[Floats, Floats]:
    """Percentile and BCa intervals from draws of whole blocks."""
    sums_GK = np.concatenate([block_sums(model, block_N), block_sums(other, block_N)], axis=1)
    count = len(sums_GK)
    draws_RG = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), REPLICATES)
    found_R, value = scores_of(draws_RG.astype(float) @ sums_GK), scores_of(sums_GK.sum(axis=0))
    left_out_G = scores_of(sums_GK.sum(axis=0) - sums_GK)
    off_G = left_out_G.mean(axis=0) - left_out_G
    squares = np.maximum((off_G**2).sum(axis=0), 1e-12)
    speed = (off_G**3).sum(axis=0) / (6 * squares**1.5)
    below = (found_R < value).mean(axis=0) + (found_R == value).mean(axis=0) / 2
    bias = norm.ppf(np.clip(below, 0.001, 0.999))
    ends = []
    for z in norm.ppf([0.025, 0.975]):
        level = norm.cdf(bias + (bias + z) / (1 - speed * (bias + z)))
        ends.append([np.quantile(found_R[:, i], level[i]) for i in range(len(SCORES))])
    return np.quantile(found_R, [0.025, 0.975], axis=0), np.array(ends)


def cover(setting: Setting, sets: int, compare: bool = True) -> dict[str, Any]:
    """Shares of data sets whose intervals hold the truth, by method and score."""
    truth = truth_of(setting)
    hits: dict[str, list[Any]] = {"product": [], "percentile": [], "BCa": []}
    widths = []
    for number in range(sets):
        model, other, block_N = simulate(setting, np.random.default_rng([number, 7]))
        ours = product(model, other, block_N, number)
        widths.append(np.where(np.isfinite(ours).all(axis=0), ours[1] - ours[0], np.nan))
        methods = {"product": ours}
        if compare:
            methods["percentile"], methods["BCa"] = plain(model, other, block_N, number)
        for name, (low, high) in methods.items():
            hits[name].append((low <= truth) & (truth <= high))
    result: dict[str, Any] = {"setting": setting.name, "sets": sets, "truth": dict(zip(SCORES, truth, strict=True))}
    result["width"] = dict(zip(SCORES, np.nanmean(widths, axis=0), strict=True))
    for name, of_method in hits.items():
        if of_method:
            result[name] = dict(zip(SCORES, np.mean(of_method, axis=0), strict=True))
    return result


def table(results: list[dict[str, Any]], method: str) -> str:
    short = [*SCORES[:2], "P L", "P S", "P K", "R L", "R S", "R K", "NLL", "Brier", "Δ F1"]
    lines = [f"| {method} | {' | '.join(short)} |", "|---" * (len(short) + 1) + "|"]
    for result in results:
        cells = [f"{100 * result[method][name]:.1f}" for name in SCORES]
        lines.append(f"| {result['setting']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=1000, help="simulated data sets a setting")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--jobs", type=int, default=2, help="settings at a time, each on one thread")
    arguments = parser.parse_args()
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
        results = list(pool.map(partial(cover, sets=arguments.sets), [*REALISTIC, *FEW]))
    realistic, few = results[: len(REALISTIC)], results[len(REALISTIC) :]
    for method in ("product", "percentile", "BCa"):
        print(f"{table(realistic, method)}\n")
    print(f"{table(few, 'product')}\n")
    outside = [
        (r["setting"], name, round(r["product"][name], 3))
        for r in realistic
        for name in SCORES
        if not LOWEST <= r["product"][name] <= HIGHEST
    ]
    print(f"outside {LOWEST:.0%} to {HIGHEST:.0%}: {outside or 'none'} of {len(realistic) * len(SCORES)} cells")
    if arguments.out:
        arguments.out.write_text(json.dumps({"settings": results}, indent=1))


if __name__ == "__main__":
    main()
