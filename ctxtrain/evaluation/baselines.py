"""What a run is measured against: six answers that need no Qwen, on the rows that the run is judged on.

Comes in: windows and labels of the splits. Goes out: a `Baseline` each, with scores and, for comparison row by row, a
`Judged`. Everything is fitted on the training rows and fixed by the seed.

majority               calls every row the commonest training class; its probabilities are the training shares
class_prior            calls each class at random, as often as it is in training; scores are expectations, not a draw
logistic_regression    scikit-learn's, on standardised numbers of the windows (`baseline_inputs.py`)
gradient_boosting      scikit-learn's histogram boosting, on the same numbers
extra_trees            scikit-learn's extremely randomised trees (Geurts, Ernst, Wehenkel 2006), on the same numbers
catboost               CatBoost (Prokhorenkova et al. 2018), on the same numbers

The last four are fitted with and without class weights, and the better macro-F1 on the validation rows is kept, as the
run's epoch is. The one to beat is chosen on the validation rows too: chosen by its score on the rows that judge, it
would be flattered by the choice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, xlog1py, xlogy
from threadpoolctl import threadpool_limits

from ctxtrain.data.codec import Codec
from ctxtrain.data.parse_window import Window
from ctxtrain.evaluation.baseline_inputs import input_names, window_inputs
from ctxtrain.evaluation.metrics import METRICS, OwnSums, class_scores, macro_f1
from ctxtrain.evaluation.scores import Judged
from ctxtrain.labels import LABELS

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LEAST_PROBABILITY = 1e-6  # a trained classifier may say 0, and one such row would make the likelihood infinite
TEXT_ROWS = "the rows are text, and there are no bars to compute numbers from"
WITHOUT_INPUT = ("majority", "class_prior")
TRAINED = ("logistic_regression", "gradient_boosting", "extra_trees", "catboost")  # from the simplest on


@dataclass(frozen=True)
class Baseline:
    """`scores` has the metrics of `_scores` and per_class; `validation_macro_f1`, which chooses the one to beat;
    and `class_weights` of the variant that was kept, None where there are no variants.
    """

    scores: dict[str, Any]
    judged: Judged


def fit_baselines(
    windows: Mapping[str, Iterable[Window]],
    labels: Mapping[str, Ints],
    split: str,
    codec: Codec,
    seed: int,
    only: Collection[str] | None = None,
) -> tuple[dict[str, Baseline], dict[str, str]]:
    """Baselines judged on `split`, and why others are left out; they read the fields that `codec` reads.

    From the simplest on, so that a tie goes to the simpler one. `only` names those that are wanted, else all are.
    """
    shares_C = np.bincount(labels["train"], minlength=len(LABELS)) / len(labels["train"])
    found = {name: _without_input(name, shares_C, labels, split) for name in _wanted(WITHOUT_INPUT, only)}
    makers = _wanted(TRAINED, only)
    if codec.kind == "text" or not makers:
        return found, dict.fromkeys(makers, TEXT_ROWS)
    from ctxtrain.evaluation.baseline_models import MAKERS, NotFitted  # scikit-learn takes seconds to import

    flags, features = input_names(codec)
    tables = {name: window_inputs(windows[name], flags, features) for name in {"train", "val", split}}
    known = ~np.isnan(tables["train"]).all(axis=0)
    tables = {name: table[:, known] for name, table in tables.items()}
    left_out = {}
    for name in makers:
        try:
            found[name] = _trained(MAKERS[name], tables, labels, split, seed)
        except NotFitted as error:
            left_out[name] = str(error)
    return found, left_out


def best_on_validation(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """The baseline to beat; of equal ones the first, which is the simpler one."""
    return max(scores, key=lambda name: float(scores[name]["validation_macro_f1"]))


def pooled(runs: Sequence[Baseline]) -> Baseline:
    """What one baseline says about the judged rows of several runs, together.

    `validation_macro_f1` is the mean. Scores of random calls are those of their expected confusion.
    """
    judged = Judged(*(np.concatenate([getattr(run.judged, field.name) for run in runs]) for field in fields(Judged)))
    on_validation = float(np.mean([run.scores["validation_macro_f1"] for run in runs]))
    return Baseline({**_scores(judged), "validation_macro_f1": on_validation, "class_weights": None}, judged)


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
        chance_M = _binomial(called_M, rows, share)
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


def _binomial(hits_M: Ints, rows: int, share: float) -> Floats:
    """The chance of each number of hits in `rows` draws; scipy.stats has it too, and takes a second to import."""
    ways = gammaln(rows + 1) - gammaln(hits_M + 1) - gammaln(rows - hits_M + 1)
    chances: Floats = np.exp(ways + xlogy(hits_M, share) + xlog1py(rows - hits_M, -share))
    return chances


def variants(names: Iterable[str]) -> int:
    """How many trained models the validation rows chose from, each with class weights and without; at least 1."""
    return max(1, 2 * len(set(names) - set(WITHOUT_INPUT)))


def _wanted(names: Iterable[str], only: Collection[str] | None) -> list[str]:
    return [name for name in names if only is None or name in only]


def _without_input(name: str, shares_C: Floats, labels: Mapping[str, Ints], split: str) -> Baseline:
    """`majority` or `class_prior`."""
    called_C = shares_C if name == "class_prior" else np.eye(len(LABELS))[shares_C.argmax()]
    judged, validation = (
        _judged(labels_N, np.tile(shares_C, (len(labels_N), 1)), np.tile(called_C, (len(labels_N), 1)))
        for labels_N in (labels[split], labels["val"])
    )
    scores, on_validation = _scores(judged), _macro_f1(validation)
    if name == "class_prior":
        scores |= expected_random_scores(labels[split], shares_C)
        on_validation = expected_random_scores(labels["val"], shares_C)["macro_f1"]
    return Baseline({**scores, "validation_macro_f1": on_validation, "class_weights": None}, judged)


def _trained(
    make: Callable[[bool, int, int], Any],
    tables: Mapping[str, Floats],
    labels: Mapping[str, Ints],
    split: str,
    seed: int,
) -> Baseline:
    """The better one on the validation rows of a model without class weights and one with them."""
    train_N, best = labels["train"], None
    for weights in ("none", "balanced"):
        with threadpool_limits(1):  # on tables this small a second thread only makes the first one wait
            model = make(weights == "balanced", seed, len(train_N)).fit(tables["train"], train_N)
            validation = _called(labels["val"], model.predict_proba(tables["val"]))
            if best is None or _macro_f1(validation) > best[0]:
                best = _macro_f1(validation), weights, _called(labels[split], model.predict_proba(tables[split]))
    assert best is not None, "there are two variants"
    return Baseline({**_scores(best[2]), "validation_macro_f1": best[0], "class_weights": best[1]}, best[2])


def _called(labels_N: Ints, probabilities_NC: Floats) -> Judged:
    """Each row called its likeliest class."""
    probabilities_NC = np.maximum(probabilities_NC, LEAST_PROBABILITY)
    probabilities_NC /= probabilities_NC.sum(axis=1, keepdims=True)
    return _judged(labels_N, probabilities_NC, np.eye(len(LABELS))[probabilities_NC.argmax(axis=1)])


def _judged(labels_N: Ints, probabilities_NC: Floats, called_NC: Floats) -> Judged:
    losses_N = -np.log(np.maximum(probabilities_NC[np.arange(len(labels_N)), labels_N], LEAST_PROBABILITY))
    return Judged(labels_N, probabilities_NC, called_NC, losses_N)


def _scores(judged: Judged) -> dict[str, Any]:
    """Metrics with sums of their own only where baselines show them: a calibration error is in bins of confidence, and
    two baselines have one confidence for all rows.
    """
    metrics = [m for m in METRICS if not isinstance(m.measure, OwnSums) or "baselines" in m.shown]
    return {
        **{metric.name: metric.measure.value(judged) for metric in metrics},
        "per_class": class_scores(judged),
    }


def _macro_f1(judged: Judged) -> float:
    return float(macro_f1(judged.confusion()))
