"""The classifiers of the four trained baselines, each with or without class weights.

Input: whether to balance the classes, a seed, and the number of training rows. Output: a classifier with `fit` and
`predict_proba`. Each function imports its library itself, since scikit-learn takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

EXTRA_TREES, CATBOOST_TREES, BOOSTING_ROUNDS = 500, 400, 100
MAX_ROWS_PER_TREE = 10_000  # trees grow with their rows: 500 trees on a million rows would take 30 GB


class FitFailed(Exception):
    """A library refuses to fit these rows; the message is its reason."""


def _logistic_regression(balanced: bool, _seed: int, _rows: int) -> Any:
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # A tenth of the default C: about 150 features on a few hundred rows need stronger regularisation.
    weights = "balanced" if balanced else None
    return make_pipeline(
        SimpleImputer(), StandardScaler(), LogisticRegression(C=0.1, max_iter=1000, class_weight=weights)
    )


def _gradient_boosting(balanced: bool, seed: int, _rows: int) -> Any:
    from sklearn.ensemble import HistGradientBoostingClassifier

    # Small trees on a third of the columns, with 63 bins, match the scores of the defaults in a tenth of the time.
    return HistGradientBoostingClassifier(
        max_iter=BOOSTING_ROUNDS,
        max_leaf_nodes=8,
        max_features=0.3,
        max_bins=63,
        class_weight="balanced" if balanced else None,
        random_state=seed,
        early_stopping=False,
    )


def extra_trees(balanced: bool, seed: int, rows: int) -> Any:
    """Each tree is fitted on all `rows`, or on a sample of 10,000 if there are more."""
    from sklearn.ensemble import ExtraTreesClassifier

    sampling = {"bootstrap": True, "max_samples": MAX_ROWS_PER_TREE} if rows > MAX_ROWS_PER_TREE else {}
    return ExtraTreesClassifier(
        EXTRA_TREES,
        min_samples_leaf=2,
        max_features=0.3,
        class_weight="balanced" if balanced else None,
        random_state=seed,
        **sampling,
    )


class _CatBoost:
    """CatBoost with scikit-learn's `fit` and `predict_proba`; writes no files and prints nothing."""

    def __init__(self, balanced: bool, seed: int, _rows: int) -> None:
        from catboost import CatBoostClassifier

        self._model = CatBoostClassifier(
            iterations=CATBOOST_TREES,
            depth=5,
            learning_rate=0.06,
            rsm=0.3,
            border_count=63,  # matches the scores of the default 254 in half the time
            thread_count=1,
            allow_writing_files=False,
            logging_level="Silent",
            auto_class_weights="Balanced" if balanced else None,
            random_seed=seed,
        )

    def fit(self, table: Floats, labels_N: Ints) -> _CatBoost:
        from catboost import CatBoostError

        try:
            self._model.fit(table, labels_N)
        except CatBoostError as error:  # for example if all rows have the same features
            raise FitFailed(f"CatBoost cannot be fitted to these rows ({str(error).rpartition(': ')[2]})") from None
        return self

    def predict_proba(self, table: Floats) -> Floats:
        probabilities_NC: Floats = self._model.predict_proba(table, thread_count=1)
        return probabilities_NC


CLASSIFIERS: dict[str, Callable[[bool, int, int], Any]] = {
    "logistic_regression": _logistic_regression,
    "gradient_boosting": _gradient_boosting,
    "extra_trees": extra_trees,
    "catboost": _CatBoost,
}
