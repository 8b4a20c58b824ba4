"""Training windows → the codec that renders them.

Input: windows, one by one. Output: a `Codec`: the fields that every window has, and the scales and words of those that
have no fixed range.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Literal

from ctxtrain.data.codec import Codec
from ctxtrain.data.columns import DiskColumn
from ctxtrain.data.levels import Level, count_words, fit_level, fit_scale, fit_words
from ctxtrain.data.parse_window import Window
from ctxtrain.data.row_schema import BAR_FIELDS, BAR_NAMES, NO_FIELDS, SCALED_FIELDS, OwnFields
from ctxtrain.errors import DataError

# The field is given as 0–100 or 0–1; the training rows decide which.
WAVE_STRENGTH = "wave_strength"
MAX_NAMED_WORDS = 3


class CodecFitter:
    """Collects statistics of windows; fixes the fields that all of them have, their scales and their words.

    `own` are the bar fields that the user declares.
    """

    def __init__(self, own: OwnFields = NO_FIELDS) -> None:
        self.own = own
        self.windows = 0
        self.kind = "window"
        self.counts: Counter[str] = Counter()
        self._features: dict[str, DiskColumn] = {}
        self._levels: dict[str, DiskColumn] = {}
        self._words: dict[str, Counter[str]] = {}
        self._largest_wave_strength = 0.0

    def add(self, window: Window) -> None:
        self.windows += 1
        self.kind = window.kind
        self.counts.update(window.bars.keys())
        self.counts.update(window.bar_words.keys())
        self.counts.update(f"features.{name}" for name in (*window.features, *window.feature_words))
        for name, value in window.features.items():
            self._features.setdefault(name, DiskColumn("f8")).append(value)
        for name in (*SCALED_FIELDS, WAVE_STRENGTH, *self.own):
            if name in window.bars:
                values = window.bars[name]
                # Three bars stand for the window: the first, the middle one and the event.
                self._levels.setdefault(name, DiskColumn("f8")).extend(values[[0, len(values) // 2, -1]].tolist())
        for name, words in window.bar_words.items():
            count_words(self._words.setdefault(name, Counter()), words)
        for name, word in window.feature_words.items():
            count_words(self._words.setdefault(f"features.{name}", Counter()), [word])
        if WAVE_STRENGTH in window.bars:
            self._largest_wave_strength = max(self._largest_wave_strength, float(window.bars[WAVE_STRENGTH].max()))

    def partial_fields(self) -> dict[str, int]:
        """Fields and features that only some windows have, with the number of windows that have them."""
        return {name: count for name, count in sorted(self.counts.items()) if count < self.windows}

    def fit(self, kind: Literal["compact", "json"]) -> Codec:
        """The codec for the windows added so far. It leaves out every field that some of them lack.

        Raises DataError for rows without bars that have no feature in common.
        """
        if self.kind == "text":
            return Codec(kind="text", fields=[], features={})
        names = [name for name in (*BAR_FIELDS, *self.own) if self.counts[name] == self.windows]
        fields = [
            name for name in names if kind == "json" or name not in ("buy_vol", "sell_vol")
        ]  # the compact text has delta, their difference
        features = [name for name in sorted(self._features) if len(self._features[name]) == self.windows]
        words = [
            name.removeprefix("features.")
            for name, counts in sorted(self._words.items())
            if name.startswith("features.") and self.counts[name] == self.windows and counts
            if name.removeprefix("features.") not in self._features  # skip: numeric in some rows
        ]
        if not fields and not features and not words:
            raise DataError("rows without bars must have a feature that every training row has, but they have none")
        return Codec(
            kind=kind,
            fields=fields,
            levels={name: self._fit_level(name) for name in fields if self._is_level(name)},
            features={name: fit_scale(self._features[name].array()) for name in features},
            feature_words={name: fit_words(self._words[f"features.{name}"]) for name in words},
            own_fields=dict(self.own),
        )

    def notes(self) -> list[str]:
        """User-facing notes about how values are read."""
        notes = []
        if self._is_level(WAVE_STRENGTH) and self.counts[WAVE_STRENGTH] == self.windows:
            notes.append(f"{WAVE_STRENGTH} is at most 1 on all training rows, so it is read as 0 to 1, not as 0 to 100")
        return notes

    def differences(self, train: Codec) -> list[str]:
        """Messages about values of these windows that the codec of the training rows reads in another way."""
        messages = []
        known = {name: level.words.words for name, level in train.levels.items() if level.words is not None}
        known |= {f"features.{name}": words.words for name, words in train.feature_words.items()}
        for name, words in known.items() if train.kind == "compact" else ():
            counts = self._words.get(name, Counter[str]())
            if unseen := {word: count for word, count in counts.items() if word not in words}:
                examples = ", ".join(sorted(unseen, key=lambda word: -unseen[word])[:MAX_NAMED_WORDS])
                messages.append(
                    f"{name} has {sum(unseen.values()):,} values outside its {len(words)} known "
                    f"word{'s' if len(words) != 1 else ''} ({examples}); all are read as one unknown word"
                )
        if WAVE_STRENGTH in train.fields and self._largest_wave_strength:
            is_share = WAVE_STRENGTH in train.levels  # 0 to 1 in the training rows
            here, there = ("100", "1") if is_share else ("1", "100")
            if is_share != self._is_level(WAVE_STRENGTH):
                messages.append(f"{WAVE_STRENGTH} is from 0 to {here} here, but from 0 to {there} in the training rows")
        return messages

    def require_own_fields(self) -> None:
        """Raise DataError if `data.fields` declares a field that none of these windows has."""
        if absent := [name for name in self.own if not self.counts[name]]:
            raise DataError(
                f"data.fields declares {', '.join(absent)}, but no window of train has {'them' if absent[1:] else 'it'}"
                " on every bar. Correct the name, or leave it out."
            )

    def _is_level(self, name: str) -> bool:
        is_share = name == WAVE_STRENGTH and WAVE_STRENGTH in self._levels and self._largest_wave_strength <= 1
        return name in SCALED_FIELDS or name not in BAR_NAMES or is_share

    def _fit_level(self, name: str) -> Level:
        if name in self._words:
            return Level(kind="category", words=fit_words(self._words[name]))
        return fit_level(self.own.get(name, "number"), self._levels[name].array())


def fit_codec(kind: Literal["compact", "json"], windows: Iterable[Window], own: OwnFields = NO_FIELDS) -> Codec:
    """The codec fitted to windows in memory."""
    fitter = CodecFitter(own)
    for window in windows:
        fitter.add(window)
    return fitter.fit(kind)
