"""`report.html`: one self-contained page about a run, for a trader and for an engineer.

Comes in: a run folder, its summary, metrics and config. Goes out: a file that loads nothing from the network, filled
from `report.html.j2`, `report.css` and `report.js`. Its content security policy allows one script, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from ctxtrain.data.codec import PULSES
from ctxtrain.data.leakage import kinds_not_found
from ctxtrain.labels import LABELS, SIMULATED_SUFFIX
from ctxtrain.reporting.learning_curve import curve_figure, curve_reading
from ctxtrain.reporting.summary_schema import Data, Summary
from ctxtrain.reporting.verdict import advice, headline, omissions, readable, warnings
from ctxtrain.storage.atomic_files import write_bytes
from ctxtrain.storage.run_folder import RunFolder, private_files


def write_report(folder: RunFolder, summary: Summary, say: Callable[[str], None] = lambda _note: None) -> None:
    """Write the page of a finished run, with all values escaped.

    `say` receives a note if `metrics.jsonl` lacks optimizer steps, so that the curves lack them too.
    """
    from altair.utils.schemapi import debug_mode  # the plotting library takes a second, and only this needs it

    from ctxtrain.reporting import charts, figures

    with debug_mode(False):  # the schema check of each chart takes half of the time, and the tests do it
        lines = folder.metrics.read()
        drawn = figures.all_figures(summary, lines)
        if summary.learning_curve and summary.learning_curve.points:
            drawn["curve"] = curve_figure(summary)
        mistakes = [(mistake, figures.candles(mistake)) for mistake in summary.mistakes]
    specs = {name: figure.spec for name, figure in drawn.items()}
    specs |= {f"mistake-{number}": figure.spec for number, (_, figure) in enumerate(mistakes, 1) if figure}
    script = charts.script(_text("report.js"))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"share": figures.share, "span": figures.span, "readable": readable}
    page = environment.from_string(_text("report.html.j2")).render(
        summary=summary,
        scores=summary.judged,
        headline=headline(summary),
        advice=advice(summary),
        brief_advice=advice(summary, brief=True),
        omissions=omissions(summary),
        curve_reading=curve_reading(summary),
        figures=drawn,
        mistakes=mistakes,
        calibrated=figures.calibrated,
        pulses=PULSES,
        data_rows=_data_rows(summary.data),
        extent_rows=_extent_rows(summary.data),
        drift_rows=_drift_rows(summary.data),
        warnings=warnings(summary.data.leaked, summary.unfinished),
        not_found=kinds_not_found({leak.kind for leak in summary.data.leaks}, summary.data.unchecked),
        simulated=_simulated(summary.data),
        most_common=max(LABELS, key=lambda label: summary.data.classes["train"][label]),
        charts={"config": charts.CONFIG, "specs": specs},
        script=script,
        script_hash=_hash(script),
        style=_text("report.css"),
        config=folder.read_config(),
        run=folder.root.resolve().name,
    )
    with private_files():
        write_bytes(folder.report, page.encode())
    last = summary.epochs[-1].step
    missing = last - len({line["step"] for line in lines if line["kind"] != "epoch" and line["step"] <= last})
    if missing:
        say(f"note: {folder.metrics.path} lacks {missing:,} of {last:,} optimizer steps, and so do the curves")


def _data_rows(data: Data) -> list[list[str]]:
    """One row per file: its windows, in total and by class."""
    return [
        [name, *(f"{count:,}" for count in (rows, *(data.classes[name][label] for label in LABELS)))]
        for name, rows in data.rows.by_file().items()
    ]


def _extent_rows(data: Data) -> list[list[str]]:
    """One row per file: its symbols, first and last event."""
    return [
        [name, ", ".join(extent.symbols) or "unknown"]
        + [
            (moment or "unknown").replace("T", " ").replace("+00:00", "")
            for moment in (extent.first_event, extent.last_event)
        ]
        for name, extent in data.extent.items()
    ]


def _simulated(data: Data) -> bool:
    symbols = {symbol for extent in data.extent.values() for symbol in extent.symbols}
    return bool(symbols) and all(symbol.endswith(SIMULATED_SUFFIX) for symbol in symbols)


def _drift_rows(data: Data) -> list[list[str]]:
    """A row for each of the ten features that drift most from train to val."""
    return [
        [entry.feature, f"{entry.psi:.2f}", f"{entry.chance:.2f}", "yes" if entry.shifted else "no"]
        for entry in data.drift[:10]
    ]


def _text(name: str) -> str:
    return files("ctxtrain.reporting").joinpath(name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """As a content security policy names a script (W3C CSP level 3, section 2.3.1)."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
