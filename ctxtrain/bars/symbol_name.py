"""The market in the name of an exported file.

Input: a path such as `BTC_USDT-5m.feather`, `EURUSD_M1_202401020000_202401312359.csv`, `BINANCE_BTCUSDT, 60.csv` or
`ES 03-24.Last.txt`. Output: the part before the bar length and the dates.
"""

from __future__ import annotations

import re
from pathlib import Path

_SUFFIXES = re.compile(r"(\.(csv|tsv|txt|json|jsonl|ndjson|parquet|pq|feather|arrow|gz|zst|last|bid|ask))+$", re.I)
_LENGTH = r"\d+(s|m|h|d|w|M|min|mo)|(M|H|D|W)\d{1,2}|MN1|\d+[STHDWM]"
_MINUTES = r"(?<=_)(1|2|3|5|15|30|60|120|180|240|360|480|720|1440|10080)(?!-\d\d(?!\d))"  # 5-24 is a contract
_DATE = r"\d{4}-\d{2}(-\d{2})?|\d{8,14}|\d{2}[.]\d{2}[.]\d{4}|(?<=[A-Za-z][-_ ])(19|20)\d{2}"
_REST = re.compile(rf"([-_ ]+({_LENGTH}|{_DATE}|{_MINUTES}|Candlestick)(?![A-Za-z0-9])|, ?\d+[A-Z]?(?![A-Za-z0-9])).*$")
_ONLY_TIME = re.compile(rf"(({_LENGTH}|{_DATE}|(19|20)\d{{2}}|\d{{1,2}}|Q[1-4])(?![A-Za-z0-9])[-_ ]*)+", re.IGNORECASE)


def symbol_of_file(path: Path) -> str:
    """The symbol in the name; the whole name without endings if it has no bar length or date.

    Empty if the name is only a date or a length, such as `2024-10.csv`.
    """
    name = _SUFFIXES.sub("", path.name)
    if _ONLY_TIME.fullmatch(name):
        return ""
    return _REST.sub("", name).strip() or name or path.name
