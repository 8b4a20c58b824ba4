"""Random oversampling: the windows of an epoch.

Input: the labels of the training rows. Output: row numbers per epoch, which depend only on (seed, epoch).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ctxtrain.data.parse_window import Window
from ctxtrain.errors import DataError
from ctxtrain.labels import LABELS
from ctxtrain.runtime import Purpose, generator

Ints = NDArray[np.int64]


def labels_of(windows: Sequence[Window]) -> Ints:
    """Class indices of windows, of shape (windows,)."""
    return np.array([window.label for window in windows], dtype=np.int64)


def by_label(counts_C: Ints) -> dict[str, int]:
    return dict(zip(LABELS, counts_C.tolist(), strict=True))


def class_counts(labels_N: Sequence[int] | Ints) -> Ints:
    """Rows per class, of shape (3,), in the order of `LABELS`."""
    return np.bincount(np.asarray(labels_N, dtype=np.int64), minlength=len(LABELS))


def require_every_class(counts_C: Ints) -> None:
    """Raise DataError if a class has no training rows."""
    if (counts_C == 0).any():
        missing = ", ".join(LABELS[c] for c in np.flatnonzero(counts_C == 0))
        counts = ", ".join(f"{label} {count}" for label, count in zip(LABELS, counts_C, strict=True))
        raise DataError(f"the training rows must have every class, got {counts}. Add rows of {missing}.")


def oversampled_counts(
    counts_C: Ints, target: Literal["auto", "none"] | int = "auto", max_repeat: float | None = None
) -> Ints:
    """Windows per class in an epoch, of shape (3,): each class is raised to the target, none is lowered.

    `auto` is the size of the largest class. `max_repeat` limits a class to that many times its rows. Raises DataError
    if a class has no rows to draw from.
    """
    require_every_class(counts_C)
    target_count = {"auto": int(counts_C.max()), "none": 0}.get(str(target), target)
    counts = np.maximum(counts_C, int(target_count))
    if max_repeat is not None:
        limit_C = np.floor(np.round(counts_C * max_repeat, 6))  # in floating point, 100 · 1.15 is just below 115
        counts = np.minimum(counts, limit_C).astype(np.int64)
    return counts


def epoch_rows(labels_N: Ints, counts_C: Ints, seed: int, epoch: int) -> Ints:
    """Row numbers of one epoch in random order: every row once, plus draws with replacement up to `counts_C`."""
    rng = generator(seed, Purpose.SAMPLING, epoch)
    rows = [np.arange(len(labels_N))]
    for label, target_count in enumerate(counts_C):
        class_rows = np.flatnonzero(labels_N == label)
        rows.append(rng.choice(class_rows, size=int(target_count) - len(class_rows), replace=True))
    shuffled: Ints = rng.permutation(np.concatenate(rows))
    return shuffled
