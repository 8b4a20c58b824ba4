"""The rows of a run, ready for training: read, purged, balanced, rendered, tokenised, checked for leaks.

Input: paths of the splits and a tokenizer. Output: a `Dataset` with labels, names and tokens by split (`train`, `val`
and optionally `test`), the codec, class counts and weights, and all findings about the rows.

Each file is parsed once, into a table on disk. Its windows are then read twice: for a `Survey`, and to render and
tokenise. Purging reads them once more. Windows, columns and tokens stay on disk.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ctxtrain.data.class_weights import class_weights
from ctxtrain.data.codec import Codec
from ctxtrain.data.drift import drift
from ctxtrain.data.label_rule import find_label_rule
from ctxtrain.data.leakage import Finding, describe_finding, find_leaks, skipped_checks
from ctxtrain.data.mirror import fit_with_twins, require_partners
from ctxtrain.data.notices import time_unit_message
from ctxtrain.data.oversampling import by_label, class_counts, oversampled_counts
from ctxtrain.data.positions import WindowPositions, common_spans
from ctxtrain.data.profile import (
    RowNames,
    Survey,
    extent,
    outlier_message,
    outlier_summary,
    reports,
    row_notices,
    survey,
)
from ctxtrain.data.separation import Auto, Separation, count_unpositioned, plan_separation, purged_rows
from ctxtrain.data.token_store import TokenStore
from ctxtrain.data.tokens import Tokens
from ctxtrain.data.training_rows import Augmentation, TrainingRows, make_training_rows
from ctxtrain.data.window_file import WindowFile
from ctxtrain.errors import ConfigError, DataError
from ctxtrain.labels import LABELS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Dataset:
    """Rows by split, with their names for messages, labels of shape (rows,), positions and tokens.

    `training` are the rows that an epoch draws from, with augmentation. `counts_C` are these rows per class,
    `epoch_counts_C` the windows per class of an oversampled epoch. `leaks`
    are the findings of `leakage.py`, `drift` those of `drift.py` for train and val, `extent` and `notices` those of
    `profile.py`. `incomplete_fields` lists, by file, the fields that some bars of a row lack.
    """

    files: dict[str, WindowFile]
    names: dict[str, RowNames]
    labels: dict[str, Ints]
    positions: dict[str, WindowPositions]
    tokens: dict[str, Tokens]
    training: TrainingRows
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
    notices: dict[str, list[str]]
    incomplete_fields: dict[str, dict[str, dict[str, int]]]

    @property
    def leaked(self) -> str:
        """The leaks that training accepts only with `data.allow_leakage`, or ""."""
        refused = [leak for leak in self.leaks if leak["refused"]]
        return "; ".join(f"{leak['count']:,} × {leak['kind']} in {' and '.join(leak['files'])}" for leak in refused)

    def notes(self) -> list[str]:
        """Facts about the rows that are no faults but that a user should know."""
        notes = [
            f"{name} is in {count:,} of {len(self.names['train']):,} training rows; "
            "the model reads only fields that every row has"
            for name, count in self.partial_fields.items()
        ]
        notes += [
            f"{tokens.truncated:,} of {len(tokens):,} {name} rows are longer than model.max_tokens={self.max_tokens} "
            "and lose their oldest tokens"
            for name, tokens in self.tokens.items()
            if tokens.truncated
        ]
        for name, labels_N in self.labels.items():
            absent = [label for label, count in by_label(class_counts(labels_N)).items() if not count]
            if absent:
                notes.append(f"{name} has no {', '.join(absent)} rows; a class without rows scores 0")
        notes += [
            f"{file.dropped:,} of {file.dropped + len(file):,} {name} rows are dropped: they share bars with, "
            "or lie too close to, rows of a later split"
            for name, file in self.files.items()
            if file.dropped
        ]
        if line := time_unit_message({name: facts["time_unit"] for name, facts in self.extent.items()}):
            notes.append(line)
        notes += self.training.notes()
        notes += [f"{name}: {line}" for name, lines in self.notices.items() for line in lines]
        notes += [describe_finding(leak) for leak in self.leaks] + [f"not checked: {check}" for check in self.unchecked]
        if shifted := [entry for entry in self.drift if entry["shifted"]]:
            largest = ", ".join(f"{entry['feature']} {entry['psi']:.2f}" for entry in shifted[:5])
            notes.append(f"val differs from train in {len(shifted)} numbers (population stability index): {largest}")
        return notes

    def summary(self) -> dict[str, Any]:
        return {
            "rows": {name: len(names) for name, names in self.names.items()},
            "purged": {name: file.dropped for name, file in self.files.items()},
            "sha256": {name: file.report.sha256 for name, file in self.files.items()},
            "classes": {name: by_label(class_counts(labels_N)) for name, labels_N in self.labels.items()},
            "before_oversampling": by_label(self.counts_C),
            "after_oversampling": by_label(self.epoch_counts_C),
            "class_weights": dict(zip(LABELS, self.class_weights, strict=True)),
            "augmentation": self.training.summary(),
            "codec": self.codec.kind,
            "partial_fields": self.partial_fields,
            "incomplete_fields": self.incomplete_fields,
            "noticed": self.notices,
            "longest_text_tokens": {name: int(tokens.lengths.max()) for name, tokens in self.tokens.items()},
            "rows_cut_to_max_tokens": {name: tokens.truncated for name, tokens in self.tokens.items()},
            "leaks": self.leaks,
            "leaked": self.leaked,
            "unchecked": self.unchecked,
            "drift": self.drift,
            "extent": self.extent,
        }

    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of labels and tokens of train and val, the splits that training and model selection read."""
        return {name: self._fingerprint(name) for name in ("train", "val")}

    def _fingerprint(self, name: str) -> str:
        tokens = self.tokens[name]
        parts = (self.labels[name], tokens.lengths, tokens.digests())
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


@dataclass(frozen=True)
class Inputs:
    """The rows and tokens of each split; several runs may share them."""

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
    purge: bool | Auto = "auto",
    embargo: int | Auto = "auto",
    label_horizon: int | None = None,
    allow_leakage: bool = False,
    augmentation: Augmentation = Augmentation(),  # noqa: B008  # a tuple
) -> Dataset:
    """Read `train`, `val` and, if present, `test`. Purge, embargo and label horizon are those of `plan_separation`.

    Raises one DataError with the faults of all files, or with all windows and ids that occur in two of them.
    """
    surveys, separation, unpositioned = read_splits(inputs.files, purge, embargo, label_horizon)
    notices = _notices(surveys)
    notices["train"] = [*separation.notes, *_rule_notes(surveys), *notices["train"]]
    for name, count in unpositioned.items():
        notices[name].append(f"{count:,} of the dropped rows have no position in time and may share bars with others")
    fitted = fit_codec_of_run(surveys["train"], codec, augmentation)
    for name, surveyed in surveys.items():
        notices.setdefault(name, []).extend(surveyed.fields.differences(fitted))
    labels = {name: surveyed.labels_N for name, surveyed in surveys.items()}
    files = {name: surveyed.file for name, surveyed in surveys.items()}
    tokens = inputs.tokens.tokens(files, fitted, tokenizer, max_tokens)
    training = make_training_rows(
        surveys["train"], tokens["train"], inputs.tokens, fitted, tokenizer, max_tokens, augmentation
    )
    counts_C = class_counts(training.labels_R)
    epoch_counts_C = oversampled_counts(counts_C, oversampling, max_repeat)
    leaks = find_leaks(surveys, {name: rows.digests() for name, rows in tokens.items()}, separation.horizon)
    refused = [describe_finding(leak) for leak in leaks if leak["refused"]]
    if refused and not allow_leakage:
        raise DataError(refused)
    return Dataset(
        files=files,
        names={name: surveyed.names for name, surveyed in surveys.items()},
        labels=labels,
        positions={name: surveyed.positions for name, surveyed in surveys.items()},
        tokens=tokens,
        training=training,
        codec=fitted,
        partial_fields=surveys["train"].fields.partial_fields(),
        counts_C=counts_C,
        epoch_counts_C=epoch_counts_C,
        class_weights=class_weights(epoch_counts_C, weights),
        max_tokens=max_tokens,
        leaks=leaks,
        unchecked=skipped_checks(surveys),
        drift=drift(surveys["train"], surveys["val"]),
        extent={name: extent(surveyed) for name, surveyed in surveys.items()},
        notices=notices,
        incomplete_fields={name: report.notices.incomplete() for name, report in reports(surveys).items()},
    )


def _notices(surveys: Mapping[str, Survey]) -> dict[str, list[str]]:
    """Those of `row_notices`, then the outliers."""
    notices = row_notices(surveys)
    for name, surveyed in surveys.items():
        outliers = outlier_summary(surveyed)
        notices.setdefault(name, []).extend(outlier_message(field, facts) for field, facts in outliers.items())
    return notices


def fit_codec_of_run(train: Survey, kind: Literal["compact", "json"], augmentation: Augmentation) -> Codec:
    """The codec of the training rows. Raises DataError or ConfigError if they do not fit the settings."""
    train.fields.require_own_fields()
    augmentation.require_bars(train)
    codec = train.fields.fit(kind)
    if not augmentation.mirror:
        return codec
    require_partners(codec)
    return fit_with_twins(kind, train.file, train.file.own)


def _rule_notes(surveys: Mapping[str, Survey]) -> list[str]:
    """A note if a rule reproduces the labels."""
    try:
        rule = find_label_rule(surveys)
    except ValueError:
        return []
    return [f"{rule}. ctxtrain check prints the rule"] if rule else []


def read_splits(
    files: Mapping[str, WindowFile],
    purge: bool | Auto = "auto",
    embargo: int | Auto = "auto",
    label_horizon: int | None = None,
) -> tuple[dict[str, Survey], Separation, dict[str, int]]:
    """Read the rows of a run and drop those that the `Separation` requires. Raises DataError with all faults.

    The third value counts, by split, the dropped rows that have no position in time.
    """
    surveys = _read_surveys(files)
    separation = plan_separation(surveys, purge=purge, embargo=embargo, configured_horizon=label_horizon)
    if not separation.purge:
        return surveys, separation, {}
    surveys, unpositioned = _drop_purged(surveys, separation.embargo)
    return surveys, separation, unpositioned


def _read_surveys(files: Mapping[str, WindowFile]) -> dict[str, Survey]:
    """Read all files. Raises one DataError with all faults."""
    results = {split: survey(file) for split, file in files.items()}
    errors = [error for _, error in results.values() if error]
    if errors:
        faults = [fault for error in errors for fault in error.faults]
        hidden = sum((error.hidden for error in errors), Counter[str]())
        raise DataError(faults, total=sum(error.total for error in errors), hidden=hidden)
    return {split: surveyed for split, (surveyed, _) in results.items()}


def _drop_purged(surveys: dict[str, Survey], embargo: int) -> tuple[dict[str, Survey], dict[str, int]]:
    """The surveys without purged rows, and by file the number of rows purged for lack of a position.

    Rows are purged if they share bars with, or lie too close to, rows of a later split.
    """
    try:
        purged = {name: rows for name, rows in purged_rows(surveys, embargo).items() if len(rows)}
    except ValueError as error:
        raise ConfigError(
            f"data.purge needs the position of each window, but {error}. Give every bar a time of one kind, or set "
            "data.purge=false."
        ) from None
    for name, rows in purged.items():
        if len(rows) == len(surveys[name]):
            raise DataError(
                f"data.purge must leave rows, but all {len(rows):,} of {name} share bars with, or lie within "
                f"{embargo:,} bars of, rows of a later split. Split the files by time, or set data.purge=false."
            )
    spans = common_spans({name: surveyed.positions for name, surveyed in surveys.items()})
    unpositioned = {name: count for name, count in count_unpositioned(spans).items() if name in purged} if spans else {}
    remaining = {name: surveys[name].file.without(rows) for name, rows in purged.items()}
    return surveys | _read_surveys(remaining), unpositioned
