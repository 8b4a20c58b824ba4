"""Report on the rows of files, before any training.

Input: paths by split, and the tokenizer of a base model. Output: a report of plain values: row counts, classes over
time, all faults, leaks, drift, text lengths, and unused fields.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ctxtrain.data.codec import Codec
from ctxtrain.data.columns import DiskColumn
from ctxtrain.data.drift import drift
from ctxtrain.data.duplicates import DuplicateFinder
from ctxtrain.data.label_rule import LabelRule, find_label_rule
from ctxtrain.data.leakage import find_leaks, skipped_checks
from ctxtrain.data.oversampling import by_label, class_counts, require_every_class
from ctxtrain.data.positions import common_spans
from ctxtrain.data.profile import Hashes, Survey, extent, outlier_summary, row_notices, survey
from ctxtrain.data.row_schema import LABEL_DERIVED_FIELDS, NO_FIELDS, OwnFields, check_own_fields
from ctxtrain.data.separation import Horizon, label_horizon
from ctxtrain.data.window_file import WindowFile
from ctxtrain.errors import MAX_FAULTS_SHOWN, DataError

_EMBEDDED = Path(__file__).parents[1] / "assets" / "base" / "tokenizer.json"
PARTS = 5  # consecutive parts of a file, of equal size, for class counts over time


def check_files(
    paths: Mapping[str, object],
    tokenizer: Tokenizer | None = None,
    max_tokens: int = 2048,
    own: OwnFields = NO_FIELDS,
) -> dict[str, Any]:
    """Read every file to its end, even after faults, and report on all of them.

    Tokens are counted with `tokenizer`, by default that of the embedded base. `own` are the bar fields that the user
    declares. Raises ConfigError if they cannot be declared.
    """
    check_own_fields(own)
    results = {name: survey(WindowFile(path, own=own)) for name, path in paths.items() if path is not None}
    surveys = {name: surveyed for name, (surveyed, _) in results.items() if len(surveyed)}
    errors = [error for _, error in results.values() if error]
    notices = row_notices(surveys)
    texts: dict[str, Hashes] = {}
    tokens: dict[str, dict[str, int]] = {}
    if "train" in surveys and not errors:
        texts, tokens = _render(surveys, tokenizer or embedded_tokenizer(), max_tokens, notices, errors)
    if "train" in results and not results["train"][1]:  # with faults, the missing classes may be among the faulty rows
        try:
            require_every_class(class_counts(surveys["train"].labels_N))
        except DataError as error:
            errors.append(error)
    ignored = {name for surveyed, _ in results.values() for name in surveyed.file.report.ignored_fields}
    is_rendered = "train" in surveys and texts.keys() == surveys.keys()
    horizon = label_horizon(surveys) if surveys else Horizon()
    rule, unjudged = _label_rule(surveys)
    return {
        "rows": {name: surveyed.file.report.rows for name, (surveyed, _) in results.items()},
        "classes": {name: by_label(class_counts(surveyed.labels_N)) for name, (surveyed, _) in results.items()},
        "classes_over_time": {name: _over_time(surveyed) for name, surveyed in surveys.items()},
        "faults": [fault for error in errors for fault in error.faults][:MAX_FAULTS_SHOWN],
        "fault_total": sum(error.total for error in errors),
        "hidden_faults": dict(sum((error.hidden for error in errors), Counter[str]())),
        "leaks": find_leaks(surveys, texts if is_rendered else {}, horizon) if "train" in surveys else [],
        "unchecked": skipped_checks(surveys) + unjudged,
        "label_horizon": {"bars": horizon.bars, "source": horizon.source},
        "label_rule": rule and rule.to_dict(),
        "duplicates": {name: _count_duplicates(name, surveyed) for name, surveyed in surveys.items()},
        "drift": {
            name: drift(surveys["train"], surveyed)
            for name, surveyed in surveys.items()
            if name != "train" and "train" in surveys
        },
        "bars": {name: _spread(surveyed.bars_N) for name, surveyed in surveys.items()},
        "tokens": tokens,
        "times": {name: extent(surveyed) for name, surveyed in surveys.items()},
        "partial_fields": {name: surveyed.fields.partial_fields() for name, surveyed in surveys.items()},
        "incomplete_fields": {name: surveyed.file.report.notices.incomplete() for name, surveyed in surveys.items()},
        "wild_prints": {name: outlier_summary(surveyed) for name, surveyed in surveys.items()},
        "noticed": notices,
        "unused_fields": sorted(ignored),
        "label_side_fields": sorted(name for name in ignored if name.removeprefix("bars.") in LABEL_DERIVED_FIELDS),
    }


def embedded_tokenizer() -> Tokenizer:
    """The tokenizer of the embedded base, read without transformers, whose import takes seconds."""
    return Tokenizer.from_file(str(_EMBEDDED))


def _label_rule(surveys: Mapping[str, Survey]) -> tuple[LabelRule | None, list[str]]:
    """The rule that reproduces the labels, if there is one, or why that could not be checked."""
    if "train" not in surveys:
        return None, []
    try:
        return find_label_rule(surveys), []
    except ValueError as error:
        return None, [f"labels that a small decision tree reproduces: {error}"]


def _render(
    surveys: Mapping[str, Survey],
    tokenizer: Tokenizer,
    max_tokens: int,
    notices: dict[str, list[str]],
    errors: list[DataError],
) -> tuple[dict[str, Hashes], dict[str, dict[str, int]]]:
    """Digests and lengths of the texts by split; adds to `notices` and `errors` what the training rows decide."""
    texts: dict[str, Hashes] = {}
    tokens: dict[str, dict[str, int]] = {}
    try:
        surveys["train"].fields.require_own_fields()
        codec = surveys["train"].fields.fit("compact")
        for name, surveyed in surveys.items():
            notices[name] += surveyed.fields.differences(codec)
            texts[name], tokens[name] = _digest_texts(surveyed, codec, tokenizer, max_tokens)
    except DataError as error:
        errors.append(error)
    return texts, tokens


def _digest_texts(
    surveyed: Survey, codec: Codec, tokenizer: Tokenizer, max_tokens: int
) -> tuple[Hashes, dict[str, int]]:
    """A digest of the text of each row, and statistics of the text lengths."""
    digests, lengths = DiskColumn(("u8", (2,))), DiskColumn("i8")
    for text in codec.render_all(surveyed.file):
        digest = hashlib.sha256(text.encode()).digest()
        digests.append((int.from_bytes(digest[:8]), int.from_bytes(digest[8:16])))
        lengths.append(len(tokenizer.encode(text).ids))
    cut = int((lengths.array() > max_tokens).sum())
    return digests.array(), _spread(lengths.array()) | {"max_tokens": max_tokens, "rows_cut": cut}


def _count_duplicates(name: str, surveyed: Survey) -> int:
    """Number of rows whose window also occurs in an earlier row of the file."""
    return sum(1 for _ in DuplicateFinder({name: surveyed}, common_spans({name: surveyed.positions})).repeated())


def _over_time(surveyed: Survey) -> list[dict[str, Any]]:
    """Class counts of five consecutive parts of a file, each with the names of its first and last row."""
    labels_N, parts = surveyed.labels_N, np.array_split(np.arange(len(surveyed)), min(PARTS, len(surveyed)))
    return [
        {"first": surveyed.names[part[0]], "last": surveyed.names[part[-1]], **by_label(class_counts(labels_N[part]))}
        for part in parts
    ]


def _spread(lengths: Any) -> dict[str, int]:
    return {
        "shortest": int(lengths.min()),
        "median": int(np.median(lengths)),
        "longest": int(lengths.max()),
    }
