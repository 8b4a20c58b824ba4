"""Text with separators (CSV, TSV, semicolons) → columns of text.

Input: the content of a file in UTF-8. Output: a `SeparatedText`: an Arrow table of text columns, the separator, whether
the file names its columns, and the line of each row. Lines above the names and lines that begin with # are skipped.
"""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import csv as arrow_csv

from ctxtrain.bars.names import names_prices
from ctxtrain.errors import DataError, short_repr

SEPARATORS = {"\t": "tabs", ";": "semicolons", "|": "bars", ",": "commas"}  # a comma may also be a decimal comma
MIN_COLUMNS = 5  # a time and four prices
_NO_BREAK = "\u00a0".encode()
_SAMPLE_LINES = 200
_MAX_PREAMBLE = 20  # lines above the names


@dataclass(frozen=True)
class SeparatedText:
    """The cells of a text file; `kind` describes the format in words."""

    table: pa.Table
    kind: str
    has_names: bool
    separator: str
    lines_T: NDArray[np.int64]


def parse_separated(path: Path, text: bytes, separator: str | None) -> SeparatedText:
    """Raises DataError if there is no separator, or with each line that has another number of cells."""
    text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    kept_N = _content_lines(text)
    all_lines = text.split(b"\n")
    sample = [all_lines[n].decode("utf-8", "replace") for n in kept_N[:_SAMPLE_LINES].tolist()]
    if not sample:
        raise DataError(f"{path}: the file has no bars; at least one is required.")
    separator = separator or _find_separator(path, sample)
    rows = [row for row in csv.reader(sample, delimiter=separator) if row]
    header = _find_header(rows)
    width = Counter(len(row) for row in rows[header + 1 :] or rows).most_common(1)[0][0]
    names = [str(n + 1) for n in range(width)] if header < 0 else unique_names(rows[header], width)
    more = _lines_of_yfinance(path, rows[header + 1 : header + 3]) if header >= 0 else 0
    if more:
        names[0] = rows[header + more][0]
    start = header + 1 + more
    table = _read_cells(path, text, kept_N, start, separator, names)
    known = SEPARATORS.get(separator, f"{separator!r}")
    kind = f"text separated by {known}, " + ("without column names" if header < 0 else "with column names")
    if more:
        kind += f", lines of yfinance below them skipped: {more}"
    if header > 0:
        kind += f", lines above them skipped: {header}"
    if comments := text.count(b"\n#") + text.startswith(b"#"):
        kind += f", lines with # skipped: {comments}"
    return SeparatedText(table, kind, header >= 0, separator, kept_N[start : start + table.num_rows] + 1)


def _content_lines(text: bytes) -> NDArray[np.int64]:
    """The index of each line that is not blank, a comment, or Excel's `sep=` at the beginning."""
    skipped = 1 if text[:4].lower() == b"sep=" else 0
    lines = text.split(b"\n")
    kept = [
        n
        for n, line in enumerate(lines)
        if n >= skipped and line.replace(_NO_BREAK, b"").strip() and not line.startswith(b"#")
    ]
    return np.array(kept, np.int64)


def _find_separator(path: Path, sample: list[str]) -> str:
    """The separator that divides the last lines of the sample into equally many columns."""
    tail = sample[-max(1, len(sample) // 2) :]
    for separator in SEPARATORS:
        widths = Counter(len(row) for row in csv.reader(tail, delimiter=separator))
        width, count = widths.most_common(1)[0] if widths else (0, 0)
        if width >= MIN_COLUMNS and count > 0.5 * len(tail):
            return separator
    rule = f"a line must have at least {MIN_COLUMNS} columns (time, open, high, low, close)"
    raise DataError(
        f"{path}: {rule}, separated by tabs, semicolons or commas, got {short_repr(tail[0] if tail else '')}. "
        "Export the bars as CSV, or name the separator with --separator."
    )


def _find_header(rows: list[list[str]]) -> int:
    """The index of the row with the names of the columns; -1 without one."""
    for number, row in enumerate(rows[:_MAX_PREAMBLE]):
        if names_prices(row):
            return number
    first = rows[0]
    return -1 if any(_is_number(cell) for cell in first) else 0


def _lines_of_yfinance(path: Path, rows: list[list[str]]) -> int:
    """How many lines below the names are headers: a line of tickers, and one with only the name of the times."""
    has_tickers = bool(rows) and rows[0][0].strip() == "Ticker"
    index = rows[1:] if has_tickers else rows
    if not index or index[0][0].strip() not in ("Date", "Datetime") or any(cell.strip() for cell in index[0][1:]):
        return 0
    tickers = {cell.strip() for cell in rows[0][1:]} if has_tickers else set()
    if len(tickers) > 1:
        shown = short_repr(", ".join(sorted(tickers)))
        raise DataError(f"{path}: a file must have one market, got columns of {shown}. Save each ticker on its own.")
    return 2 if has_tickers else 1


def _is_number(cell: str) -> bool:
    try:
        float(cell.strip().replace(",", "."))
    except ValueError:
        return False
    return True


def unique_names(cells: list[str], width: int) -> list[str]:
    """Names of `width` columns: an empty name becomes the number of its column, a repeated one gets that number."""
    names: list[str] = []
    for number, cell in enumerate([*cells, *[""] * (width - len(cells))], start=1):
        name = cell.strip()
        names.append(name if name and name not in names else f"{name} {number}".strip())
    return names


def _read_cells(
    path: Path, text: bytes, kept_N: NDArray[np.int64], start: int, separator: str, names: list[str]
) -> pa.Table:
    """All cells from the kept line number `start` on, as text; empty cells are null."""
    faults: list[str] = []

    def refuse(row: arrow_csv.InvalidRow) -> str:
        line = int(kept_N[start + row.number - 1]) + 1
        is_remark = row.actual_columns == 1  # such as the last line of Barchart
        remedy = "Delete this line, which is no bar" if is_remark else "Export the file again"
        rule = f"must have {row.expected_columns} columns as the other lines have, got {row.actual_columns}"
        faults.append(f"{path}:{line}: {rule}. {remedy}.")
        return "skip"

    lines = text.split(b"\n")
    body = b"\n".join([lines[n] for n in kept_N[start:].tolist()])
    if not body:
        raise DataError(f"{path}: the file has no bars below the names of its columns; at least one is required.")
    try:
        table = arrow_csv.read_csv(
            pa.BufferReader(body),
            arrow_csv.ReadOptions(column_names=names, use_threads=False),
            arrow_csv.ParseOptions(delimiter=separator, invalid_row_handler=refuse),
            arrow_csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()),
                strings_can_be_null=True,
                null_values=["", "NaN", "nan", "null", "NULL", "None", "N/A", "n/a", "NA", "-"],
            ),
        )
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not readable as CSV ({str(error).splitlines()[0]}). Export the file again.") from None
    if faults:
        raise DataError(faults)
    return table
