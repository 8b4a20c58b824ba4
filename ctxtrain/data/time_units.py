"""What a time of a row is: its unit, told from the value, and the moment in nanoseconds since 1970.

Comes in: ISO 8601 text, or a number. Goes out: whole nanoseconds and the name of the unit, exact however the time was
written. A number is seconds, milli-, micro- or nanoseconds since 1970 if that puts it between 1973 (for milliseconds
1979, for nanoseconds 2001) and May 2033; these ranges do not meet. Beyond lie other clocks: 2401020930 is January 2024
as yymmddhhmm, 638396658000000000 the same in .NET's ticks. A number below 10⁸ counts from anywhere, in a unit nobody
knows, and is comparable with others of its kind only. Any other number has no unit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from ctxtrain.errors import shown

SECOND = 1_000_000_000
DAY = 86_400 * SECOND
ISO, NAIVE = "ISO 8601 text", "ISO 8601 text without a zone, taken as UTC"
NUMBER = "plain numbers of no known unit"
_EPOCH, _NAIVE_EPOCH = datetime(1970, 1, 1, tzinfo=UTC), datetime(1970, 1, 1)  # noqa: DTZ001  # no zone is UTC
_EARLIEST, _LATEST = (round((datetime(year, 1, 1, tzinfo=UTC) - _EPOCH).total_seconds()) for year in (1800, 2200))
_PLAIN = 10**8
_LAST = 2 * 10**9  # seconds that a number may say
# The least of each, and how many of them a second has. 201,012,312,359 is December 2010 in digits, not 1976.
UNITS = {
    "seconds since 1970": (_PLAIN, 1),
    "milliseconds since 1970": (3 * 10**11, 10**3),
    "microseconds since 1970": (10**14, 10**6),
    "nanoseconds since 1970": (10**18, 10**9),
}
_BEYOND_MICROSECONDS = re.compile(r"[.,]\d{6}(\d{1,3})")  # which datetime cuts off
# What exporters call the time of a bar, the likeliest first; without case, blanks, - and _.
_SPELLINGS = (
    "time", "timestamp", "datetime", "date", "ts", "t", "opentime", "closetime", "bartime", "timeutc", "datetimeutc",
    "timestamputc", "dateutc", "utc", "starttime", "endtime", "opentimestamp", "closetimestamp", "barstart", "barend",
    "epoch", "unix", "unixtime", "unixtimestamp", "epochtime", "timems", "timestampms", "dt", "opents", "closets",
)  # fmt: skip
# Words in the name of a number that make it a time. Not open, close and end, as open_interest is none.
_TIME_WORDS = frozenset(
    {"date", "datetime", "dt", "epoch", "begin", "gmt", "start", "time", "timestamp", "ts", "unix", "utc"}
)
_WORD = re.compile(r"[A-Z]*[a-z]+|[A-Z]+")


def nanoseconds(value: object) -> tuple[int, str]:
    """The moment and its unit. Raises ValueError, with the rule and the value, for anything else."""
    if isinstance(value, str):
        return _of_text(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"must be ISO 8601 text or a number, got {shown(value)}")  # noqa: TRY004  # a fault of a row
    if -_PLAIN < value < _PLAIN:
        return _scaled(value, 1), NUMBER
    for unit, (least, in_a_second) in UNITS.items():
        if least <= value < _LAST * in_a_second:
            return _scaled(value, in_a_second), unit
    raise ValueError(
        "must be ISO 8601 text, or seconds, milli-, micro- or nanoseconds since 1970 (nanoseconds from 2001 on, all to "
        f"May 2033), or a number below {_PLAIN:,}, got {shown(value)}. Write other clocks as ISO 8601"
    )


def _of_text(value: str) -> tuple[int, str]:
    if len(value) > len("20250303") and value.isdigit():  # datetime takes the ninth digit for the T of a date
        raise ValueError(f"must be ISO 8601 text or a number, got {shown(value)}. Write numbers without quotes")
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise ValueError(f"must be ISO 8601 text or a number, got {shown(value)}") from None
    since = moment - (_EPOCH if moment.tzinfo else _NAIVE_EPOCH)
    seconds = since.days * 86_400 + since.seconds
    if not _EARLIEST <= seconds < _LATEST:
        raise ValueError(f"must lie in the years 1800 to 2199, got {shown(value)}")
    finer = _BEYOND_MICROSECONDS.search(value) if len(value) > len("20250303T140000.123456") else None
    stamp = seconds * SECOND + since.microseconds * 1000 + (int(finer[1].ljust(3, "0")) if finer else 0)
    return stamp, ISO if moment.tzinfo else NAIVE


def _scaled(value: float, in_a_second: int) -> int:
    """Exact for whole numbers, and to the last digit for others."""
    whole = int(value)
    each = SECOND // in_a_second
    return whole * each + round((value - whole) * each)


def moment(stamp: int) -> str:
    """ISO 8601 in UTC of nanoseconds since 1970, to the second."""
    return (_EPOCH + timedelta(seconds=stamp // SECOND)).isoformat(timespec="seconds")


def time_names(names: Iterable[str]) -> list[str]:
    """Those of the names that are a spelling of `time`, the likeliest first."""
    ranked = [(_rank(name), name) for name in names if isinstance(name, str)]
    return [name for rank, name in sorted(ranked) if rank < len(_SPELLINGS)]


def is_named_like_a_time(name: str) -> bool:
    """Whether a word of the name says so: `ts_event`, `unix_ms`, `window_start`, `klineOpenTime`."""
    words = [word.lower() for word in _WORD.findall(name)]
    return any(word in _TIME_WORDS or word.endswith(("time", "timestamp")) for word in words)


def _rank(name: str) -> int:
    plain = name.lower().translate({ord(mark): None for mark in " -_"})
    return _SPELLINGS.index(plain) if plain in _SPELLINGS else len(_SPELLINGS)
