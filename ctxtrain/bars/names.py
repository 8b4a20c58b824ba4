"""Names of columns → fields of a bar.

Input: the names of a file. Output: the column of each field. A field has several known spellings, compared without
case, blanks, - and _. A dotted name is that of a nested object. Parts that only wrap a bar (`bar.`, `volume_stats.`)
are ignored. Other parts count, so the volume of a higher timeframe is not taken for the bar's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from ctxtrain.data.row_schema import BAR_FIELDS, MEASURES, PRICES
from ctxtrain.data.time_units import time_names

DIRECTIONS = frozenset({"ext_dir", "int_dir", "htf_dir"})
COUNTS = frozenset({"mgann_leg_index"})
FLAGS = frozenset(BAR_FIELDS) - DIRECTIONS - MEASURES - COUNTS
# `clock` is the time of day, where day and time are two columns.
ROLES = ("time", "clock", *BAR_FIELDS, "symbol", "fvg_active", "fvg_type")
# Column names in German, French, Spanish, Italian, Portuguese and Dutch, as spreadsheets and local programs write them.
_OPEN = ("eröffnung", "eröffnungskurs", "eröffn", "ouverture", "ouv", "apertura", "abertura")
_HIGH = (
    "hoch",
    "höchst",
    "höchstkurs",
    "haut",
    "plushaut",
    "máximo",
    "maximo",
    "máx",
    "alto",
    "massimo",
    "max",
    "hoog",
)
_LOW = ("tief", "tiefst", "tiefstkurs", "bas", "plusbas", "mínimo", "minimo", "mín", "bajo", "baixo", "min", "laag")
_CLOSE = (
    "schluss", "schlusskurs", "schlußkurs", "zuletzt", "clôture", "cloture", "fermeture", "dernier", "cierre", "último",
    "ultimo", "chiusura", "fechamento", "fecho", "slot", "sluiting",
)  # fmt: skip
_VOLUME = ("volumen", "umsatz", "volumi", "stück")
_DAYS = ("date", "day", "tradedate", "datum", "tag", "fecha", "data", "jour")
# Spellings besides the field's own name, most likely first.
_SPELLINGS = {
    "open": ("o", "openprice", "openingprice", "opening", *_OPEN),
    "high": ("h", "highprice", "highestprice", *_HIGH),
    "low": ("l", "lowprice", "lowestprice", *_LOW),
    "close": ("c", "closeprice", "closingprice", "close/last", "last", "price", *_CLOSE),
    "volume": ("v", "vol", "basevolume", "totalvolume", "realvolume", "tickvol", "tickvolume", *_VOLUME),
    "delta": ("deltaclose", "volumedelta", "bardelta"),
    "buy_vol": ("buyvolume", "takerbuybaseassetvolume", "takerbuybasevolume", "takerbuyvolume"),
    "sell_vol": ("sellvolume",),
    "atr_14": ("atr",),
    "htf_dir": tuple(f"mtfcontext.{length}.structuredir" for length in ("m5", "m15", "m30", "h1", "h4")),
    "symbol": ("ticker", "instrument", "pair", "contract"),
}
_MORE_TIMES = (
    "gmttime",
    "localtime",
    "datetime(utc)",
    "time(utc)",
    "date(utc)",
    "timegmt",
    "dategmt",
    "indexlevel0",
    *_DAYS[3:],
)
_TIMES_OF_DAY = ("time", "timeofday", "hour", "zeit", "uhrzeit", "heure", "hora", "ora", "tijd")
_WRAPPERS = frozenset({"bar", "candle", "kline", "k", "ohlc", "ohlcv", "mid", "volumestats"})
_IRRELEVANT = re.compile(r"[\s_\-<>\"']")
# `Volume BTC`, `Volume (USDT)`
_VOLUME_IN_CURRENCY = re.compile(r"vol(?:ume)?\.?[ _(\[-]+([a-z]{3,5})[)\]]?", re.IGNORECASE)
# Words after `Volume` that name an indicator, not a currency.
_NO_CURRENCY = re.compile(
    r"sma|ema|wma|vma|hma|rma|dema|tema|rsi|atr|roc|osc|avg|mean|std|macd|vwap|vwma|obv|mfi|cmf|adv|delta"
    r"|ratio|rate|trend|index|prev|last|buy|sell|ask|bid|up|down|spike|flag|rel|rank|score|norm|diff|chg|pct|change|zone"
)


def plain_name(name: str) -> str:
    """The normalised column name: lower case, without blanks, - and _, and without parts that only wrap a bar."""
    parts = [_IRRELEVANT.sub("", part.lower()) for part in name.rstrip(".").split(".")]
    return ".".join([part for part in parts[:-1] if part not in _WRAPPERS] + parts[-1:])


def names_prices(names: Iterable[str]) -> bool:
    """Whether at least three of the four prices are among the names."""
    known = {plain_name(name) for name in names}
    return sum(bool(known.intersection((price, *_SPELLINGS[price]))) for price in PRICES) >= 3


def match_columns(names: Sequence[str]) -> dict[str, str]:
    """The column of each role. Of two columns, the more usual spelling counts, then the less nested one."""
    found: dict[str, str] = {}
    plain = {name: plain_name(name) for name in names}
    for role in ROLES[2:]:
        spellings = (_IRRELEVANT.sub("", role), *_SPELLINGS.get(role, ()))
        matches = [
            (spellings.index(short), name.count("."), place, name)
            for place, (name, short) in enumerate(plain.items())
            if short in spellings
        ]
        if not matches and role == "volume":
            matches = [(0, 0, place, name) for place, name in enumerate(names) if is_volume_in_currency(name)][:1]
        if matches:
            found[role] = min(matches)[3]
    times = _time_columns(plain)
    if times:
        found["time"] = times[0]
        day = next((name for name, short in plain.items() if short in _DAYS), None)
        time_of_day = next((name for name, short in plain.items() if short in _TIMES_OF_DAY), None)
        if day and time_of_day:
            found["time"], found["clock"] = day, time_of_day
    return found


def is_volume_in_currency(name: str) -> bool:
    """Whether a column is the volume in a currency, such as `Volume BTC`, and no indicator such as `Volume MA`."""
    match = _VOLUME_IN_CURRENCY.fullmatch(name.strip())
    return match is not None and not _NO_CURRENCY.fullmatch(match[1].lower())


def _time_columns(plain: Mapping[str, str]) -> list[str]:
    """Columns named like a time, most likely first."""
    by_short = {short: name for name, short in reversed(list(plain.items()))}
    usual = [by_short[short] for short in time_names(by_short)]
    return usual + [by_short[short] for short in _MORE_TIMES if short in by_short]


def parse_columns(text: str) -> tuple[dict[str, str], list[str]]:
    """`time=Datum,open=2` as a dict, and the faults. An empty column means that the field is left out."""
    pairs, faults = {}, []
    for part in filter(None, text.split(",")):
        role, equals, column = (piece.strip() for piece in part.partition("="))
        if not equals or role not in ROLES:
            names = ", ".join(("time", *PRICES, "volume", "delta", "symbol"))
            faults.append(f"columns must be FIELD=COLUMN with fields such as {names}, got {part!r}. Use time=1,open=2.")
        elif role in pairs:
            faults.append(f"columns must name each field once, got {role} twice. Leave one of them out.")
        else:
            pairs[role] = column
    return pairs, faults
