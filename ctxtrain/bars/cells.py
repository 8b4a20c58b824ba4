"""Cells as people and brokers write them → plain numbers: `$1999.87`, `180K`, a volume of -1, ticks for a volume.

Input: a `Source` and its chosen columns. Output: the same with plain cells, and what was changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ctxtrain.bars.names import plain_name
from ctxtrain.bars.numbers import is_text, to_floats
from ctxtrain.bars.read import Source
from ctxtrain.data.row_schema import PRICES

_SIGN = r"[$€£¥₹]"
_SUFFIX = r"(?i)\s*([kmb])$"
_FACTORS = {"k": 1e3, "m": 1e6, "b": 1e9}
_TICKS = frozenset({"tickvol", "tickvolume"})
_QUANTITIES = ("volume", "buy_vol", "sell_vol", "delta")
_DECIMALS = 6  # of quantities such as 1.15M, to which the product is rounded


def is_tick_volume(column: str) -> bool:
    return plain_name(column) in _TICKS


def without_currency(source: Source, chosen: Mapping[str, str]) -> tuple[Source, list[str]]:
    """Prices without the sign of a currency."""
    changed = {}
    for name in PRICES:
        column = source.table[chosen[name]]
        if is_text(column) and pc.any(pc.match_substring_regex(column, _SIGN)).as_py():
            changed[chosen[name]] = pc.utf8_trim_whitespace(pc.replace_substring_regex(column, _SIGN, ""))
    notes = [f"signs of a currency removed from {', '.join(changed)}"] if changed else []
    return _with_columns(source, changed), notes


def with_plain_quantities(source: Source, chosen: Mapping[str, str], decimal: str) -> tuple[Source, list[str]]:
    """Quantities such as `180K` as numbers. Raises DataError for cells that are none."""
    changed, notes = {}, []
    for name in _QUANTITIES:
        if name not in chosen or not is_text(source.table[chosen[name]]):
            continue
        column = source.table[chosen[name]]
        letters = pc.struct_field(pc.extract_regex(pc.utf8_lower(column), r"(?P<unit>[kmb])$"), "unit")
        count = len(letters) - letters.null_count
        if not count:
            continue
        numbers = to_floats(pc.replace_substring_regex(column, _SUFFIX, ""), decimal, name, source.place)
        factors = np.array([_FACTORS.get(letter, 1.0) for letter in letters.to_pylist()])
        changed[chosen[name]] = pa.chunked_array([pa.array(np.round(numbers * factors, _DECIMALS), from_pandas=True)])
        notes.append(f"{name}: {count:,} cells with K, M or B are thousands, millions or billions")
    return _with_columns(source, changed), notes


def choose_volume(
    source: Source, chosen: Mapping[str, str], decimal: str, *, is_given: bool
) -> tuple[dict[str, str], list[str]]:
    """The columns, without a volume that is -1 on all bars, and with that of ticks where all traded volumes are 0.

    MetaTrader writes the latter for currencies, Interactive Brokers the former. `is_given` keeps the user's choice.
    """
    columns = dict(chosen)
    if "volume" not in columns:
        return columns, []
    volumes = to_floats(source.table[columns["volume"]], decimal, "volume", source.place)
    volumes = volumes[~np.isnan(volumes)]
    if len(volumes) and (volumes == -1).all():
        name = columns.pop("volume")
        return columns, [f"{name} is -1 on all bars, as Interactive Brokers writes it without volume: not given"]
    ticks = [name for name in source.names if is_tick_volume(name)]
    if ticks and not is_given and columns["volume"] not in ticks and not volumes.any():
        columns["volume"] = ticks[0]
    return columns, []


def _with_columns(source: Source, changed: Mapping[str, pa.ChunkedArray]) -> Source:
    table = source.table
    for name, column in changed.items():
        table = table.set_column(table.column_names.index(name), name, column)
    return replace(source, table=table) if changed else source
