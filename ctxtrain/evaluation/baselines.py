"""Six baselines that need no Qwen, scored on the rows that the model is scored on.

Input: windows and labels of the splits. Output: a `Baseline` each, with its scores and its `ScoredRows` for paired
comparison. Everything is fitted on the training rows and depends on the seed alone.

majority               predicts the most common training class; its probabilities are the class shares of training
class_prior            random predictions with the class shares of training; scores are expectations, not one draw
logistic_regression    scikit-learn's, on standardised features of the windows (`baseline_inputs.py`)
gradient_boosting      scikit-learn's histogram gradient boosting, on the same features
extra_trees            scikit-learn's extremely randomised trees (Geurts, Ernst, Wehenkel 2006), on the same features
catboost               CatBoost (Prokhorenkova et al. 2018), on the same features

The last four are fitted with and without class weights; the variant with the better macro-F1 on the validation rows is
kept, just as the run selects its epoch. The baseline to beat is selected on the validation rows too: selected by its
score on the test rows, it would look better than it is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, xlog1py, xlogy
from threadpoolctl import threadpool_limits

from ctxtrain.data.codec import Codec
from ctxtrain.data.mirror import labels_with_twins, mirrored
from ctxtrain.data.parse_window import Window
from ctxtrain.evaluation.baseline_inputs import window_inputs
from ctxtrain.evaluation.baseline_models import CLASSIFIERS, FitFailed
from ctxtrain.evaluation.metric_formulas import ScoredRows
from ctxtrain.evaluation.metrics import METRICS, FromColumnSums, class_scores, macro_f1
from ctxtrain.labels import LABELS
from ctxtrain.runtime import thread_count

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MIN_PROBABILITY = 1e-6  # a classifier may predict 0, and one such row would make the mean loss infinite
NO_BARS_REASON = "text rows have no bars to compute features from"
WITHOUT_INPUT = ("majority", "class_prior")
VARIANTS = ("none", "balanced")  # class weights
TRAINED = ("logistic_regression", "gradient_boosting", "extra_trees", "catboost")  # simplest first


@dataclass(frozen=True)
class Baseline:
    """Scores of one baseline, and the rows they were computed from.

    `scores` holds the metrics of `_baseline_scores`, `validation_macro_f1`, which selects the baseline to beat, and
    `class_weights` of the variant that was kept; None where there are no variants.
    """

    scores: dict[str, Any]
    scored_rows: ScoredRows


def fit_baselines(
    windows: Mapping[str, Iterable[Window]],
    labels: Mapping[str, Ints],
    split: str,
    codec: Codec,
    seed: int,
    only: Collection[str] | None = None,
    *,
    mirror: bool = False,
) -> tuple[dict[str, Baseline], dict[str, str]]:
    """Baselines scored on `split`, and the reasons why others are left out, by name.

    They read the fields that `codec` reads. The order is simplest first, so that the simpler one wins a tie. `only`
    restricts the names; None fits all. With `mirror`, the trained ones are fitted on the mirrored training rows too.
    """
    shares_C = np.bincount(labels["train"], minlength=len(LABELS)) / len(labels["train"])
    baselines = {name: _input_free_baseline(name, shares_C, labels, split) for name in _selected(WITHOUT_INPUT, only)}
    trained = _selected(TRAINED, only)
    if codec.kind == "text" or not trained:
        return baselines, dict.fromkeys(trained, NO_BARS_REASON)
    tables = {name: window_inputs(windows[name], codec) for name in {"train", "val", split}}
    if mirror:
        twins_NF = window_inputs(map(mirrored, windows["train"]), codec)
        tables["train"] = np.concatenate([tables["train"], twins_NF])
        labels = {**labels, "train": labels_with_twins(labels["train"])}
    known = ~np.isnan(tables["train"]).all(axis=0)
    tables = {name: table[:, known] for name, table in tables.items()}
    left_out = {}
    # On tables this small, threads within one fit only wait for each other; several fits at a time do not.
    with threadpool_limits(1), ThreadPoolExecutor(thread_count(), "baseline") as pool:

        def fit(name: str, how: str) -> Future[Baseline]:  # keeps no model: 500 trees are large
            model = CLASSIFIERS[name](how == "balanced", seed, len(labels["train"]))
            return pool.submit(_fit_variant, model, how, tables, labels, split)

        fits = {name: [fit(name, how) for how in VARIANTS] for name in trained}
        for name, variants in fits.items():
            try:
                baselines[name] = _better_variant([variant.result() for variant in variants])
            except FitFailed as error:
                left_out[name] = str(error)
    return baselines, left_out


def best_on_validation(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """The name of the baseline to beat; of equal ones the first, which is the simplest."""
    return max(scores, key=lambda name: float(scores[name]["validation_macro_f1"]))


def pool_baseline(runs: Sequence[Baseline]) -> Baseline:
    """One baseline over the scored rows of several runs together.

    `validation_macro_f1` is the mean over runs. Scores of random predictions come from their expected confusion matrix.
    """
    columns = ([getattr(run.scored_rows, field.name) for run in runs] for field in fields(ScoredRows))
    pooled = ScoredRows(*(np.concatenate(column) for column in columns))
    validation_macro_f1 = float(np.mean([run.scores["validation_macro_f1"] for run in runs]))
    return Baseline(
        {**_baseline_scores(pooled), "validation_macro_f1": validation_macro_f1, "class_weights": None}, pooled
    )


def expected_random_scores(labels_N: Ints, shares_C: Floats) -> dict[str, Any]:
    """Exact expected scores of predicting class c for each row with probability q_c = `shares_C[c]`.

    Of N rows, n_c are of class c. The number M predicted as c is binomial(N, q_c). Given M, the expected number of
    correct ones is M n_c / N (hypergeometric). So precision is n_c / N where M > 0, recall is q_c, and F1 is the mean
    of (2 M n_c / N) / (M + n_c). A class that is never predicted has precision 0.
    """
    rows = len(labels_N)
    counts_C = np.bincount(labels_N, minlength=len(LABELS))
    predicted_M = np.arange(rows + 1)
    per_class = {}
    for label, count, share in zip(LABELS, counts_C.tolist(), shares_C.tolist(), strict=True):
        probability_M = _binomial(predicted_M, rows, share)
        f1_M = 2 * predicted_M * count / rows / np.maximum(predicted_M + count, 1)
        per_class[label] = {
            "precision": count / rows * (1 - float(probability_M[0])),
            "recall": share if count else 0.0,
            "f1": float(probability_M @ f1_M),
            "support": count,
        }
    return {
        "accuracy": float(counts_C @ shares_C) / rows,
        "macro_f1": float(np.mean([scores["f1"] for scores in per_class.values()])),
        "per_class": per_class,
    }


def _binomial(hits_M: Ints, rows: int, share: float) -> Floats:
    """The probability of each number of hits in `rows` draws; importing scipy.stats for it would take a second."""
    log_ways = gammaln(rows + 1) - gammaln(hits_M + 1) - gammaln(rows - hits_M + 1)
    probabilities: Floats = np.exp(log_ways + xlogy(hits_M, share) + xlog1py(rows - hits_M, -share))
    return probabilities


def count_variants(names: Iterable[str]) -> int:
    """The number of trained models that validation selects from, two for each trained baseline; at least 1."""
    return max(1, 2 * len(set(names) - set(WITHOUT_INPUT)))


def _selected(names: Iterable[str], only: Collection[str] | None) -> list[str]:
    return [name for name in names if only is None or name in only]


def _input_free_baseline(name: str, shares_C: Floats, labels: Mapping[str, Ints], split: str) -> Baseline:
    """`majority` or `class_prior`."""
    predicted_C = shares_C if name == "class_prior" else np.eye(len(LABELS))[shares_C.argmax()]
    scored, validation = (
        _score_rows(labels_N, np.tile(shares_C, (len(labels_N), 1)), np.tile(predicted_C, (len(labels_N), 1)))
        for labels_N in (labels[split], labels["val"])
    )
    scores, validation_macro_f1 = _baseline_scores(scored), _macro_f1(validation)
    if name == "class_prior":
        scores |= expected_random_scores(labels[split], shares_C)
        validation_macro_f1 = expected_random_scores(labels["val"], shares_C)["macro_f1"]
    return Baseline({**scores, "validation_macro_f1": validation_macro_f1, "class_weights": None}, scored)


def _fit_variant(
    model: Any, weights: str, tables: Mapping[str, Floats], labels: Mapping[str, Ints], split: str
) -> Baseline:
    """Fit and score a classifier; `weights` names its class weights."""
    model.fit(tables["train"], labels["train"])
    validation, scored = (
        _score_probabilities(labels[name], model.predict_proba(tables[name])) for name in ("val", split)
    )
    scores = {**_baseline_scores(scored), "validation_macro_f1": _macro_f1(validation), "class_weights": weights}
    return Baseline(scores, scored)


def _better_variant(variants: Sequence[Baseline]) -> Baseline:
    """The variant with the better macro-F1 on the validation rows; of equal ones the first."""
    return max(variants, key=lambda variant: float(variant.scores["validation_macro_f1"]))


def _score_probabilities(labels_N: Ints, probabilities_NC: Floats) -> ScoredRows:
    """Rows predicted as their most probable class."""
    probabilities_NC = np.maximum(probabilities_NC, MIN_PROBABILITY)
    probabilities_NC /= probabilities_NC.sum(axis=1, keepdims=True)
    return _score_rows(labels_N, probabilities_NC, np.eye(len(LABELS))[probabilities_NC.argmax(axis=1)])


def _score_rows(labels_N: Ints, probabilities_NC: Floats, predicted_NC: Floats) -> ScoredRows:
    losses_N = -np.log(np.maximum(probabilities_NC[np.arange(len(labels_N)), labels_N], MIN_PROBABILITY))
    return ScoredRows(labels_N, probabilities_NC, predicted_NC, losses_N)


def _baseline_scores(scored: ScoredRows) -> dict[str, Any]:
    """Metrics of a baseline, with `FromColumnSums` metrics only if they are in the "baselines" view.

    A calibration error needs bins of confidence, and the two baselines without input have one confidence for all rows.
    """
    metrics = [m for m in METRICS if not isinstance(m.measure, FromColumnSums) or "baselines" in m.views]
    return {
        **{metric.name: metric.measure.value(scored) for metric in metrics},
        "per_class": class_scores(scored),
    }


def _macro_f1(scored: ScoredRows) -> float:
    return float(macro_f1(scored.confusion()))
