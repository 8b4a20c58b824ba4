"""What a run is measured against: four answers that need no Qwen, on the rows that the run is judged on.

Comes in: windows and labels of the splits. Goes out: a `Baseline` each, with scores and, for comparison row by row, a
`Judged`. Everything is fitted on the training rows and fixed by the seed.

majority               calls every row the commonest training class; its probabilities are the training shares
class_prior            calls each class at random, as often as it is in training; scores are expectations, not a draw
logistic_regression    scikit-learn's, on standardised numbers of the windows (`inputs.py`)
gradient_boosting      scikit-learn's histogram boosting, on the same numbers

The last two are fitted with and without class weights, and the better macro-F1 on the validation rows is kept, as the
run's epoch is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from ml.data.codec import Codec
from ml.data.rows import Window
from ml.evaluation.inputs import input_names, window_inputs
from ml.evaluation.intervals import Judged
from ml.evaluation.metrics import confusion_scores, squared_errors
from ml.labels import LABELS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LEAST_PROBABILITY = 1e-6  # a trained classifier may say 0, and one such row would make the likelihood infinite
TEXT_ROWS = "the rows are text, and there are no bars to compute numbers from"


@dataclass(frozen=True)
class Baseline:
    """`scores` has accuracy, macro_f1, nll, brier and per_class."""

    scores: dict[str, Any]
    judged: Judged


def fit_baselines(
    windows: Mapping[str, Iterable[Window]], labels: Mapping[str, Ints], split: str, codec: Codec, seed: int
) -> tuple[dict[str, Baseline], dict[str, str]]:
    """Baselines judged on `split`, and why others are left out; they read the fields that `codec` reads."""
    train_N, labels_N = labels["train"], labels[split]
    shares_C = np.bincount(train_N, minlength=len(LABELS)) / len(train_N)
    called = {"majority": np.eye(len(LABELS))[shares_C.argmax()], "class_prior": shares_C}
    found = {
        name: _baseline(labels_N, np.tile(shares_C, (len(labels_N), 1)), np.tile(called_C, (len(labels_N), 1)))
        for name, called_C in called.items()
    }
    found["class_prior"].scores.update(expected_random_scores(labels_N, shares_C))
    makers: dict[str, Callable[[str | None], Any]] = {
        "logistic_regression": _logistic_regression,
        "gradient_boosting": lambda weights: _gradient_boosting(weights, seed),
    }
    if codec.kind == "text":
        return found, dict.fromkeys(makers, TEXT_ROWS)
    flags, features = input_names(codec)
    tables = {name: window_inputs(windows[name], flags, features) for name in {"train", "val", split}}
    known = ~np.isnan(tables["train"]).all(axis=0)
    tables = {name: table[:, known] for name, table in tables.items()}
    for name, make in makers.items():
        with threadpool_limits(1):  # on tables this small a second thread only makes the first one wait
            fitted = [make(weights).fit(tables["train"], train_N) for weights in (None, "balanced")]
        choice = max(fitted, key=lambda model: _macro_f1(labels["val"], model.predict(tables["val"])))
        probabilities_NC = np.maximum(choice.predict_proba(tables[split]), LEAST_PROBABILITY)
        probabilities_NC /= probabilities_NC.sum(axis=1, keepdims=True)
        found[name] = _baseline(labels_N, probabilities_NC, np.eye(len(LABELS))[probabilities_NC.argmax(axis=1)])
    return found, {}


def expected_random_scores(labels_N: Ints, shares_C: Floats) -> dict[str, Any]:
    """Expected scores of calling each row class c with chance `shares_C[c]`, whatever the row; exact.

    Of N rows n_c are of class c. The number M called c is binomial(N, q_c); given M, the right ones are on average
    M n_c / N (hypergeometric). So precision is n_c / N where M > 0, recall q_c, and F1 the mean of 2 M n_c / N over
    M + n_c. A class never called has precision 0.
    """
    rows = len(labels_N)
    counts_C = np.bincount(labels_N, minlength=len(LABELS))
    called_M = np.arange(rows + 1)
    per_class = {}
    for label, count, share in zip(LABELS, counts_C.tolist(), shares_C.tolist(), strict=True):
        chance_M = binom.pmf(called_M, rows, share)
        f1_M = 2 * called_M * count / rows / np.maximum(called_M + count, 1)
        per_class[label] = {
            "precision": count / rows * (1 - float(chance_M[0])),
            "recall": share if count else 0.0,
            "f1": float(chance_M @ f1_M),
            "support": count,
        }
    return {
        "accuracy": float(counts_C @ shares_C) / rows,
        "macro_f1": float(np.mean([scores["f1"] for scores in per_class.values()])),
        "per_class": per_class,
    }


def _baseline(labels_N: Ints, probabilities_NC: Floats, called_NC: Floats) -> Baseline:
    losses_N = -np.log(np.maximum(probabilities_NC[np.arange(len(labels_N)), labels_N], LEAST_PROBABILITY))
    scores = confusion_scores(np.eye(len(LABELS))[labels_N].T @ called_NC)
    counts_C = np.bincount(labels_N, minlength=len(LABELS))
    per_class = {
        label: {name: float(scores[name][c]) for name in ("precision", "recall", "f1")} | {"support": int(counts_C[c])}
        for c, label in enumerate(LABELS)
    }
    return Baseline(
        {
            "accuracy": float(scores["accuracy"]),
            "macro_f1": float(scores["macro_f1"]),
            "nll": float(losses_N.mean()),
            "brier": float(squared_errors(probabilities_NC, labels_N).mean()),
            "per_class": per_class,
        },
        Judged(labels_N, probabilities_NC, called_NC, losses_N),
    )


def _macro_f1(labels_N: Ints, called_N: Ints) -> float:
    return float(confusion_scores(np.eye(len(LABELS))[labels_N].T @ np.eye(len(LABELS))[called_N])["macro_f1"])


def _logistic_regression(weights: str | None) -> Any:
    # A tenth of scikit-learn's default C: some 150 numbers on some hundred rows want the stronger penalty.
    return make_pipeline(
        SimpleImputer(),
        StandardScaler(),
        LogisticRegression(C=0.1, max_iter=1000, class_weight=weights),
    )


def _gradient_boosting(weights: str | None, seed: int) -> Any:
    # Small trees on a third of the columns each, with 63 bins: the scores of the defaults, in a tenth of their time.
    return HistGradientBoostingClassifier(
        max_leaf_nodes=8, max_features=0.3, max_bins=63, class_weight=weights, random_state=seed, early_stopping=False
    )
