"""One file becomes several splits that go forward in time.

Comes in: the `Survey` of a file. Goes out: row numbers of train, val and test by fold; no row is copied.

The rows, ordered by their event, are cut into folds + 1 parts of equally many. Fold k tests on part k + 1 and knows the
parts before it only; the last fifth of those validates, that is, it chooses the epoch and the temperature. What shares
bars across a seam is purged later, when a fold's files are read (walk-forward: Pardo 1992; purging: `leakage.py`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ctxtrain.data.oversampling import class_counts
from ctxtrain.data.positions import spans_of, why_no_spans
from ctxtrain.data.profile import Survey, survey
from ctxtrain.data.window_file import WindowFile
from ctxtrain.errors import ConfigError
from ctxtrain.labels import LABELS

Ints = NDArray[np.int64]

VALIDATION_SHARE = 0.2  # of the rows before a fold's test rows


def cut_folds(file: WindowFile, folds: int) -> list[dict[str, WindowFile]]:
    """The rows of each fold by split.

    Raises DataError with the faults of the file, and ConfigError as `walk_forward` does.
    """
    found, error = survey(file)
    if error:
        raise error
    return [{name: file.take(rows) for name, rows in fold.items()} for fold in walk_forward(found, folds)]


def walk_forward(surveyed: Survey, folds: int) -> list[dict[str, Ints]]:
    """Row numbers by fold and split, in the order of their events.

    Raises ConfigError where rows cannot be ordered in time, or a fold would train on rows without some class.
    """
    places = {"rows": surveyed.places}
    spans = spans_of(places, whole=True)
    if spans is None:
        time = surveyed.places.time
        some = f"{(~time.known).sum():,} of {len(time.known):,} have no time on their first or last bar"
        why = some if spans_of(places) else why_no_spans(places)
        remedy = "Text rows have none: " if surveyed.fields.is_text else "Give every bar a time, or "
        raise ConfigError(
            f"evaluation.folds orders rows by time, but {why}. {remedy}give data.val and data.test without folds."
        )
    labels_N, (first_half, second_half) = surveyed.labels_N, surveyed.contents_N2.T
    # windows that end together go by what they hold: the order of the file's lines decides nothing
    order = np.lexsort((labels_N, second_half, first_half, spans.last_N["rows"]))
    parts = np.array_split(order, folds + 1)
    found, faults = [], []
    for number in range(1, folds + 1):
        before = np.concatenate(parts[:number])
        cut = len(before) - max(1, round(VALIDATION_SHARE * len(before)))
        fold = {"train": before[:cut], "val": before[cut:], "test": parts[number]}
        missing = [LABELS[c] for c in np.flatnonzero(class_counts(labels_N[fold["train"]]) == 0)]
        if missing or not len(fold["test"]):
            faults.append(
                f"fold {number} of evaluation.folds={folds} would train on {cut:,} rows without "
                f"{', '.join(missing) or 'rows to test on'}. Use fewer folds or more rows."
            )
        found.append(fold)
    if faults:
        raise ConfigError(faults)
    return found
