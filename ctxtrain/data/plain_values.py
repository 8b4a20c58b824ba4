"""Values of other types as the plain values that a row is parsed from, and what was changed to get them.

Input: values of Arrow columns, or Python objects such as datetime, Decimal and numpy scalars. Output: text, numbers,
true, false, null, lists and objects, as in JSON. Times become ISO 8601 text, without loss of nanoseconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_NAMES = 12  # of fields in a message


@dataclass
class Conversions:
    """Counts of values that are read as other values, by the name of their field."""

    nan: Counter[str] = field(default_factory=Counter)
    float32: Counter[str] = field(default_factory=Counter)

    def lines(self) -> Iterator[str]:
        """One message per kind of change."""
        if self.nan:
            total = self.nan.total()
            yield f"NaN counts as not given: {total:,} value{'' if total == 1 else 's'} of {_join(self.nan)}"
        if narrow := +self.float32:  # without fields that are null in every row
            yield (
                f"{_join(narrow)}: numbers of 32 bits have 7 digits, and are read as the shortest decimal number "
                "that they stand for, such as 4135.7 for 4135.7001953125"
            )


def _join(names: Counter[str]) -> str:
    shown = sorted(names)[:MAX_NAMES]
    return ", ".join(shown) + (f" and {len(names) - len(shown):,} more" if len(names) > len(shown) else "")


def shortest_decimals(values: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Numbers of 32 or 16 bits as the shortest decimal numbers that round to them."""
    return values.astype("U32").astype(np.float64)


def iso_texts(stamps: NDArray[np.int64], unit: str, *, has_zone: bool) -> list[str]:
    """ISO 8601 text of times since 1970 in `unit`: s, ms, us or ns. With a zone, the times are in UTC."""
    times = stamps.view(f"M8[{unit}]")
    whole = times.astype("M8[s]")
    times = whole if (whole == times).all() else times
    return [f"{text}Z" if has_zone else text for text in np.datetime_as_string(times).tolist()]


def decimal_number(value: Decimal) -> int | float:
    """A decimal as an integer, if its type has no fraction, or else as the nearest float."""
    exponent = value.as_tuple().exponent
    return int(value) if isinstance(exponent, int) and exponent >= 0 else float(value)
