"""The learning curve of a run for people: a figure, and a sentence that says how much the last windows changed.

Input: the summary of a run that has a `learning_curve`. Output: its points with that of the whole run, text, and
for the report a `Figure`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ctxtrain.evaluation.metrics import PRIMARY_METRIC
from ctxtrain.reporting.curve_schema import CurvePoint
from ctxtrain.reporting.summary_schema import Summary
from ctxtrain.reporting.verdict import readable

if TYPE_CHECKING:
    from ctxtrain.reporting.figures import Figure


def curve_points(summary: Summary) -> list[CurvePoint]:
    """The points of the curve; the last one is the run itself, with all training windows."""
    best = summary.baselines.best
    whole = CurvePoint(
        windows=summary.data.rows.train,
        classes=summary.data.classes["train"],
        epoch=summary.best.epoch,
        macro_f1=summary.judged.value(PRIMARY_METRIC),
        best_baseline=best,
        baseline_macro_f1=summary.baselines.scores[best].value(PRIMARY_METRIC),
    )
    return [*(summary.learning_curve.points if summary.learning_curve else ()), whole]


def curve_reading(summary: Summary) -> str:
    """What the last two points show of the model, and what they do not show."""
    *earlier, last = curve_points(summary)
    if not earlier:
        return "No smaller number of windows was trained on."
    before, interval = earlier[-1], summary.intervals.scores.macro_f1
    score = before.macro_f1
    change = f"changes by {last.macro_f1 - score:+.3f}, from {score:.3f} to {last.macro_f1:.3f}"
    first = f"From {before.windows:,} to {last.windows:,} windows, the model's macro-F1 {change}."
    if interval is None:
        return f"{first} There is no interval, so the change may be noise."
    low, high = interval
    place = "below" if score < low else "above" if score > high else "within"
    second = f"The earlier score lies {place} the 95 % interval of the last, {low:.3f} to {high:.3f}"
    if place == "within":
        return f"{first} {second}, so the change may be noise."
    seems = "seem" if place == "below" else "do not seem"
    return f"{first} {second}, so the last windows {seems} to have helped. What still more would do is not shown."


def curve_figure(summary: Summary) -> Figure:
    """Macro-F1 of the model and of the best baseline over the number of training windows."""
    from ctxtrain.reporting import charts  # the plotting library takes a second
    from ctxtrain.reporting.figures import Figure

    points, model, baseline = curve_points(summary), "the model", "the best baseline"
    rows = [{"windows": point.windows, "series": model, "value": point.macro_f1} for point in points]
    rows += [{"windows": point.windows, "series": baseline, "value": point.baseline_macro_f1} for point in points]
    return Figure(
        "Macro-F1 by number of training windows",
        "Higher is better. Each size is trained once; the last point is this run. The horizontal axis is logarithmic.",
        charts.sizes(rows, "macro-F1", {model: charts.BLUE, baseline: charts.ORANGE}),
        ("training windows", "the model", "the best baseline", "lead", "which baseline", "epoch"),
        [
            (
                f"{point.windows:,}",
                f"{point.macro_f1:.3f}",
                f"{point.baseline_macro_f1:.3f}",
                f"{point.macro_f1 - point.baseline_macro_f1:+.3f}",
                readable(point.best_baseline),
                str(point.epoch),
            )
            for point in points
        ],
    )
