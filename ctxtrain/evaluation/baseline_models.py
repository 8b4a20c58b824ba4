"""The four trained baselines, each made with or without class weights.

Comes in: whether classes are balanced, a seed, and how many rows there will be. Goes out: a classifier with `fit` and
`predict_proba`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import ExtraTreesClassifier, HistGradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MOST_ROWS_A_TREE = 10_000  # a tree's leaves grow with its rows: 500 trees on a million rows would take 30 GB


class NotFitted(Exception):
    """A library will not be fitted to these rows; its reason."""


def _logistic_regression(balanced: bool, _seed: int, _rows: int) -> Any:
    # A tenth of scikit-learn's default C: some 150 numbers on some hundred rows want the stronger penalty.
    weights = "balanced" if balanced else None
    return make_pipeline(
        SimpleImputer(), StandardScaler(), LogisticRegression(C=0.1, max_iter=1000, class_weight=weights)
    )


def _gradient_boosting(balanced: bool, seed: int, _rows: int) -> Any:
    # Small trees on a third of the columns each, with 63 bins: the scores of the defaults, in a tenth of their time.
    return HistGradientBoostingClassifier(
        max_leaf_nodes=8,
        max_features=0.3,
        max_bins=63,
        class_weight="balanced" if balanced else None,
        random_state=seed,
        early_stopping=False,
    )


def extra_trees(balanced: bool, seed: int, rows: int) -> Any:
    """500 trees that see all of the rows, or 10,000 drawn for each where there are more; `rows` is their number."""
    part = {"bootstrap": True, "max_samples": MOST_ROWS_A_TREE} if rows > MOST_ROWS_A_TREE else {}
    return ExtraTreesClassifier(
        500,
        min_samples_leaf=2,
        max_features=0.3,
        class_weight="balanced" if balanced else None,
        random_state=seed,
        **part,
    )


class _CatBoost:
    """CatBoost with the other baselines' two methods; it writes no files and nothing to the terminal."""

    def __init__(self, balanced: bool, seed: int, _rows: int) -> None:
        self._settings = {"auto_class_weights": "Balanced" if balanced else None, "random_seed": seed}
        self._model: Any = None

    def fit(self, table: Floats, labels_N: Ints) -> _CatBoost:
        from catboost import CatBoostClassifier, CatBoostError  # half a second, and only the end of a run needs it

        self._model = CatBoostClassifier(
            iterations=400,
            depth=5,
            learning_rate=0.06,
            rsm=0.3,
            border_count=63,  # as the boosting above: the scores of the default 254, in half of its time
            thread_count=1,
            allow_writing_files=False,
            logging_level="Silent",
            **self._settings,
        )
        try:
            self._model.fit(table, labels_N)
        except CatBoostError as error:  # as where every window has the same numbers
            raise NotFitted(f"CatBoost cannot be fitted to these rows ({str(error).rpartition(': ')[2]})") from None
        return self

    def predict_proba(self, table: Floats) -> Floats:
        probabilities_NC: Floats = self._model.predict_proba(table, thread_count=1)
        return probabilities_NC


MAKERS: dict[str, Callable[[bool, int, int], Any]] = {
    "logistic_regression": _logistic_regression,
    "gradient_boosting": _gradient_boosting,
    "extra_trees": extra_trees,
    "catboost": _CatBoost,
}
