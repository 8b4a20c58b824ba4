"""Walk-forward folds: divide one file into train, val and test in time order, once for each fold (Pardo 1992).

Input: the `Survey` of a file. Output: row numbers of train, val and test by fold; no row is copied.

The rows, ordered by event time, are divided into folds + 1 parts of equal size. Fold k tests on part k + 1. All earlier
parts are for fitting: their last fifth is the validation split, which selects the epoch and fits the temperature, and
the rest is the training split. Rows that share bars across a boundary are not dropped here. They are purged when the
files of a fold are read (`leakage.py`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ctxtrain.data.oversampling import class_counts
from ctxtrain.data.positions import common_spans, missing_spans_reason
from ctxtrain.data.profile import Survey, survey
from ctxtrain.data.window_file import WindowFile
from ctxtrain.errors import ConfigError
from ctxtrain.labels import LABELS

Ints = NDArray[np.int64]

VALIDATION_SHARE = 0.2  # of the rows that are earlier than the test rows of a fold


def cut_folds(file: WindowFile, folds: int) -> list[dict[str, WindowFile]]:
    """The rows of each fold, by split.

    Raises DataError with the faults of the file, and the ConfigErrors of `walk_forward`.
    """
    surveyed, error = survey(file)
    if error:
        raise error
    return [{name: file.take(rows) for name, rows in fold.items()} for fold in walk_forward(surveyed, folds)]


def walk_forward(surveyed: Survey, folds: int) -> list[dict[str, Ints]]:
    """Row numbers by fold and split, in order of event time.

    Raises ConfigError if the rows cannot be ordered in time, or if a fold lacks test rows or training rows of a class.
    """
    positions = {"rows": surveyed.positions}
    spans = common_spans(positions, require_all=True)
    if spans is None:
        time = surveyed.positions.time
        partly = f"{(~time.known).sum():,} of {len(time.known):,} have no time on their first or last bar"
        reason = partly if common_spans(positions) else missing_spans_reason(positions)
        remedy = "Text rows have no time: " if surveyed.fields.kind == "text" else "Give every bar a time, or "
        raise ConfigError(
            f"evaluation.folds orders rows by time, but {reason}. {remedy}set data.val and data.test instead of folds."
        )
    labels_N, (first_half, second_half) = surveyed.labels_N, surveyed.contents_N2.T
    # Windows that end at the same time are ordered by content, so the order of lines in the file has no influence.
    order = np.lexsort((labels_N, second_half, first_half, spans.last_N["rows"]))
    parts = np.array_split(order, folds + 1)
    splits, faults = [], []
    for number in range(1, folds + 1):
        earlier = np.concatenate(parts[:number])
        cut = len(earlier) - max(1, round(VALIDATION_SHARE * len(earlier)))
        fold = {"train": earlier[:cut], "val": earlier[cut:], "test": parts[number]}
        missing = [f"{LABELS[c]} rows" for c in np.flatnonzero(class_counts(labels_N[fold["train"]]) == 0)]
        missing += [] if len(fold["test"]) else ["test rows"]
        if missing:
            faults.append(
                f"fold {number} of evaluation.folds={folds} must have test rows and training rows of every class, got "
                f"{cut:,} training rows and no {', no '.join(missing)}. Use fewer folds or more rows."
            )
        splits.append(fold)
    if faults:
        raise ConfigError(faults)
    return splits
