"""All that is said about a model on the rows that judge it: intervals, baselines, targets, sureness and mistakes.

Comes in: rows, places and labels of the splits, the exported model's logits and scores on one of them. Goes out: plain
values for `training_summary.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctxtrain.data.codec import Codec
from ctxtrain.data.positions import Places
from ctxtrain.data.window_file import WindowFile
from ctxtrain.evaluation.baselines import best_on_validation, fit_baselines, variants
from ctxtrain.evaluation.blocks import FEWEST_BLOCKS, blocks_of
from ctxtrain.evaluation.bootstrap import LEVEL, REPLICATES, score_intervals
from ctxtrain.evaluation.comparison import compare
from ctxtrain.evaluation.metrics import Metrics
from ctxtrain.evaluation.scores import Judged
from ctxtrain.evaluation.selective import Threshold, abstain, confidence_histogram, least_confidences, risk_coverage
from ctxtrain.evaluation.targets import judge
from ctxtrain.evaluation.worst_errors import confident_mistakes
from ctxtrain.labels import LABELS


def assess(
    files: Mapping[str, WindowFile],
    places: Mapping[str, Places],
    labels: Mapping[str, NDArray[np.int64]],
    split: str,
    *,
    codec: Codec,
    logits_NC: NDArray[np.float64],
    temperature: float,
    metrics: Metrics,
    targets: Mapping[str, float],
    thresholds: Mapping[str, Threshold],
    seed: int,
) -> dict[str, Any]:
    """`targets`, `intervals`, `baselines`, `selective` and `mistakes` of the model on `split`.

    `logits_NC` are uncalibrated, and `metrics` were computed from them with the temperature.
    """
    labels_N, blocks = labels[split], blocks_of(places[split])
    model = Judged.of_logits(logits_NC, labels_N, temperature)
    probabilities_NC = model.probabilities_NC
    scores = score_intervals(model, blocks.block_N, seed)
    found, left_out = fit_baselines(files, labels, split, codec, seed)
    best = best_on_validation({name: baseline.scores for name, baseline in found.items()})
    looks = variants(found) if split == "val" else 1
    return {
        "targets": judge(metrics, targets, scores, trusted=blocks.trusted),
        "intervals": {
            "level": LEVEL,
            "method": f"block bootstrap of {REPLICATES:,} replicates, weights from Exp(1); see docs/trust.md",
            "rows": split,
            "blocks": blocks.count,
            "block": blocks.note,
            "trusted": blocks.trusted,
            "doubt": blocks.doubt,
            "fewest_blocks": FEWEST_BLOCKS,
            "scores": scores,
        },
        "baselines": {
            "rows": split,
            "left_out": left_out,
            **compare(model, metrics, found, best, blocks.block_N, trusted=blocks.trusted, seed=seed, looks=looks),
        },
        "selective": {
            "rows": split,
            **risk_coverage(probabilities_NC, labels_N),
            "histogram": confidence_histogram(probabilities_NC, labels_N),
            "thresholds": dict(thresholds),
            "with_thresholds": _kept(probabilities_NC, labels_N, thresholds),
        },
        "mistakes": confident_mistakes(files[split].take, labels_N, probabilities_NC),
    }


def _kept(
    probabilities_NC: NDArray[np.float64], labels_N: NDArray[np.int64], thresholds: Mapping[str, Threshold]
) -> dict[str, Any]:
    """What the stored thresholds do on these rows: calls of each class that are kept, and their precision."""
    least = {label: threshold["min_confidence"] for label, threshold in thresholds.items()}
    called_N, abstained_N = abstain(probabilities_NC, least_confidences(least))
    kept: dict[str, Any] = {"abstained": int(abstained_N.sum())}
    for label in thresholds:
        own_N = called_N == LABELS.index(label)
        right = int((labels_N[own_N] == LABELS.index(label)).sum())
        calls = int(own_N.sum())
        kept[label] = {"calls": calls, "precision": right / calls if calls else None}
    return kept
