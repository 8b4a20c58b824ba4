"""The data card of windows as a short text for the terminal.

Input: the content of windows.json and its folder. Output: lines of at most 80 columns, except that paths are not cut.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctxtrain.labels import LABELS

_LEFT_OUT = {
    "too_few_bars_before": "too few bars before",
    "horizon_beyond_the_end": "horizon beyond the end of the data",
    "gap_longer_than_max_gap": "gap of more than {max_gap:,} bars in window or horizon",
    "stop_or_profit_without_distance": "stop or profit below the resolution of the price",
    "no_label": "no label",
    "crosses_a_split": "window or horizon crosses a split",
}


def describe_windows(folder: Path, card: Mapping[str, Any]) -> str:
    """Counts of bars and events, a table of the splits, and the next command with the own fields."""
    bars, events = card["bars"], card["events"]
    gaps = f"gaps {bars['gaps']:,} (longest {bars['longest_gap_in_bars']:,} bars)"
    lines = [f"bars    {bars['bars']:,} of {card['timeframe']}, {gaps}, duplicates {bars['duplicates']:,}"]
    unusual = {
        "high or low corrected by rounding": bars["rounded"],
        "bars with zero volume": bars.get("bars_with_zero_volume", 0),
        "bars without volume": bars.get("bars_without_volume", 0),
        "bars off the grid of their length": bars["bars_off_the_grid"],
    }
    lines += [f"        {what}: {count:,}" for what, count in unusual.items() if count]
    lines.append(
        f"events  {events['events']:,}, windows {events['windows']:,}, of them with a gap "
        f"{events['windows_that_span_a_gap']:,}, ambiguous {events['ambiguous']:,}"
    )
    for reason, count in card["left_out"].items():
        if count:
            lines.append(f"        left out: {_LEFT_OUT[reason].format(max_gap=card['max_gap_in_bars'])}: {count:,}")
    lines.append(f"{'':8}{'rows':>8}" + "".join(f"{label:>8}" for label in LABELS) + "  first event → last event")
    for name, file in card["files"].items():
        numbers = "".join(f"{file['labels'][label]:>8,}" for label in LABELS)
        times = " → ".join(file[key][:16].replace("T", " ") for key in ("first_event", "last_event"))
        lines.append(f"{name:8}{file['rows']:>8,}{numbers}  {times}")
    places = " ".join(str(folder / f"{name}.jsonl") for name in card["files"])
    own = ",".join(f"{name}={kind}" for name, kind in card["fields"].items())
    lines.append(f"next: ctxtrain check {places}" + (f" --fields {shlex.quote(own)}" if own else ""))
    if own:
        declared = ", ".join(f"{name}: {kind}" for name, kind in card["fields"].items())
        lines.append(f"to train on them, set data.fields: {{{declared}}}")
    return "".join(f"{line}\n" for line in lines)
