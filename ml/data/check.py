"""A look at the rows before anything is trained on them.

Comes in: paths by split. Goes out: a report as plain values: rows, classes, all faults, what stands in two files,
and the fields that no model reads.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from ml.data.codec import CodecFitter
from ml.data.rows import Window
from ml.data.windows import Reading, WindowFile
from ml.errors import MAX_FAULTS_SHOWN, DataError
from ml.labels import LABELS

EXAMPLES = 5


@dataclass
class _Survey:
    """What is kept of a file that was walked through: `keys` holds pairs of a key and the place of its row, by kind."""

    reading: Reading
    classes: Counter[int | None] = field(default_factory=Counter)
    fields: CodecFitter = field(default_factory=CodecFitter)
    keys: dict[str, list[tuple[str, str]]] = field(default_factory=lambda: {"identical window": [], "same id": []})


def check_files(paths: Mapping[str, Path | None]) -> dict[str, Any]:
    """Read every file given, keep going past faults, and report on all of them."""
    surveys = {name: _survey(path) for name, path in paths.items() if path is not None}
    faults = [fault for survey in surveys.values() for fault in survey.reading.faults]
    return {
        "rows": {name: survey.reading.rows for name, survey in surveys.items()},
        "classes": {
            name: {label: survey.classes[c] for c, label in enumerate(LABELS)} for name, survey in surveys.items()
        },
        "faults": faults[:MAX_FAULTS_SHOWN],
        "fault_total": sum(survey.reading.fault_total for survey in surveys.values()),
        "leaks": [leak for pair in combinations(surveys, 2) for leak in _shared(pair, surveys)],
        "partial_fields": {name: survey.fields.partial_fields() for name, survey in surveys.items() if survey.classes},
        "unused_fields": sorted({name for survey in surveys.values() for name in survey.reading.ignored_fields}),
    }


def _survey(path: Path) -> _Survey:
    file = WindowFile(path)
    survey = _Survey(file.reading)
    try:
        for window in file:
            survey.classes[window.label] += 1
            survey.fields.see(window)
            survey.keys["identical window"].append((_content(window), window.place))
            if window.id is not None:
                survey.keys["same id"].append((window.id, window.place))
        survey.reading = file.reading
    except DataError as error:
        survey.reading = Reading(str(path), faults=error.faults, fault_total=error.total)
    return survey


def _shared(names: tuple[str, str], surveys: Mapping[str, _Survey]) -> list[dict[str, Any]]:
    """Windows and ids that stand in both of two files."""
    first, second = (surveys[name] for name in names)
    leaks = []
    for kind, keys in first.keys.items():
        places = dict(keys)
        pairs = [[places[key], place] for key, place in second.keys[kind] if key in places]
        if pairs:
            leaks.append({"kind": kind, "files": list(names), "count": len(pairs), "examples": pairs[:EXAMPLES]})
    return leaks


def _content(window: Window) -> str:
    """SHA-256 of everything of a window that a model could read."""
    digest = hashlib.sha256((window.text or "").encode())
    for name, values in window.bars.items():
        digest.update(name.encode() + values.tobytes())
    digest.update(repr(sorted(window.features.items())).encode())
    return digest.hexdigest()
