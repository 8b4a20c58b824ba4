"""The scores of the exported model on one split: targets, intervals, baselines, selective prediction and mistakes.

Input: rows, positions and labels of the splits, and the exported model's logits and scores on one of them. Output:
plain values for `training_summary.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctxtrain.data.codec import Codec
from ctxtrain.data.positions import WindowPositions
from ctxtrain.data.window_file import WindowFile
from ctxtrain.evaluation.baselines import best_on_validation, count_variants, fit_baselines
from ctxtrain.evaluation.blocks import MIN_BLOCKS, assign_blocks
from ctxtrain.evaluation.bootstrap import LEVEL, NO_INTERVALS, REPLICATES, score_intervals
from ctxtrain.evaluation.comparison import compare
from ctxtrain.evaluation.metric_formulas import ScoredRows
from ctxtrain.evaluation.metrics import Metrics
from ctxtrain.evaluation.selective import (
    Threshold,
    abstain,
    confidence_histogram,
    min_confidence_by_class,
    risk_coverage,
)
from ctxtrain.evaluation.targets import evaluate_targets
from ctxtrain.evaluation.worst_errors import confident_mistakes
from ctxtrain.labels import LABELS


def score_export(
    files: Mapping[str, WindowFile],
    positions: Mapping[str, WindowPositions],
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
    mirror: bool = False,
) -> dict[str, Any]:
    """`targets`, `intervals`, `baselines`, `selective` and `mistakes` of the model on `split`.

    `logits_NC` are uncalibrated; `metrics` are their calibrated scores. With `mirror`, baselines get mirrored rows too.
    """
    labels_N, blocks = labels[split], assign_blocks(positions[split])
    model = ScoredRows.from_logits(logits_NC, labels_N, temperature)
    probabilities_NC = model.probabilities_NC
    scores = score_intervals(model, blocks.block_N, seed) if blocks.trusted else NO_INTERVALS
    baselines, left_out = fit_baselines(files, labels, split, codec, seed, mirror=mirror)
    best = best_on_validation({name: baseline.scores for name, baseline in baselines.items()})
    return {
        "targets": evaluate_targets(metrics, targets, scores),
        "intervals": {
            "level": LEVEL,
            "method": f"block bootstrap of {REPLICATES:,} replicates, weights from Exp(1); see docs/trust.md",
            "rows": split,
            "blocks": blocks.count,
            "block": blocks.note,
            "trusted": blocks.trusted,
            "doubt": blocks.doubt,
            "fewest_blocks": MIN_BLOCKS,
            "scores": scores,
        },
        "baselines": {
            "rows": split,
            "left_out": left_out,
            **compare(
                model,
                metrics,
                baselines,
                best,
                blocks,
                seed=seed,
                candidate_count=count_variants(baselines) if split == "val" else 1,
            ),
        },
        "selective": {
            "rows": split,
            **risk_coverage(probabilities_NC, labels_N),
            "histogram": confidence_histogram(probabilities_NC, labels_N),
            "thresholds": dict(thresholds),
            "with_thresholds": _apply_thresholds(probabilities_NC, labels_N, thresholds),
        },
        "mistakes": confident_mistakes(files[split].take, labels_N, probabilities_NC),
    }


def _apply_thresholds(
    probabilities_NC: NDArray[np.float64], labels_N: NDArray[np.int64], thresholds: Mapping[str, Threshold]
) -> dict[str, Any]:
    """The effect of the thresholds: number of rows that abstain, kept predictions of each class and their precision."""
    min_confidences = {label: threshold["min_confidence"] for label, threshold in thresholds.items()}
    predicted_N, abstained_N = abstain(probabilities_NC, min_confidence_by_class(min_confidences))
    result: dict[str, Any] = {"abstained": int(abstained_N.sum())}
    for label in thresholds:
        kept_N = predicted_N == LABELS.index(label)
        correct = int((labels_N[kept_N] == LABELS.index(label)).sum())
        kept = int(kept_N.sum())
        result[label] = {"calls": kept, "precision": correct / kept if kept else None}
    return result
