"""A look at the rows before anything is trained on them.

Comes in: paths by split, and the tokenizer of a base. Goes out: a report as plain values: rows, classes over time, all
faults, leaks, drift, lengths, and the fields that no model reads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ctxtrain.data.codec import Codec
from ctxtrain.data.columns import DiskColumn
from ctxtrain.data.drift import drift
from ctxtrain.data.duplicates import Twins
from ctxtrain.data.leakage import find_leaks, unchecked
from ctxtrain.data.oversampling import by_label, class_counts, require_every_class
from ctxtrain.data.parse_window import LABEL_SIDE
from ctxtrain.data.positions import spans_of
from ctxtrain.data.profile import Hashes, Survey, extent, noticed, survey, wild_prints
from ctxtrain.data.window_file import WindowFile
from ctxtrain.errors import MAX_FAULTS_SHOWN, DataError

_EMBEDDED = Path(__file__).parents[1] / "assets" / "base" / "tokenizer.json"
PARTS = 5  # of a file, of equally many rows, to show how the classes change over time


def check_files(
    paths: Mapping[str, Path | None], tokenizer: Tokenizer | None = None, max_tokens: int = 2048
) -> dict[str, Any]:
    """Read every file given, keep going past faults, and report on all of them.

    Tokens are counted with the tokenizer of a base, else with that of the embedded one.
    """
    found = {name: survey(WindowFile(path)) for name, path in paths.items() if path is not None}
    surveys = {name: one for name, (one, _) in found.items() if len(one)}
    faults = [fault for _, error in found.values() if error for fault in error.faults]
    total = sum(error.total for _, error in found.values() if error)
    texts: dict[str, Hashes] = {}
    tokens: dict[str, dict[str, int]] = {}
    if "train" in surveys and not faults:
        codec, tokenizer = surveys["train"].fields.fit("compact"), tokenizer or embedded_tokenizer()
        for name, one in surveys.items():
            try:
                texts[name], tokens[name] = _rendered(one, codec, tokenizer, max_tokens)
            except DataError as error:
                faults, total = faults + error.faults, total + error.total
    if "train" in found and not found["train"][1]:  # faulty rows may be those that lack
        try:
            require_every_class(class_counts(surveys["train"].labels_N))
        except DataError as error:
            faults, total = faults + error.faults, total + error.total
    ignored = {name for one, _ in found.values() for name in one.file.reading.ignored_fields}
    whole = "train" in surveys and texts.keys() == surveys.keys()
    return {
        "rows": {name: one.file.reading.rows for name, (one, _) in found.items()},
        "classes": {name: by_label(class_counts(one.labels_N)) for name, (one, _) in found.items()},
        "classes_over_time": {name: _over_time(one) for name, one in surveys.items()},
        "faults": faults[:MAX_FAULTS_SHOWN],
        "fault_total": total,
        "leaks": find_leaks(surveys, texts if whole else {}) if "train" in surveys else [],
        "unchecked": unchecked(surveys),
        "duplicates": {name: _repeated(name, one) for name, one in surveys.items()},
        "drift": {
            name: drift(surveys["train"], one)
            for name, one in surveys.items()
            if name != "train" and "train" in surveys
        },
        "bars": {name: _spread(one.bars_N) for name, one in surveys.items()},
        "tokens": tokens,
        "times": {name: extent(one) for name, one in surveys.items()},
        "partial_fields": {name: one.fields.partial_fields() for name, one in surveys.items()},
        "incomplete_fields": {name: one.file.reading.noticed.incomplete() for name, one in surveys.items()},
        "wild_prints": {name: wild_prints(one) for name, one in surveys.items()},
        "noticed": noticed(surveys),
        "unused_fields": sorted(ignored),
        "label_side_fields": sorted(name for name in ignored if name.removeprefix("bars.") in LABEL_SIDE),
    }


def embedded_tokenizer() -> Tokenizer:
    """That of the embedded base, read without transformers, which takes seconds to import."""
    return Tokenizer.from_file(str(_EMBEDDED))


def _rendered(one: Survey, codec: Codec, tokenizer: Tokenizer, max_tokens: int) -> tuple[Hashes, dict[str, int]]:
    """A digest of each row's text, and how long the texts are."""
    digests, lengths = DiskColumn(("u8", (2,))), DiskColumn("i8")
    for text in codec.render_all(one.file):
        digest = hashlib.sha256(text.encode()).digest()
        digests.append((int.from_bytes(digest[:8]), int.from_bytes(digest[8:16])))
        lengths.append(len(tokenizer.encode(text).ids))
    cut = int((lengths.array() > max_tokens).sum())
    return digests.array(), _spread(lengths.array()) | {"max_tokens": max_tokens, "rows_cut": cut}


def _repeated(name: str, one: Survey) -> int:
    """Rows that hold a window which an earlier row of the file holds."""
    return sum(1 for _ in Twins({name: one}, spans_of({name: one.places})).repeated())


def _over_time(one: Survey) -> list[dict[str, Any]]:
    """Classes of the rows in their order, in five parts; the first and last row of each are named."""
    labels_N, parts = one.labels_N, np.array_split(np.arange(len(one)), min(PARTS, len(one)))
    return [
        {"first": one.names[part[0]], "last": one.names[part[-1]], **by_label(class_counts(labels_N[part]))}
        for part in parts
    ]


def _spread(lengths: Any) -> dict[str, int]:
    return {
        "shortest": int(lengths.min()),
        "median": int(np.median(lengths)),
        "longest": int(lengths.max()),
    }
