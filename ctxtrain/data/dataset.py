"""The rows of a run, ready to train on: read, purged, balanced, rendered, tokenised, searched for leaks.

Comes in: paths of the splits and a tokenizer. Goes out: a `Dataset` with labels, names and tokens by split
(`train`, `val`, and `test` where there is one), the codec, the class counts and weights, and what was found.

Each file is parsed once, into a table on disk. Its windows are walked through twice, first for a `Survey`, then to
render and tokenise; and once more where purging drops rows. Windows, columns and tokens stay on disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ctxtrain.data.batches import Tokens
from ctxtrain.data.class_weights import class_weights
from ctxtrain.data.codec import Codec
from ctxtrain.data.drift import drift
from ctxtrain.data.leakage import Finding, find_leaks, purged_rows, told, unchecked, unplaced
from ctxtrain.data.notices import unit_line
from ctxtrain.data.oversampling import by_label, class_counts, oversampled_counts
from ctxtrain.data.positions import Places, spans_of
from ctxtrain.data.profile import RowNames, Survey, extent, noticed, readings, survey, wild_line, wild_prints
from ctxtrain.data.tokens import TokenStore
from ctxtrain.data.window_file import WindowFile
from ctxtrain.errors import ConfigError, DataError
from ctxtrain.labels import LABELS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Dataset:
    """By split: its rows, their names for messages, labels of shape (rows,), places in time and tokens.

    `counts_C` are the training rows per class, `epoch_counts_C` the windows per class of an oversampled epoch. `leaks`
    are the findings of `leakage.py`, `drift` those of `drift.py` for train and val; `extent` and `noticed` are those of
    `profile.py`, and `incomplete_fields` has the fields that some bars of a row lack, by file.
    """

    files: dict[str, WindowFile]
    names: dict[str, RowNames]
    labels: dict[str, Ints]
    places: dict[str, Places]
    tokens: dict[str, Tokens]
    codec: Codec
    partial_fields: dict[str, int]
    counts_C: Ints
    epoch_counts_C: Ints
    class_weights: list[float]
    max_tokens: int
    leaks: list[Finding]
    unchecked: list[str]
    drift: list[dict[str, Any]]
    extent: dict[str, dict[str, Any]]
    noticed: dict[str, list[str]]
    incomplete_fields: dict[str, dict[str, dict[str, int]]]

    @property
    def leaked(self) -> str:
        """What stands in two files although it was allowed, or nothing."""
        refused = [leak for leak in self.leaks if leak["refused"]]
        return "; ".join(f"{leak['count']:,} × {leak['kind']} in {' and '.join(leak['files'])}" for leak in refused)

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
        notes += [
            f"{file.dropped:,} of {file.dropped + len(file):,} {name} rows are dropped: they share bars with, or lie "
            "too near to, rows that judge them"
            for name, file in self.files.items()
            if file.dropped
        ]
        if line := unit_line({name: found["time_unit"] for name, found in self.extent.items()}):
            notes.append(line)
        notes += [f"{name}: {line}" for name, lines in self.noticed.items() for line in lines]
        notes += [told(leak) for leak in self.leaks] + [f"not looked for: {what}" for what in self.unchecked]
        if moved := [entry for entry in self.drift if entry["shifted"]]:
            named = ", ".join(f"{entry['feature']} {entry['psi']:.2f}" for entry in moved[:5])
            notes.append(f"val differs from train in {len(moved)} numbers (population stability index): {named}")
        return notes

    def summary(self) -> dict[str, Any]:
        return {
            "rows": {name: len(names) for name, names in self.names.items()},
            "purged": {name: file.dropped for name, file in self.files.items()},
            "sha256": {name: file.reading.sha256 for name, file in self.files.items()},
            "classes": {name: by_label(class_counts(labels_N)) for name, labels_N in self.labels.items()},
            "before_oversampling": by_label(self.counts_C),
            "after_oversampling": by_label(self.epoch_counts_C),
            "class_weights": dict(zip(LABELS, self.class_weights, strict=True)),
            "codec": self.codec.kind,
            "partial_fields": self.partial_fields,
            "incomplete_fields": self.incomplete_fields,
            "noticed": self.noticed,
            "longest_text_tokens": {name: int(tokens.lengths.max()) for name, tokens in self.tokens.items()},
            "rows_cut_to_max_tokens": {name: tokens.cut for name, tokens in self.tokens.items()},
            "leaks": self.leaks,
            "leaked": self.leaked,
            "unchecked": self.unchecked,
            "drift": self.drift,
            "extent": self.extent,
        }

    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of labels and tokens of the splits that training and selection read."""
        return {name: self._fingerprint(name) for name in ("train", "val")}

    def _fingerprint(self, name: str) -> str:
        tokens = self.tokens[name]
        parts = (self.labels[name], tokens.lengths, tokens.digests())
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


@dataclass(frozen=True)
class Inputs:
    """The rows of each split, and the tokens that were made of them; several runs may share both."""

    files: Mapping[str, WindowFile]
    tokens: TokenStore = field(default_factory=TokenStore)


def load_dataset(
    inputs: Inputs,
    tokenizer: PreTrainedTokenizerBase,
    *,
    codec: Literal["compact", "json"],
    max_tokens: int,
    oversampling: Literal["auto", "none"] | int,
    max_repeat: float | None,
    weights: Literal["auto", "none"] | Sequence[float],
    purge: bool = False,
    embargo: int = 0,
    allow_leakage: bool = False,
) -> Dataset:
    """Read `train`, `val` and, where given, `test`.

    Raises one DataError with the faults of all files, or with all windows and ids that stand in two of them.
    """
    surveys, placeless = read_splits(inputs.files, purge=purge, embargo=embargo)
    found = noticed(surveys)
    for name, one in surveys.items():
        found.setdefault(name, []).extend(wild_line(field, wild) for field, wild in wild_prints(one).items())
    for name, count in placeless.items():
        found[name].append(f"{count:,} of the rows dropped have no place in time, so they may share bars with others")
    fitted = surveys["train"].fields.fit(codec)
    labels = {name: one.labels_N for name, one in surveys.items()}
    counts_C = class_counts(labels["train"])
    epoch_counts_C = oversampled_counts(counts_C, oversampling, max_repeat)
    walked = {name: one.file for name, one in surveys.items()}
    tokens = inputs.tokens.tokens(walked, fitted, tokenizer, max_tokens)
    leaks = find_leaks(surveys, {name: rows.digests() for name, rows in tokens.items()})
    refused = [told(leak) for leak in leaks if leak["refused"]]
    if refused and not allow_leakage:
        raise DataError(refused)
    return Dataset(
        files=walked,
        names={name: one.names for name, one in surveys.items()},
        labels=labels,
        places={name: one.places for name, one in surveys.items()},
        tokens=tokens,
        codec=fitted,
        partial_fields=surveys["train"].fields.partial_fields(),
        counts_C=counts_C,
        epoch_counts_C=epoch_counts_C,
        class_weights=class_weights(epoch_counts_C, weights),
        max_tokens=max_tokens,
        leaks=leaks,
        unchecked=unchecked(surveys),
        drift=drift(surveys["train"], surveys["val"]),
        extent={name: extent(one) for name, one in surveys.items()},
        noticed=found,
        incomplete_fields={name: reading.noticed.incomplete() for name, reading in readings(surveys).items()},
    )


def read_splits(
    files: Mapping[str, WindowFile], *, purge: bool = False, embargo: int = 0
) -> tuple[dict[str, Survey], dict[str, int]]:
    """Walk through the rows of a run, and leave out the purged ones. Raises DataError with all faults.

    The second value counts, by split, the purged rows that say no place in time.
    """
    surveys = _surveys(files)
    return _purged(surveys, embargo) if purge else (surveys, {})


def _surveys(files: Mapping[str, WindowFile]) -> dict[str, Survey]:
    """Walk through all files. Raises one DataError with the faults of all."""
    found = {split: survey(file) for split, file in files.items()}
    errors = [error for _, error in found.values() if error]
    if errors:
        faults = [fault for error in errors for fault in error.faults]
        raise DataError(faults, total=sum(error.total for error in errors))
    return {split: one for split, (one, _) in found.items()}


def _purged(surveys: dict[str, Survey], embargo: int) -> tuple[dict[str, Survey], dict[str, int]]:
    """The surveys without the rows that share bars with, or lie too near, rows that judge them; and how many rows of
    each file went because they have no place.
    """
    try:
        gone = {name: rows for name, rows in purged_rows(surveys, embargo).items() if len(rows)}
    except ValueError as error:
        raise ConfigError(
            f"data.purge needs to know where windows lie, but {error}. Give every bar a time of one kind, or set it to "
            "false."
        ) from None
    for name, rows in gone.items():
        if len(rows) == len(surveys[name]):
            raise DataError(
                f"data.purge must leave rows, but all {len(rows):,} of {name} share bars with, or lie within "
                f"data.embargo={embargo} bars of, rows that judge them. Split the files by time."
            )
    spans = spans_of({name: one.places for name, one in surveys.items()})
    placeless = {name: count for name, count in unplaced(spans).items() if name in gone} if spans else {}
    left = {name: surveys[name].file.without(rows) for name, rows in gone.items()}
    return surveys | _surveys(left), placeless
