"""Which windows an epoch sees.

Comes in: the labels of the training rows. Goes out: row numbers per epoch, drawn from (seed, epoch) alone.
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
    """Class numbers, of shape (windows,)."""
    return np.array([window.label for window in windows], dtype=np.int64)


def by_label(counts_C: Ints) -> dict[str, int]:
    return dict(zip(LABELS, counts_C.tolist(), strict=True))


def class_counts(labels_N: Sequence[int] | Ints) -> Ints:
    """Rows per class, of shape (3,), in the order of `LABELS`."""
    return np.bincount(np.asarray(labels_N, dtype=np.int64), minlength=len(LABELS))


def require_every_class(counts_C: Ints) -> None:
    """Raises DataError if a class has no training rows."""
    if (counts_C == 0).any():
        missing = ", ".join(LABELS[c] for c in np.flatnonzero(counts_C == 0))
        found = ", ".join(f"{label} {count}" for label, count in zip(LABELS, counts_C, strict=True))
        raise DataError(f"the training rows must have every class, got {found}. Add rows of {missing}.")


def oversampled_counts(
    counts_C: Ints, target: Literal["auto", "none"] | int = "auto", max_repeat: float | None = None
) -> Ints:
    """Windows per class in an epoch, of shape (3,): each class raised to the target, none lowered.

    `auto` is the largest class. With `max_repeat` a class grows to at most that many times its rows.
    Raises DataError if a class has no rows, since nothing can be drawn for it.
    """
    require_every_class(counts_C)
    wanted = {"auto": int(counts_C.max()), "none": 0}.get(str(target), target)
    raised = np.maximum(counts_C, int(wanted))
    if max_repeat is not None:
        most_C = np.floor(np.round(counts_C * max_repeat, 6))  # 100 · 1.15 is a little less than 115 in floating point
        raised = np.minimum(raised, most_C).astype(np.int64)
    return raised


def epoch_rows(labels_N: Ints, counts_C: Ints, seed: int, epoch: int) -> Ints:
    """Row numbers of one epoch in random order: every row once, plus draws with replacement up to `counts_C`."""
    rng = generator(seed, Purpose.SAMPLING, epoch)
    rows = [np.arange(len(labels_N))]
    for label, wanted in enumerate(counts_C):
        own = np.flatnonzero(labels_N == label)
        rows.append(rng.choice(own, size=int(wanted) - len(own), replace=True))
    shuffled: Ints = rng.permutation(np.concatenate(rows))
    return shuffled
