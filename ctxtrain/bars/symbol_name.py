"""The market in the name of an exported file.

Input: a path such as `BTC_USDT-5m.feather`, `EURUSD_M1_202401020000_202401312359.csv`, `BINANCE_BTCUSDT, 60.csv` or
`ES 03-24.Last.txt`. Output: the part before the bar length and the dates.
"""

from __future__ import annotations

import re
from pathlib import Path

_SUFFIXES = re.compile(r"(\.(csv|tsv|txt|json|jsonl|ndjson|parquet|pq|feather|arrow|gz|zst|last|bid|ask))+$", re.I)
_LENGTH = r"\d+(s|m|h|d|w|M|min|mo)|(M|H|D|W)\d{1,2}|MN1|\d+[STHDWM]"
_DATE = r"\d{4}-\d{2}(-\d{2})?|\d{8,14}"
_REST = re.compile(rf"([-_ ]+({_LENGTH}|{_DATE})(?![A-Za-z0-9])|, ?\d+[A-Z]?(?![A-Za-z0-9])).*$")


def symbol_of_file(path: Path) -> str:
    """The symbol in the name; the whole name without endings if it has no bar length or date."""
    name = _SUFFIXES.sub("", path.name)
    return _REST.sub("", name).strip() or name or path.name
