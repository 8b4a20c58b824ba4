"""Marks of bar fields without a fixed alphabet: scaled numbers, and the fields that a user declares.

Input: values of the field in training windows. Output: a `Level`: how a value of the field becomes one character.

    number     a digit, the z-score over the training rows in half deviations: 5 = the centre
    count      a digit: 0, 1, 2, 3, 4, 5 to 6, 7 to 9, 10 to 14, 15 to 24, 25 and more
    flag       0 or 1
    category   a digit or letter, the place of the word in the list of the training rows; - for any other word
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from ctxtrain.config.value_types import FieldKind
from ctxtrain.data.outliers import REL_TOL, compress_outliers
from ctxtrain.data.row_schema import MAX_MAGNITUDE

Floats = NDArray[np.float64]
Bytes = NDArray[np.uint8]

FEATURE_OUTLIER = 100.0  # in typical deviations from the median
WORD_MARKS = "0123456789abcdefghijklmnopqrstuvwxyz"
OTHER_WORD = "-"
MAX_WORDS_COUNTED = 10_000  # distinct words of one field; any further ones are read as other words
COUNT_STEPS = np.array([1, 2, 3, 4, 5, 7, 10, 15, 25])


class FeatureScale(BaseModel):
    """Robust location and spread of a number over the training rows."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    centre: float = Field(ge=-MAX_MAGNITUDE, le=MAX_MAGNITUDE)
    spread: float = Field(gt=0, le=2 * MAX_MAGNITUDE)

    def scores(self, values: Floats) -> Floats:
        """z-scores, of the shape of `values`."""
        return (values - self.centre) / self.spread


class WordList(BaseModel):
    """The words of a category that the model distinguishes, most common in the training rows first."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    words: list[str] = Field(min_length=1, max_length=len(WORD_MARKS))

    def marks(self, words: Iterable[str]) -> str:
        """One character per word."""
        place = {word: WORD_MARKS[n] for n, word in enumerate(self.words)}
        return "".join(place.get(word, OTHER_WORD) for word in words)


class Level(BaseModel):
    """How the values of one bar field are written. Numbers and counts have a `scale`, categories have `words`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    kind: FieldKind
    scale: FeatureScale | None = None
    words: WordList | None = None

    def marks(self, values_WL: Floats) -> Bytes:
        """ASCII codes of the values of a number, count or flag, in the same shape."""
        if self.kind == "number":
            assert self.scale is not None
            return half_deviations(self.scale.scores(values_WL))
        digits = np.searchsorted(COUNT_STEPS, values_WL, side="right") if self.kind == "count" else values_WL
        return (digits + ord("0")).astype(np.uint8)

    def score(self, value: float) -> float:
        """z-score of the value of a number or count at the event, for the end of the text."""
        assert self.scale is not None
        return float(self.scale.scores(np.asarray(_magnitude(self.kind, value))))


def fit_scale(values_N: Floats) -> FeatureScale:
    """The scale of a number over the training rows."""
    low, centre, high = np.quantile(values_N, [0.25, 0.5, 0.75])
    return FeatureScale(centre=float(centre), spread=_spread(values_N, float(high - low)))


def fit_level(kind: FieldKind, values_N: Floats) -> Level:
    """The level of a field that is a number, a count or a flag."""
    return Level(kind=kind, scale=None if kind == "flag" else fit_scale(_magnitude(kind, values_N)))


def fit_words(counts: Counter[str]) -> WordList:
    """The most common words; equally common ones in alphabetical order."""
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    return WordList(words=ranked[: len(WORD_MARKS)])


def count_words(counts: Counter[str], words: Sequence[str]) -> None:
    """Add words to the counts, in bounded memory."""
    counts.update(words if len(counts) < MAX_WORDS_COUNTED else [word for word in words if word in counts])


def unseen_word_lines(counts: Mapping[str, int], rows: int) -> list[str]:
    """One message for each category in which rows have words that the training rows do not have."""
    return [
        f"{name} has a word that the training rows do not have in {count:,} of {rows:,} rows; all such words are read "
        "as one"
        for name, count in sorted(counts.items())
    ]


def half_deviations(scores: Floats) -> Bytes:
    """z-scores as ASCII digits in half deviations: 0 is −2.5 and below, 5 is the mean, 9 is 2 and above."""
    return (np.clip(np.rint(scores * 2 + 5), 0, 9) + ord("0")).astype(np.uint8)


def _magnitude(kind: FieldKind, value: Any) -> Any:
    """Counts are scaled by their logarithm."""
    return np.log1p(value) if kind == "count" else value


def _spread(values: Floats, interquartile_range: float) -> float:
    """Standard deviation, estimated so that neither a few huge values nor rounding dominate; 1 if nothing varies."""
    minimum = REL_TOL * float(np.abs(values).min())
    compressed = compress_outliers(values[None], [FEATURE_OUTLIER])[0]
    # the interquartile range of a normal distribution is 1.349 standard deviations
    return next((spread for spread in (interquartile_range / 1.349, float(compressed.std())) if spread > minimum), 1.0)
