"""The learning curve of a run as a table for a terminal of 80 columns."""

from __future__ import annotations

from rich.table import Table

from ctxtrain.reporting.learning_curve import curve_points
from ctxtrain.reporting.summary_schema import Summary
from ctxtrain.reporting.verdict import leak_suffix, readable


def curve_table(summary: Summary) -> Table:
    """Macro-F1 of the model and of the best baseline, by number of training windows; the last row is the run."""
    rows = "validation" if summary.test is None else "test"
    title = f"Learning curve: macro-F1 on {rows} rows{leak_suffix(summary.data.leaked)}"
    table = Table(title=title, title_justify="left")
    for column in ("windows", "model", "baseline", "lead", "best baseline"):
        table.add_column(column, justify="left" if column == "best baseline" else "right")
    for point in curve_points(summary):
        scores = (point.macro_f1, point.baseline_macro_f1)
        figures = (f"{point.windows:,}", *(f"{score:.3f}" for score in scores), f"{scores[0] - scores[1]:+.3f}")
        table.add_row(*figures, readable(point.best_baseline))
    return table
