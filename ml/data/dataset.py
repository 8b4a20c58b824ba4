"""The rows of a run, ready to train on: read, balanced, rendered, tokenised.

Comes in: paths of the splits and a tokenizer. Goes out: a `Dataset` with labels, names and tokens by split
(`train`, `val`, and `test` where there is one), the codec, and the class counts and weights.

Each file is walked through twice, first for its labels and for what the codec depends on, then to render and tokenise.
Windows are not kept, so that memory holds a few hundred bytes of a row and not its 20,000.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ml.data.batches import Tokens, tokenise
from ml.data.codec import Codec, CodecFitter
from ml.data.sampling import by_label, class_counts, class_weights, oversampled_counts
from ml.data.windows import WindowFile
from ml.errors import DataError
from ml.labels import LABELS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Dataset:
    """By split: the file, names of the rows for messages, labels of shape (rows,) and tokens.

    `counts_C` are the training rows per class, `epoch_counts_C` the windows per class of an oversampled epoch.
    """

    files: dict[str, WindowFile]
    names: dict[str, list[str]]
    labels: dict[str, Ints]
    tokens: dict[str, Tokens]
    codec: Codec
    partial_fields: dict[str, int]
    counts_C: Ints
    epoch_counts_C: Ints
    class_weights: list[float]
    max_tokens: int

    def notes(self) -> list[str]:
        """What a user should know about the rows although nothing is wrong with them."""
        notes = [
            f"{name} is in {count:,} of {len(self.names['train']):,} training rows; a model reads what every row has"
            for name, count in self.partial_fields.items()
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
            "rows": {name: len(names) for name, names in self.names.items()},
            "sha256": {name: file.reading.sha256 for name, file in self.files.items()},
            "classes": {name: by_label(class_counts(labels_N)) for name, labels_N in self.labels.items()},
            "before_oversampling": by_label(self.counts_C),
            "after_oversampling": by_label(self.epoch_counts_C),
            "class_weights": dict(zip(LABELS, self.class_weights, strict=True)),
            "codec": self.codec.kind,
            "partial_fields": self.partial_fields,
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
    files, names, labels, fitter = _survey(paths)
    fitted = fitter.fit(codec)
    counts_C = class_counts(labels["train"])
    epoch_counts_C = oversampled_counts(counts_C, oversampling, max_repeat)
    return Dataset(
        files=files,
        names=names,
        labels=labels,
        tokens={name: tokenise(fitted.render_all(file), tokenizer, max_tokens) for name, file in files.items()},
        codec=fitted,
        partial_fields=fitter.partial_fields(),
        counts_C=counts_C,
        epoch_counts_C=epoch_counts_C,
        class_weights=class_weights(epoch_counts_C, weights),
        max_tokens=max_tokens,
    )


def _survey(
    paths: Mapping[str, str | None],
) -> tuple[dict[str, WindowFile], dict[str, list[str]], dict[str, Ints], CodecFitter]:
    """The first walk through all files. Raises one DataError with the faults of all."""
    files: dict[str, WindowFile] = {}
    names: dict[str, list[str]] = {}
    labels: dict[str, Ints] = {}
    faults: list[str] = []
    fitter, total = CodecFitter(), 0
    for split, path in paths.items():
        if path is None:
            continue
        file = files[split] = WindowFile(path)
        names[split], numbers = [], array("b")
        try:
            for window in file:
                names[split].append(window.name)
                numbers.append(-1 if window.label is None else window.label)
                if split == "train":
                    fitter.see(window)
            file.refuse_faults()
        except DataError as error:
            faults, total = faults + error.faults, total + error.total
        labels[split] = np.array(numbers, dtype=np.int64)
    if faults:
        raise DataError(faults, total=total)
    return files, names, labels, fitter
