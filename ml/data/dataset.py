"""The rows of a run, ready to train on: read, balanced, rendered, tokenised.

Comes in: paths of the splits and a tokenizer. Goes out: a `Dataset` with windows, labels and tokens by split
(`train`, `val`, and `test` where there is one), the codec, and the class counts and weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ml.data.batches import Tokens, tokenise
from ml.data.codec import Codec, fit_codec, partial_fields
from ml.data.sampling import by_label, class_counts, class_weights, labels_of, oversampled_counts
from ml.data.windows import Reading, Window, read_windows
from ml.errors import DataError
from ml.labels import LABELS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Dataset:
    """`counts_C` are the training rows per class, `epoch_counts_C` the windows per class of an oversampled epoch."""

    windows: dict[str, list[Window]]
    labels: dict[str, Ints]
    tokens: dict[str, Tokens]
    codec: Codec
    counts_C: Ints
    epoch_counts_C: Ints
    class_weights: list[float]
    max_tokens: int

    def notes(self) -> list[str]:
        """What a user should know about the rows although nothing is wrong with them."""
        notes = [
            f"{name} is in {count:,} of {len(self.windows['train']):,} training rows; a model reads what every row has"
            for name, count in partial_fields(self.windows["train"]).items()
        ]
        notes += [
            f"{tokens.cut:,} of {len(tokens):,} {name} rows are longer than model.max_tokens={self.max_tokens} "
            "and lose their oldest tokens"
            for name, tokens in self.tokens.items()
            if tokens.cut
        ]
        for name, labels_N in self.labels.items():
            absent = [label for label, count in by_label(class_counts(labels_N)).items() if not count]
            if absent:
                notes.append(f"{name} has no {', '.join(absent)} rows; a class without rows scores 0")
        return notes

    def summary(self) -> dict[str, Any]:
        return {
            "rows": {name: len(windows) for name, windows in self.windows.items()},
            "classes": {name: by_label(class_counts(labels_N)) for name, labels_N in self.labels.items()},
            "before_oversampling": by_label(self.counts_C),
            "after_oversampling": by_label(self.epoch_counts_C),
            "class_weights": dict(zip(LABELS, self.class_weights, strict=True)),
            "codec": self.codec.kind,
            "partial_fields": partial_fields(self.windows["train"]),
            "longest_text_tokens": {name: int(tokens.lengths.max()) for name, tokens in self.tokens.items()},
            "rows_cut_to_max_tokens": {name: tokens.cut for name, tokens in self.tokens.items()},
        }

    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of labels and tokens of the splits that training and selection read."""
        return {
            name: hashlib.sha256(
                self.labels[name].tobytes() + self.tokens[name].ends.tobytes() + self.tokens[name].flat.tobytes()
            ).hexdigest()
            for name in ("train", "val")
        }


def load_dataset(
    paths: Mapping[str, str | None],
    tokenizer: PreTrainedTokenizerBase,
    *,
    codec: Literal["compact", "json"],
    max_tokens: int,
    oversampling: Literal["auto", "none"] | int,
    max_repeat: float | None,
    weights: Literal["auto", "none"] | Sequence[float],
) -> Dataset:
    """Read `train`, `val` and, where given, `test`. Raises one DataError with the faults of all files."""
    windows = _read(paths)
    fitted = fit_codec(codec, windows["train"])
    labels = {name: labels_of(split) for name, split in windows.items()}
    counts_C = class_counts(labels["train"])
    epoch_counts_C = oversampled_counts(counts_C, oversampling, max_repeat)
    texts = {name: fitted.render_all(split) for name, split in windows.items()}
    return Dataset(
        windows=windows,
        labels=labels,
        tokens={name: tokenise(split, tokenizer, max_tokens) for name, split in texts.items()},
        codec=fitted,
        counts_C=counts_C,
        epoch_counts_C=epoch_counts_C,
        class_weights=class_weights(epoch_counts_C, weights),
        max_tokens=max_tokens,
    )


def _read(paths: Mapping[str, str | None]) -> dict[str, list[Window]]:
    readings: dict[str, Reading] = {}
    faults: list[str] = []
    total = 0
    for name, path in paths.items():
        if path is None:
            continue
        try:
            reading = readings[name] = read_windows(Path(path))
            faults, total = faults + reading.faults, total + reading.fault_total
        except DataError as error:
            faults, total = faults + error.faults, total + error.total
    if faults:
        raise DataError(faults, total=total)
    return {name: reading.windows for name, reading in readings.items()}
