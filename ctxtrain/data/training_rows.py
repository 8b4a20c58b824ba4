"""The rows that training draws from: those of the training file, and what augmentation makes of them.

Input: the training rows with labels and tokens, and the settings of augmentation. Output: labels of shape (R,), and the
tokens of the R rows in an epoch. R is N, the rows of the file, or 2N with mirror: row N + n is the twin of row n.

With crop, half of the rows of an epoch lose their oldest bars, from one bar to all but the newest 20. Which rows and
how many bars follows from (seed, epoch, row). The tokens of one epoch are kept at a time, on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ctxtrain.data.codec import Codec
from ctxtrain.data.mirror import labels_with_twins, newest_bars, twins, unchanged_fields
from ctxtrain.data.parse_window import Window
from ctxtrain.data.profile import RowNames, Survey
from ctxtrain.data.row_schema import MIN_BARS
from ctxtrain.data.token_store import TokenStore, tokens_on_disk
from ctxtrain.data.tokens import Tokens
from ctxtrain.data.window_file import WindowFile
from ctxtrain.errors import ConfigError
from ctxtrain.runtime import Purpose, generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ints = NDArray[np.int64]

CROPPED_SHARE = 0.5  # the others stay whole, as the rows that the model will be asked about are


class Augmentation(NamedTuple):
    """Settings of augmentation; `seed` is that of the crops."""

    mirror: bool = False
    crop: bool = False
    seed: int = 0

    def require_bars(self, survey: Survey) -> None:
        """Raise ConfigError if the training rows have no bars to change."""
        kind, longest = survey.fields.kind, int(survey.bars_N.max(initial=0))
        names = {"text": "text rows", "features": "rows of features alone"}
        switched_on = [name for name in ("mirror", "crop") if getattr(self, name)]
        faults = [
            f"augmentation.{name} changes the bars of windows, but the training rows are {names[kind]}. "
            f"Set augmentation.{name}=false."
            for name in switched_on
            if kind in names
        ]
        if self.crop and not faults and 0 < longest <= MIN_BARS:
            faults.append(
                f"augmentation.crop keeps the newest {MIN_BARS} bars, so windows must have more, but no training row "
                f"has more than {longest}. Set augmentation.crop=false."
            )
        if faults:
            raise ConfigError(faults)


@dataclass
class TrainingRows:
    """R rows; `whole` are their tokens without crops, of which `tokens` returns those of an epoch."""

    file: WindowFile
    labels_R: Ints
    names: Sequence[str]
    whole: Tokens
    bars_N: Ints
    codec: Codec
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    augmentation: Augmentation
    _epoch: tuple[int, Tokens] | None = field(default=None, repr=False)

    def tokens(self, epoch: int) -> Tokens:
        """The tokens of all rows in an epoch, counted from 0."""
        if not self.augmentation.crop:
            return self.whole
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = None  # frees the disk of the epoch before
            texts = self.codec.render_all(self._cropped(epoch))
            self._epoch = epoch, tokens_on_disk(texts, self.tokenizer, self.max_tokens)
        return self._epoch[1]

    def kept_bars(self, epoch: int) -> Ints:
        """The number of bars that each row has in an epoch, of shape (R,)."""
        bars_R = np.tile(self.bars_N, len(self.labels_R) // len(self.bars_N)).astype(np.int64)
        rng = generator(self.augmentation.seed, Purpose.CROP, epoch)
        is_cropped_R, share_R = rng.random(len(bars_R)) < CROPPED_SHARE, rng.random(len(bars_R))
        spare_R = bars_R - MIN_BARS
        left_out_R = 1 + np.floor(share_R * spare_R).astype(np.int64)
        return np.where(is_cropped_R & (spare_R > 0), bars_R - left_out_R, bars_R)

    def notes(self) -> list[str]:
        """What augmentation does to the rows, and which of their fields it does not change."""
        count, (mirror, crop, _) = len(self.bars_N), self.augmentation
        notes = []
        if mirror:
            notes.append(
                f"augmentation.mirror: training also reads the mirrored twin of each of the {count:,} training rows, "
                "LONG as SHORT"
            )
        if mirror and (names := unchanged_fields(self.codec)):
            notes.append(
                f"augmentation.mirror does not change {', '.join(names)} in the {count:,} twins, because nothing says "
                "whether they have a direction; leave out those that have one, or set augmentation.mirror=false"
            )
        if crop and (short := int((self.bars_N <= MIN_BARS).sum())):
            notes.append(
                f"augmentation.crop leaves {short:,} of {count:,} training rows whole: they have {MIN_BARS} bars"
            )
        return notes

    def summary(self) -> dict[str, Any]:
        return {
            "mirror": self.augmentation.mirror,
            "crop": self.augmentation.crop,
            "mirrored_rows": len(self.labels_R) - len(self.bars_N),
            "unchanged_fields": unchanged_fields(self.codec) if self.augmentation.mirror else [],
        }

    def _cropped(self, epoch: int) -> Iterator[Window]:
        windows = chain(self.file, twins(self.file, self.codec)) if self.augmentation.mirror else iter(self.file)
        for window, bars in zip(windows, self.kept_bars(epoch).tolist(), strict=True):
            yield newest_bars(window, bars)


def make_training_rows(
    survey: Survey,
    whole: Tokens,
    store: TokenStore,
    codec: Codec,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    augmentation: Augmentation,
) -> TrainingRows:
    """The rows of an epoch; `whole` are the tokens of the training rows."""
    labels_R, names = survey.labels_N, survey.names
    if augmentation.mirror:
        whole = store.tokens_with_twins(survey.file, codec, tokenizer, max_tokens)
        labels_R = labels_with_twins(labels_R)
    return TrainingRows(
        survey.file,
        labels_R,
        _names_with_twins(names) if augmentation.mirror else names,
        whole,
        survey.bars_N,
        codec,
        tokenizer,
        max_tokens,
        augmentation,
    )


def _names_with_twins(names: Sequence[str]) -> RowNames:
    """The names of N rows in messages, then those of their twins."""
    count = len(names)
    return RowNames(lambda row: names[row] if row < count else f"{names[row - count]}, mirrored", 2 * count)
