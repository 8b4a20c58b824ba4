"""A look at the rows before anything is trained on them.

Comes in: paths by split. Goes out: a report as plain values: rows, classes, all faults, what stands in two files,
and the fields that no model reads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from ml.data.codec import partial_fields
from ml.data.sampling import by_label, class_counts, labels_of
from ml.data.windows import Reading, Window, read_windows
from ml.errors import MAX_FAULTS_SHOWN, DataError

EXAMPLES = 5


def check_files(paths: Mapping[str, Path | None]) -> dict[str, Any]:
    """Read every file given, keep going past faults, and report on all of them."""
    readings: dict[str, Reading] = {}
    faults: list[str] = []
    for name, path in paths.items():
        if path is None:
            continue
        try:
            readings[name] = read_windows(path)
        except DataError as error:
            readings[name] = Reading(str(path), faults=error.faults, fault_total=error.total)
        faults += readings[name].faults
    return {
        "rows": {name: reading.rows for name, reading in readings.items()},
        "classes": {name: by_label(class_counts(labels_of(r.windows))) for name, r in readings.items()},
        "faults": faults[:MAX_FAULTS_SHOWN],
        "fault_total": sum(reading.fault_total for reading in readings.values()),
        "leaks": [
            leak
            for first, second in combinations(readings, 2)
            for leak in _shared((first, second), readings[first].windows, readings[second].windows)
        ],
        "partial_fields": {name: partial_fields(r.windows) for name, r in readings.items() if r.windows},
        "unused_fields": sorted({field for reading in readings.values() for field in reading.ignored_fields}),
    }


def _shared(files: tuple[str, str], first: list[Window], second: list[Window]) -> list[dict[str, Any]]:
    """Windows and ids that stand in both of two files."""
    leaks = []
    for kind, key_of in (("identical window", _content), ("same id", lambda window: window.id)):
        places = {key_of(window): window.place for window in first}
        pairs = [
            [places[key], window.place] for window in second if (key := key_of(window)) is not None and key in places
        ]
        if pairs:
            leaks.append({"kind": kind, "files": list(files), "count": len(pairs), "examples": pairs[:EXAMPLES]})
    return leaks


def _content(window: Window) -> str:
    """SHA-256 of everything of a window that a model could read."""
    digest = hashlib.sha256((window.text or "").encode())
    for name, values in window.bars.items():
        digest.update(name.encode() + values.tobytes())
    digest.update(repr(sorted(window.features.items())).encode())
    return digest.hexdigest()
