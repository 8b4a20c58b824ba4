"""What the report shows: each figure as a chart and as a table of the same values.

Comes in: the summary of a run and its lines of `metrics.jsonl`. Goes out: a `Figure` each, by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ctxtrain.evaluation.metrics import CHIEF, METRICS, Metric, shown
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
from ctxtrain.storage.metrics_log import ClassScores, EpochRecord, Measured, Scores

CURVE_POINTS = 200  # more steps than this are drawn as means of neighbours


@dataclass(frozen=True)
class Figure:
    """`reading` says in one sentence how to read the chart; the table holds text, its first column names the row."""

    title: str
    reading: str
    spec: charts.Spec
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def all_figures(summary: Summary, metrics: Iterable[Mapping[str, Any]]) -> dict[str, Figure]:
    """Every figure of the page except the mistakes; `reliability` only where probabilities were calibrated."""
    scores, intervals = summary.judged, summary.intervals
    interval = "95 % interval" if intervals.trusted else "95 % interval (not to be trusted)"
    figures = {
        "targets": targets(summary.targets, interval),
        "leads": leads(scores, summary.baselines.scores, interval),
        **learning(summary, [line for line in metrics if line["kind"] == "step"]),
        "confusion": confusion(scores.confusion),
        "classes": classes(scores.per_class, intervals.scores.per_class, interval),
        "histogram": histogram(summary.selective.histogram),
        "risk": risk(summary.selective.curve),
        "balance": balance(summary.data),
    }
    if isinstance(summary.calibration, Calibrated):
        figures["reliability"] = reliability(summary.calibration.reliability)
    return figures


def targets(found: Sequence[Target], interval: str) -> Figure:
    rows = [_interval(metric_name(t.metric), t.value, t.interval, t.target) for t in found]
    return Figure(
        "Each target and what was reached",
        f"The dot is the value, the line its {interval}, the orange tick the target: a target is met beyond chance "
        "when the whole line lies to the right of its tick and can be trusted.",
        charts.intervals(rows, "value", domain=(0, 1)),
        ("metric", "verdict", "value", "target", interval, "priority"),
        [
            (
                metric_name(t.metric),
                t.verdict,
                f"{t.value:.3f}",
                f"≥\N{NO-BREAK SPACE}{t.target:.2f}",
                span(t.interval),
                t.priority.lower(),
            )
            for t in found
        ],
    )


def leads(model: Scores, baselines: Mapping[str, Baseline], interval: str) -> Figure:
    metrics = shown("baselines")
    found = [(readable(name), scores, scores.difference.macro_f1) for name, scores in baselines.items()]
    rows = [_interval(name, lead.value, lead.interval) for name, _, lead in found]
    return Figure(
        "Lead of the model in macro-F1",
        f"The dot is the model’s macro-F1 less the other’s on the same windows, the line its {interval}: to the "
        "right of zero the model is better, and a line that crosses zero shows no difference beyond chance.",
        charts.intervals(rows, "lead in macro-F1", zero=True),
        ("compared", *(metric.title for metric in metrics), "lead in macro-F1", interval),
        [
            ("the model", *_figures(metrics, model), "", ""),
            *(
                (name, *_figures(metrics, scores), f"{lead.value:+.3f}", span(lead.interval, "+.3f"))
                for name, scores, lead in found
            ),
        ],
    )


def learning(summary: Summary, steps: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """Loss, scores and learning rate over epochs, each with the chosen epoch."""
    epochs, chosen = summary.epochs, summary.best.epoch
    steps_an_epoch = epochs[0].step
    drawn = [{**step, "epoch": step["step"] / steps_an_epoch} for step in thinned(steps)]
    loss = [_point(step["epoch"], "training steps", step["loss"], dot=False) for step in drawn]
    loss += [_point(epoch.epoch, "training mean", epoch.train_loss) for epoch in epochs]
    loss += [_point(epoch.epoch, "validation", epoch.loss) for epoch in epochs]
    names = {"accuracy": "accuracy", CHIEF: "macro-F1"}
    scores = [_point(epoch.epoch, name, epoch.value(key)) for key, name in names.items() for epoch in epochs]
    rate = [_point(step["epoch"], "learning rate", step["learning_rate"], dot=False) for step in drawn]
    wanted = next(target.target for target in summary.targets if target.metric == CHIEF)
    by_step = [
        (str(step["step"]), f"{step['epoch']:.2f}", f"{step['loss']:.4f}", f"{step['learning_rate']:.2e}")
        for step in drawn
    ]
    return {
        "loss": Figure(
            "Loss",
            "Lower is better; where validation rises while training falls, the model learns its windows by heart.",
            charts.lines(
                loss,
                "focal loss",
                {
                    "training steps": charts.GREY,
                    "training mean": charts.BLUE,
                    "validation": charts.ORANGE,
                },
                chosen=chosen,
            ),
            ("epoch", "training loss", "validation loss"),
            [(_epoch(e, chosen), f"{e.train_loss:.4f}", f"{e.loss:.4f}") for e in epochs],
        ),
        "scores": Figure(
            "Macro-F1 and accuracy",
            "Higher is better; the target of macro-F1 is orange dashes and dots. Judged on the validation windows.",
            charts.lines(
                scores,
                "score",
                {"macro-F1": charts.BLUE, "accuracy": charts.GREY},
                chosen=chosen,
                level=wanted,
            ),
            ("epoch", "macro-F1", "accuracy"),
            [(_epoch(e, chosen), f"{e.value(CHIEF):.4f}", f"{e.value('accuracy'):.4f}") for e in epochs],
        ),
        "rate": Figure(
            "Learning rate",
            "How far each optimizer step moves the weights: it warms up, stays, and decays to zero.",
            charts.lines(rate, "learning rate", {"learning rate": charts.BLUE}, chosen=chosen),
            ("optimizer step", "epoch", "training loss", "learning rate"),
            by_step,
        ),
    }


def thinned(steps: Sequence[Mapping[str, Any]], points: int = CURVE_POINTS) -> list[dict[str, Any]]:
    """At most `points` records: the last step of each run of neighbours, with their mean loss."""
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
        "What each label was called",
        "A row holds the windows of one label, a column what the model called them, in windows and as a share of the "
        "row: right calls lie on the diagonal.",
        charts.confusion(cells, LABELS),
        ("label", *(f"called {label}" for label in LABELS), "windows"),
        [
            (label, *(f"{rows:,} ({share(rows / max(1, sum(row)))})" for rows in row), f"{sum(row):,}")
            for label, row in zip(LABELS, counts, strict=True)
        ],
    )


def classes(scores: Mapping[Label, ClassScores], ends: Mapping[Label, ClassIntervals], interval: str) -> Figure:
    found = {label: _three(scores[label], ends[label]) for label in LABELS}
    rows = [_interval(f"{label} {name}", value, own) for label in LABELS for name, value, own in found[label]]
    return Figure(
        "Precision, recall and F1 by class",
        f"The dot is the score, the line its {interval}; precision is how often a call of the class is right, recall "
        "how many of the class’s windows are found.",
        charts.intervals(rows, "score", domain=(0, 1)),
        ("class", "precision", "recall", "F1", "windows"),
        [
            (label, *(f"{value:.3f} ({span(own)})" for _, value, own in found[label]), f"{scores[label].support:,}")
            for label in LABELS
        ],
    )


def reliability(tables: Tables) -> Figure:
    before, after = "before", "after temperature"
    rows = [{"series": before, **bin_.plain()} for bin_ in tables.before]
    rows += [{"series": after, **bin_.plain()} for bin_ in tables.after]
    return Figure(
        "Does confidence mean what it says?",
        "Each point is a like number of validation windows: on the dashed line the model is right as often as it is "
        "confident, below the line it claims too much, above it too little.",
        charts.reliability(rows, {before: charts.GREY, after: charts.BLUE}),
        ("series", "confidence", "right", "windows"),
        [(row["series"], share(row["confidence"]), share(row["accuracy"]), str(row["rows"])) for row in rows],
    )


def calibrated(before: Measured, after: Measured) -> list[tuple[str, str, str]]:
    """Rows of a table: each metric of probabilities before and after the temperature."""
    metrics = [metric for metric in METRICS if not metric.of_calls]
    return [(metric.title, f"{before.value(metric.name):.3f}", f"{after.value(metric.name):.3f}") for metric in metrics]


def histogram(bins: Sequence[Called]) -> Figure:
    rows = [
        {"series": series, "from": bin_.low, "to": bin_.high, "rows": rows}
        for bin_ in bins
        for series, rows in (("right", bin_.right), ("wrong", bin_.wrong))
    ]
    return Figure(
        "How sure the model was, right and wrong",
        "The height is the number of windows called with that confidence: a good model has few wrong calls, in orange, "
        "and those on the left.",
        charts.histogram(rows, {"right": charts.BLUE, "wrong": charts.ORANGE}),
        ("confidence", "right", "wrong"),
        [(f"{share(b.low, 0)} to {share(b.high, 0)}", str(b.right), str(b.wrong)) for b in bins],
    )


def risk(curve: Sequence[Point]) -> Figure:
    return Figure(
        "Errors, if only the surest windows are answered",
        "From right to left the model answers fewer windows, the surest ones: the line should fall towards the left.",
        charts.risk([point.plain() for point in curve]),
        ("windows answered", "wrong among them", "confidence at least"),
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
        "Oversampling repeats windows of rare classes, but none too often; the weight multiplies what an error on the "
        "class costs (1 changes nothing). They keep a common class from drowning a rare one.",
        charts.balance(rows, {"before": charts.GREY, "after": charts.BLUE}),
        ("class", "before", "after, in an epoch", "class weight"),
        [(label, f"{before[label]:,}", f"{after[label]:,}", f"{weights[label]:.3f}") for label in LABELS],
    )


def candles(mistake: Mistake) -> Figure | None:
    """The bars of a window; None for a text row."""
    if not mistake.bars:
        return None
    columns = zip(*(mistake.bars[name] for name in COLUMNS), strict=True)
    count = len(mistake.bars["open"])
    bars = [
        {"bar": place - count + 1, "move": "down" if bar[3] < bar[0] else "up", **dict(zip(COLUMNS, bar, strict=True))}
        for place, bar in enumerate(columns)
    ]
    return Figure(
        f"{count} bars up to the event",
        "A blue body closed at or above its open, an orange one below; the shaded column is the event.",
        charts.candles(bars),
        ("bar", *COLUMNS),
        [(str(bar["bar"]), *(f"{bar[name]:,.10g}" for name in COLUMNS)) for bar in bars],
    )


def share(value: float, digits: int = 1) -> str:
    """As text that does not break: 12.3 %."""
    return f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%"


def span(ends: Sequence[float] | None, form: str = ".3f") -> str:
    """As text that does not break: 0.123 to 0.456."""
    return "unknown" if ends is None else f"{ends[0]:{form}} to {ends[1]:{form}}".replace(" ", "\N{NO-BREAK SPACE}")


def _interval(
    name: str, value: float, ends: Sequence[float] | None, target: float | None = None
) -> dict[str, str | float | None]:
    low, high = ends or (None, None)
    return {"name": name, "value": value, "low": low, "high": high, "target": target}


def _three(own: ClassScores, ends: ClassIntervals) -> list[tuple[str, float, Interval | None]]:
    return [
        ("precision", own.precision, ends.precision),
        ("recall", own.recall, ends.recall),
        ("F1", own.f1, ends.f1),
    ]


def _figures(metrics: Sequence[Metric], scores: Measured) -> tuple[str, ...]:
    return tuple(f"{scores.value(metric.name):.3f}" for metric in metrics)


def _point(epoch: float, series: str, value: float, *, dot: bool = True) -> dict[str, Any]:
    return {"epoch": epoch, "series": series, "value": value, "dot": dot}


def _epoch(record: EpochRecord, chosen: int) -> str:
    return f"{record.epoch} (chosen)" if record.epoch == chosen else str(record.epoch)
