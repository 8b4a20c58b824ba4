"""The figures of the report, each as a chart and as a table of the same values.

Comes in: the summary of a run and its lines of `metrics.jsonl`. Goes out: `Figure`s by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ctxtrain.evaluation.metrics import METRICS, PRIMARY_METRIC, Metric, metrics_for
from ctxtrain.evaluation.worst_errors import COLUMNS
from ctxtrain.labels import LABELS, Label
from ctxtrain.reporting import charts
from ctxtrain.reporting.summary_schema import (
    Baseline,
    Calibrated,
    Called,
    ClassIntervals,
    Data,
    Interval,
    Mistake,
    Point,
    Summary,
    Tables,
    Target,
)
from ctxtrain.reporting.verdict import metric_name, readable
from ctxtrain.storage.metrics_log import ClassScores, EpochRecord, MetricValues, Scores

INTERVAL = "95 % interval"
CURVE_POINTS = 200  # more steps than this are drawn as means of consecutive ones


@dataclass(frozen=True)
class Figure:
    """A chart with its table: `reading` explains the chart; table cells are text, and the first one names the row."""

    title: str
    reading: str
    spec: charts.Spec
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def all_figures(summary: Summary, metrics: Iterable[Mapping[str, Any]]) -> dict[str, Figure]:
    """Every figure of the page except the mistakes; `reliability` only where probabilities were calibrated."""
    scores, intervals = summary.judged, summary.intervals
    figures = {
        "targets": targets(summary.targets),
        "leads": leads(scores, summary.baselines.scores),
        **learning(summary, [line for line in metrics if line["kind"] == "step"]),
        "confusion": confusion(scores.confusion),
        "classes": classes(scores.per_class, intervals.scores.per_class),
        "histogram": histogram(summary.selective.histogram),
        "risk": risk(summary.selective.curve),
        "balance": balance(summary.data),
    }
    if isinstance(summary.calibration, Calibrated):
        figures["reliability"] = reliability(summary.calibration.reliability)
    return figures


def targets(judged: Sequence[Target]) -> Figure:
    rows = [_interval(metric_name(t.metric), t.value, t.interval, t.target) for t in judged]
    line = f"The line is its {INTERVAL}: a target is met when the whole line lies to the right of the tick."
    return Figure(
        "Targets and scores",
        _reading("The dot is the score, the orange tick the target.", line, [t.interval for t in judged]),
        charts.intervals(rows, "value", domain=(0, 1)),
        ("metric", "verdict", "value", "target", INTERVAL, "priority"),
        [
            (
                metric_name(t.metric),
                t.verdict,
                f"{t.value:.3f}",
                f"≥\N{NO-BREAK SPACE}{t.target:.2f}",
                span(t.interval),
                t.priority.lower(),
            )
            for t in judged
        ],
    )


def leads(model: Scores, baselines: Mapping[str, Baseline]) -> Figure:
    metrics = metrics_for("baselines")
    compared = [(readable(name), scores, scores.difference.macro_f1) for name, scores in baselines.items()]
    rows = [_interval(name, lead.value, lead.interval) for name, _, lead in compared]
    dot = "The dot is the model’s macro-F1 minus the baseline’s on the same windows: right of zero the model is better."
    line = f"The line is the {INTERVAL}: where it crosses zero, the difference may be noise."
    return Figure(
        "Lead of the model in macro-F1",
        _reading(dot, line, [lead.interval for _, _, lead in compared]),
        charts.intervals(rows, "lead in macro-F1", zero=True),
        ("compared", *(metric.title for metric in metrics), "lead in macro-F1", INTERVAL),
        [
            ("the model", *_figures(metrics, model), "", ""),
            *(
                (name, *_figures(metrics, scores), f"{lead.value:+.3f}", span(lead.interval, "+.3f"))
                for name, scores, lead in compared
            ),
        ],
    )


def learning(summary: Summary, steps: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """Loss, scores and learning rate over epochs, each with the chosen epoch marked."""
    epochs, chosen = summary.epochs, summary.best.epoch
    steps_an_epoch = epochs[0].step
    drawn = [{**step, "epoch": step["step"] / steps_an_epoch} for step in thinned(steps)]
    loss = [_point(step["epoch"], "training steps", step["loss"], dot=False) for step in drawn]
    loss += [_point(epoch.epoch, "training mean", epoch.train_loss) for epoch in epochs]
    loss += [_point(epoch.epoch, "validation", epoch.loss) for epoch in epochs]
    names = {"accuracy": "accuracy", PRIMARY_METRIC: "macro-F1"}
    scores = [_point(epoch.epoch, name, epoch.value(key)) for key, name in names.items() for epoch in epochs]
    rate = [_point(step["epoch"], "learning rate", step["learning_rate"], dot=False) for step in drawn]
    target = next(target.target for target in summary.targets if target.metric == PRIMARY_METRIC)
    by_step = [
        (str(step["step"]), f"{step['epoch']:.2f}", f"{step['loss']:.4f}", f"{step['learning_rate']:.2e}")
        for step in drawn
    ]
    return {
        "loss": Figure(
            "Loss",
            "Lower is better. Where the validation loss rises while the training loss falls, the model is overfitting.",
            charts.lines(
                loss,
                "focal loss",
                {"training steps": charts.GREY, "training mean": charts.BLUE, "validation": charts.ORANGE},
                chosen=chosen,
            ),
            ("epoch", "training loss", "validation loss"),
            [(_epoch(e, chosen), f"{e.train_loss:.4f}", f"{e.loss:.4f}") for e in epochs],
        ),
        "scores": Figure(
            "Macro-F1 and accuracy",
            "Higher is better. Scores are of the validation windows; the target of macro-F1 is the orange dashed line.",
            charts.lines(
                scores, "score", {"macro-F1": charts.BLUE, "accuracy": charts.GREY}, chosen=chosen, level=target
            ),
            ("epoch", "macro-F1", "accuracy"),
            [(_epoch(e, chosen), f"{e.value(PRIMARY_METRIC):.4f}", f"{e.value('accuracy'):.4f}") for e in epochs],
        ),
        "rate": Figure(
            "Learning rate",
            "Warm-up, constant, decay to zero.",
            charts.lines(rate, "learning rate", {"learning rate": charts.BLUE}, chosen=chosen),
            ("optimizer step", "epoch", "training loss", "learning rate"),
            by_step,
        ),
    }


def thinned(steps: Sequence[Mapping[str, Any]], points: int = CURVE_POINTS) -> list[dict[str, Any]]:
    """At most `points` records: each has the last step of a group of consecutive steps, and their mean loss."""
    size = -(-len(steps) // points)
    groups = [steps[start : start + size] for start in range(0, len(steps), max(size, 1))]
    return [
        {
            "step": group[-1]["step"],
            "loss": sum(step["loss"] for step in group) / len(group),
            "learning_rate": group[-1]["learning_rate"],
        }
        for group in groups
    ]


def confusion(counts: Sequence[Sequence[int]]) -> Figure:
    cells = [
        {"label": label, "called": called, "rows": rows, "share": rows / max(1, sum(row))}
        for label, row in zip(LABELS, counts, strict=True)
        for called, rows in zip(LABELS, row, strict=True)
    ]
    return Figure(
        "Confusion matrix",
        "A row holds the windows of one label, a column those of one prediction, as a count and as a share of the row. "
        "Right predictions are on the diagonal.",
        charts.confusion(cells, LABELS),
        ("label", *(f"predicted {label}" for label in LABELS), "windows"),
        [
            (label, *(f"{rows:,} ({share(rows / max(1, sum(row)))})" for rows in row), f"{sum(row):,}")
            for label, row in zip(LABELS, counts, strict=True)
        ],
    )


def classes(scores: Mapping[Label, ClassScores], intervals: Mapping[Label, ClassIntervals]) -> Figure:
    by_class = {label: _three(scores[label], intervals[label]) for label in LABELS}
    rows = [_interval(f"{label} {name}", value, ends) for label in LABELS for name, value, ends in by_class[label]]
    dot = "The dot is the score: precision is of the predictions of a class, recall of its windows."
    known = [ends for values in by_class.values() for _, _, ends in values]
    return Figure(
        "Precision, recall and F1 by class",
        _reading(dot, f"The line is its {INTERVAL}.", known),
        charts.intervals(rows, "score", domain=(0, 1)),
        ("class", "precision", "recall", "F1", "windows"),
        [
            (label, *(_with_span(value, ends) for _, value, ends in by_class[label]), f"{scores[label].support:,}")
            for label in LABELS
        ],
    )


def reliability(tables: Tables) -> Figure:
    before, after = "before", "after temperature"
    rows = [{"series": before, **bin_.to_dict()} for bin_ in tables.before]
    rows += [{"series": after, **bin_.to_dict()} for bin_ in tables.after]
    return Figure(
        "Reliability diagram",
        "Each point stands for about the same number of validation windows. Below the dashed line the model is "
        "overconfident, above it underconfident.",
        charts.reliability(rows, {before: charts.GREY, after: charts.BLUE}),
        ("series", "confidence", "right", "windows"),
        [(row["series"], share(row["confidence"]), share(row["accuracy"]), str(row["rows"])) for row in rows],
    )


def calibrated(before: MetricValues, after: MetricValues) -> list[tuple[str, str, str]]:
    """One row per metric of probabilities, before and after the temperature."""
    metrics = [metric for metric in METRICS if not metric.depends_only_on_predictions]
    return [(metric.title, f"{before.value(metric.name):.3f}", f"{after.value(metric.name):.3f}") for metric in metrics]


def histogram(bins: Sequence[Called]) -> Figure:
    rows = [
        {"series": series, "from": bin_.low, "to": bin_.high, "rows": rows}
        for bin_ in bins
        for series, rows in (("right", bin_.right), ("wrong", bin_.wrong))
    ]
    return Figure(
        "Confidence of right and wrong predictions",
        "The height is the number of windows with that confidence. A good model has few wrong predictions (orange), "
        "and has them on the left.",
        charts.histogram(rows, {"right": charts.BLUE, "wrong": charts.ORANGE}),
        ("confidence", "right", "wrong"),
        [(f"{share(b.low, 0)} to {share(b.high, 0)}", str(b.right), str(b.wrong)) for b in bins],
    )


def risk(curve: Sequence[Point]) -> Figure:
    return Figure(
        "Errors among the most confident predictions",
        "From right to left only the most confident predictions are kept: the line should fall towards the left.",
        charts.risk([point.to_dict() for point in curve]),
        ("predictions kept", "wrong among them", "confidence at least"),
        [(share(p.coverage, 0), share(p.risk), share(p.confidence)) for p in curve],
    )


def balance(data: Data) -> Figure:
    before, after, weights = data.before_oversampling, data.after_oversampling, data.class_weights
    names = {"before": before, "after": after}
    rows = [
        {"class": f"{label}\nweight\n{weights[label]:.2f}", "series": name, "rows": counts[label]}
        for label in LABELS
        for name, counts in names.items()
    ]
    return Figure(
        "Training windows by class, before and after oversampling",
        "Oversampling repeats windows of rare classes, up to a limit. The class weight multiplies the loss of a class "
        "(1 changes nothing).",
        charts.balance(rows, {"before": charts.GREY, "after": charts.BLUE}),
        ("class", "before", "after, in an epoch", "class weight"),
        [(label, f"{before[label]:,}", f"{after[label]:,}", f"{weights[label]:.3f}") for label in LABELS],
    )


def candles(mistake: Mistake) -> Figure | None:
    """The bars of a window; None for a row without bars."""
    if not mistake.bars:
        return None
    names = [name for name in COLUMNS if name in mistake.bars]
    columns = zip(*(mistake.bars[name] for name in names), strict=True)
    count = len(mistake.bars["open"])
    bars = [
        {"bar": place - count + 1, "move": "down" if bar[3] < bar[0] else "up", **dict(zip(names, bar, strict=True))}
        for place, bar in enumerate(columns)
    ]
    return Figure(
        f"{count} bars up to the event",
        "Blue bars closed at or above their open, orange bars below; the shaded column is the event.",
        charts.candles(bars, names),
        ("bar", *names),
        [(str(bar["bar"]), *(f"{bar[name]:,.10g}" for name in names)) for bar in bars],
    )


def share(value: float, digits: int = 1) -> str:
    """A percentage without line breaks: 12.3 %."""
    return f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%"


def span(ends: Sequence[float] | None, form: str = ".3f") -> str:
    """An interval without line breaks, 0.123 to 0.456; a dash where there is none."""
    return "–" if ends is None else f"{ends[0]:{form}} to {ends[1]:{form}}".replace(" ", "\N{NO-BREAK SPACE}")


def _with_span(value: float, ends: Sequence[float] | None) -> str:
    return f"{value:.3f}" if ends is None else f"{value:.3f} ({span(ends)})"


def _reading(dot: str, line: str, intervals: Sequence[Interval | None]) -> str:
    """How to read a chart of values, and of their intervals if there are any."""
    return f"{dot} {line}" if any(intervals) else f"{dot} No intervals: the windows cover too few independent periods."


def _interval(
    name: str, value: float, ends: Sequence[float] | None, target: float | None = None
) -> dict[str, str | float | None]:
    low, high = ends or (None, None)
    return {"name": name, "value": value, "low": low, "high": high, "target": target}


def _three(scores: ClassScores, ends: ClassIntervals) -> list[tuple[str, float, Interval | None]]:
    named = {"precision": "precision", "recall": "recall", "f1": "F1"}
    return [(title, getattr(scores, name), getattr(ends, name)) for name, title in named.items()]


def _figures(metrics: Sequence[Metric], scores: MetricValues) -> tuple[str, ...]:
    return tuple(f"{scores.value(metric.name):.3f}" for metric in metrics)


def _point(epoch: float, series: str, value: float, *, dot: bool = True) -> dict[str, Any]:
    return {"epoch": epoch, "series": series, "value": value, "dot": dot}


def _epoch(record: EpochRecord, chosen: int) -> str:
    return f"{record.epoch} (chosen)" if record.epoch == chosen else str(record.epoch)
