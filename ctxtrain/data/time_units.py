"""Parse the times of rows: the unit, inferred from the value, and the time in nanoseconds since 1970.

Input: ISO 8601 text, or a number. Output: integer nanoseconds and the name of the unit, without loss of precision. A
number is seconds, milli-, micro- or nanoseconds since 1970 if that gives a time between 1973 (milliseconds: 1979,
nanoseconds: 2001) and May 2033; these ranges do not overlap. Numbers outside them come from other clocks: 2401020930 is
January 2024 as yymmddhhmm, and 638396658000000000 is the same in .NET ticks. A number below 10⁸ has an unknown origin
and unit, and is comparable only with other such numbers. Any other number is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from ctxtrain.errors import short_repr

SECOND = 1_000_000_000
DAY = 86_400 * SECOND
# Names of units. Cached tables contain them, so a change needs a new `table.VERSION`.
ISO, NAIVE = "ISO 8601 text", "ISO 8601 text without a zone, taken as UTC"
PLAIN_NUMBER = "plain numbers of no known unit"
_EPOCH, _NAIVE_EPOCH = datetime(1970, 1, 1, tzinfo=UTC), datetime(1970, 1, 1)  # noqa: DTZ001  # no zone means UTC
_EARLIEST, _LATEST = (round((datetime(year, 1, 1, tzinfo=UTC) - _EPOCH).total_seconds()) for year in (1800, 2200))
_PLAIN = 10**8
_LAST = 2 * 10**9  # in seconds; the end of all ranges, May 2033
# By unit: smallest number, and units per second. 201,012,312,359 is a date in December 2010 (yyyymmddhhmm), not 1976.
UNITS = {
    "seconds since 1970": (_PLAIN, 1),
    "milliseconds since 1970": (3 * 10**11, 10**3),
    "microseconds since 1970": (10**14, 10**6),
    "nanoseconds since 1970": (10**18, 10**9),
}
_BEYOND_MICROSECONDS = re.compile(r"[.,]\d{6}(\d{1,3})")  # which datetime truncates
# Names of the bar time in common exports, most likely first; compared without case, blanks, - and _.
_SPELLINGS = (
    "time", "timestamp", "datetime", "date", "ts", "t", "opentime", "closetime", "bartime", "timeutc", "datetimeutc",
    "timestamputc", "dateutc", "utc", "starttime", "endtime", "opentimestamp", "closetimestamp", "barstart", "barend",
    "epoch", "unix", "unixtime", "unixtimestamp", "epochtime", "timems", "timestampms", "dt", "opents", "closets",
)  # fmt: skip
# Words that mark a numeric field as a time. Not open, close or end: open_interest is no time.
_TIME_WORDS = frozenset(
    {"date", "datetime", "dt", "epoch", "begin", "gmt", "start", "time", "timestamp", "ts", "unix", "utc"}
)
_TIMEFRAME = re.compile(
    r"(?P<count>\d{1,5})\s*(?P<unit>s|secs?|seconds?|m|mins?|minutes?|h|hours?|d|days?|w|weeks?)?|(?P<before>[smhdw])(?P<after>\d{0,5})",
    re.ASCII,
)
_TIMEFRAME_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_WORD = re.compile(r"[A-Z]*[a-z]+|[A-Z]+")


def parse_time(value: object) -> tuple[int, str]:
    """The time in nanoseconds since 1970, and its unit. Raises ValueError with the rule and the value."""
    if isinstance(value, str):
        return _parse_text(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"must be ISO 8601 text or a number, got {short_repr(value)}")  # noqa: TRY004  # row fault
    if -_PLAIN < value < _PLAIN:
        return _to_nanoseconds(value, 1), PLAIN_NUMBER
    for unit, (minimum, per_second) in UNITS.items():
        if minimum <= value < _LAST * per_second:
            return _to_nanoseconds(value, per_second), unit
    raise ValueError(
        "must be ISO 8601 text, or seconds, milli-, micro- or nanoseconds since 1970 (nanoseconds: from 2001, all: to "
        f"May 2033), or a number below {_PLAIN:,}, got {short_repr(value)}. Convert other clocks to ISO 8601"
    )


def _parse_text(value: str) -> tuple[int, str]:
    if len(value) > len("20250303") and value.isdigit():  # datetime accepts a digit in place of the T after a date
        raise ValueError(f"must be ISO 8601 text or a number, got {short_repr(value)}. Write numbers without quotes")
    try:
        time = datetime.fromisoformat(value)
    except ValueError:
        raise ValueError(f"must be ISO 8601 text or a number, got {short_repr(value)}") from None
    since = time - (_EPOCH if time.tzinfo else _NAIVE_EPOCH)
    seconds = since.days * 86_400 + since.seconds
    if not _EARLIEST <= seconds < _LATEST:
        raise ValueError(f"must be in the years 1800 to 2199, got {short_repr(value)}")
    finer = _BEYOND_MICROSECONDS.search(value) if len(value) > len("20250303T140000.123456") else None
    stamp = seconds * SECOND + since.microseconds * 1000 + (int(finer[1].ljust(3, "0")) if finer else 0)
    return stamp, ISO if time.tzinfo else NAIVE


def _to_nanoseconds(value: float, per_second: int) -> int:
    """Convert to nanoseconds: exact for integers, within float precision otherwise."""
    whole = int(value)
    nanoseconds_per_unit = SECOND // per_second
    return whole * nanoseconds_per_unit + round((value - whole) * nanoseconds_per_unit)


def format_utc(stamp: int) -> str:
    """ISO 8601 in UTC, to the second, of nanoseconds since 1970."""
    return (_EPOCH + timedelta(seconds=stamp // SECOND)).isoformat(timespec="seconds")


def time_names(names: Iterable[str]) -> list[str]:
    """The names that are a known spelling of `time`, most likely first."""
    ranked = [(_spelling_rank(name), name) for name in names if isinstance(name, str)]
    return [name for rank, name in sorted(ranked) if rank < len(_SPELLINGS)]


def bar_length(timeframe: object) -> int:
    """Nanoseconds of a time frame such as M5, 5m, 5 minutes, 1h, H4, D1 or 15 (minutes); 0 for any other value."""
    text = str(timeframe).strip()
    match = _TIMEFRAME.fullmatch(text.lower())
    if match is None or text.endswith("M"):  # 1M is a month, M1 a minute
        return 0
    count, unit = match["count"] or match["after"] or "1", match["before"] or match["unit"] or "m"
    return int(count) * _TIMEFRAME_SECONDS[unit[:1]] * SECOND


def is_named_like_a_time(name: str) -> bool:
    """Whether a word of the name denotes a time: `ts_event`, `unix_ms`, `window_start`, `klineOpenTime`."""
    words = [word.lower() for word in _WORD.findall(name)]
    return any(word in _TIME_WORDS or word.endswith(("time", "timestamp")) for word in words)


def _spelling_rank(name: str) -> int:
    plain = name.lower().translate({ord(mark): None for mark in " -_"})
    return _SPELLINGS.index(plain) if plain in _SPELLINGS else len(_SPELLINGS)
