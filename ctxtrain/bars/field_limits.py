"""The ranges that a row allows for its bar fields.

Input: columns of numbers. Output: nothing, or a DataError with each value beyond the range of its field, so that no row
is written that is refused when it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args, get_type_hints

import numpy as np
from numpy.typing import NDArray
from pydantic.fields import FieldInfo

from ctxtrain.data.row_schema import MAX_MAGNITUDE, Bar
from ctxtrain.errors import MAX_FAULTS_SHOWN, DataError

Floats = NDArray[np.float64]


def _bounds(hint: Any) -> dict[str, float]:
    """The bounds `ge` and `le` that are declared anywhere in a type."""
    found: dict[str, float] = {}
    for part in get_args(hint) or getattr(hint, "__metadata__", ()):
        if isinstance(part, FieldInfo):
            for rule in part.metadata:
                found |= {key: getattr(rule, key) for key in ("ge", "le") if hasattr(rule, key)}
        else:
            found |= _bounds(part)
    return found


_LIMITS = {name: _bounds(hint) for name, hint in get_type_hints(Bar, include_extras=True).items()}


def require_limits(columns: Mapping[str, Floats], place: Callable[[int], str]) -> None:
    """Raises DataError with every column's values beyond its range; NaN is within."""
    faults, total = list[str](), 0
    for name, values in columns.items():
        bounds = _LIMITS.get(name, {})
        least, most = bounds.get("ge", -MAX_MAGNITUDE), bounds.get("le", MAX_MAGNITUDE)
        wrong = np.flatnonzero((values < least) | (values > most))
        total += len(wrong)
        remedy = f"Correct the file, or name another column with --columns {name}=…"
        faults += [
            f"{place(row)}: {name} must be from {least:g} to {most:g}, got {values[row]:g}. {remedy}"
            for row in wrong[:MAX_FAULTS_SHOWN].tolist()
        ]
    if faults:
        raise DataError(faults, total=total)
