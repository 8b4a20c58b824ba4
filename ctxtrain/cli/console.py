"""Results as tables for a terminal; plain text in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from ctxtrain.cli.curve_table import curve_table
from ctxtrain.errors import describe_kinds
from ctxtrain.evaluation.metrics import Metric, metrics_for
from ctxtrain.labels import Label
from ctxtrain.reporting.learning_curve import curve_reading
from ctxtrain.reporting.runs_schema import PooledBaselines, Runs
from ctxtrain.reporting.summary_schema import BlockIntervals, Summary, Target
from ctxtrain.reporting.verdict import leak_suffix, readable, short, verdict, verdict_of_several
from ctxtrain.storage.metrics_log import MetricValues, Scores
from ctxtrain.streams import ResilientStream

UNBOUNDED = 1000  # columns, wide enough for every table
RULE_WIDTH = 80  # columns


def stdout() -> Console:
    return Console(file=ResilientStream(sys.stdout, results=True) if sys.stdout else None)  # type: ignore[arg-type]  # it acts as one


def stderr() -> Console:
    return Console(file=ResilientStream(sys.stderr, results=False) if sys.stderr else None, stderr=True)  # type: ignore[arg-type]


def print_summary(summary: Summary, output_dir: str) -> None:
    """The end of a run: targets, scores, verdict, files."""
    console = stdout()
    _print_targets(console, summary.targets, summary.targets_judged_on)
    print_metrics(summary.judged)
    _print_table(console, _baselines(summary), _baselines(summary, narrow=True))
    if summary.learning_curve:
        _print_table(console, curve_table(summary))
        console.print(curve_reading(summary), highlight=False, soft_wrap=not console.is_terminal)
    intervals = summary.intervals
    console.print(_blocks(intervals), highlight=False)
    console.print(verdict(summary), highlight=False, soft_wrap=not console.is_terminal)
    model = summary.model
    console.print(
        f"{summary.exported_epochs} of {len(summary.epochs)}, temperature {summary.calibration.temperature:.3f}, "
        f"{model.trainable:,} of {model.parameters:,} parameters trained ({model.trainable_share:.2%})",
        highlight=False,
        soft_wrap=not console.is_terminal,
    )
    for name in ("final_model.zip", "report.html", "training_summary.json"):
        console.print(str(Path(output_dir) / name), highlight=False, markup=False, soft_wrap=True)


def print_runs(several: Runs, output_dir: str) -> None:
    """The end of several runs: each run, mean and spread, and the pooled scores with their intervals."""
    console, leaked = stdout(), leak_suffix(several.leaked)
    table = Table(title=f"Runs{leaked}", title_justify="left")
    metrics, spread = metrics_for("runs"), several.spread
    for column in ("run", "judged", *(metric.short for metric in metrics), "best baseline", "lead"):
        table.add_column(column, justify="left" if column in ("run", "best baseline") else "right", no_wrap=True)
    for run in several.runs:
        judged = run.rows.by_file()["test" if run.judged_on.startswith("test") else "val"]
        name = run.name + (" LEAKED" if run.leaked else "")
        table.add_row(name, f"{judged:,}", *_figures(metrics, run), short(run.best_baseline), f"{run.lead:+.3f}")
    means = [f"{spread.value(metric.name).mean:.3f}" for metric in metrics]
    table.add_row("mean", "", *means, "", f"{spread.lead.mean:+.3f}".lstrip("+"), style="bold")
    deviations = [f"{spread.value(metric.name).deviation:.3f}" for metric in metrics]
    table.add_row("deviation", "", *deviations, "", f"{spread.lead.deviation:.3f}", style="bold")
    _print_table(console, table)
    _print_table(console, _mean_baselines(several.baselines))
    _print_targets(console, several.targets, f"the pooled rows of all runs{leaked}")
    print_metrics(several.pooled)
    intervals = several.intervals
    console.print(_blocks(intervals), highlight=False)
    console.print(verdict_of_several(several), highlight=False, soft_wrap=not console.is_terminal)
    console.print(str(Path(output_dir) / "runs.json"), highlight=False, markup=False, soft_wrap=True)


def _blocks(intervals: BlockIntervals) -> str:
    if intervals.doubt:
        return f"no 95 % intervals: {intervals.doubt}"
    return f"95 % intervals from {intervals.blocks:,} blocks: {intervals.block}"


def _print_table(console: Console, *tables: Table) -> None:
    """Print the first table that fits, else the last one without rules. No cell is cut; text may wrap at spaces."""
    for table in tables:
        for column in table.columns:
            texts = [str(text) for text in (column.header, *column.cells)]
            column.no_wrap = column.justify == "right"
            whole = texts if column.no_wrap else [word for text in texts for word in text.split()]
            column.min_width = max(map(len, whole), default=0)
    fitting = next((table for table in tables if _fits(console, table)), None)
    if fitting is None:
        fitting = tables[-1]
        fitting.box, fitting.pad_edge, fitting.collapse_padding = None, False, True
        if (least := _measured(console, fitting).minimum) > console.width:
            fitting.width = least
    console.print(fitting, crop=False)


def _fits(console: Console, table: Table) -> bool:
    return _measured(console, table).maximum <= console.width


def _measured(console: Console, table: Table) -> Measurement:
    return console.measure(table, options=console.options.update(width=UNBOUNDED))


def _figures(metrics: Sequence[Metric], scores: MetricValues) -> list[str]:
    return [f"{scores.value(metric.name):.3f}" for metric in metrics]


def _print_targets(console: Console, targets: Sequence[Target], scored_on: str) -> None:
    _print_table(console, *(_targets(targets, scored_on, priorities=priorities) for priorities in (True, False)))


def _targets(targets: Sequence[Target], scored_on: str, *, priorities: bool) -> Table:
    table = Table(title=f"Targets, on {scored_on}", title_justify="left")
    for column in ("metric", "value", "95 %", "target", "verdict", "priority")[: 6 if priorities else 5]:
        table.add_column(column, justify="right" if column in ("value", "95 %", "target") else "left")
    for target in targets:
        cells = [
            target.metric,
            f"{target.value:.3f}",
            interval_text(target.interval),
            f"{target.target:.2f}",
            target.verdict.replace("met, may be luck", "met (luck?)"),
            target.priority,
        ]
        table.add_row(*cells[: len(table.columns)])
    return table


def _baselines(summary: Summary, *, narrow: bool = False) -> Table:
    """The model and the baselines on the same rows; `lead` is the model's in macro-F1, with its interval."""
    baselines, named = summary.baselines, short if narrow else readable
    title = f"On the same rows; best baseline on validation rows: {readable(baselines.best)}"
    table = Table(title=title, title_justify="left")
    metrics = metrics_for("baselines")
    for column in ("", *(metric.narrow for metric in metrics), "lead", "95 %"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("the model", *_figures(metrics, summary.judged), "", "")
    for name, scores in baselines.scores.items():
        lead = scores.difference.macro_f1
        table.add_row(named(name), *_figures(metrics, scores), f"{lead.value:+.3f}", interval_text(lead.interval))
    return table


def _mean_baselines(baselines: PooledBaselines) -> Table:
    """Means over the runs; the model's lead is in macro-F1."""
    title = f"Means of the runs; best baseline on validation rows: {readable(baselines.best)}"
    table = Table(title=title, title_justify="left")
    for column in ("", "macro-F1", "on validation", "lead"):
        table.add_column(column, justify="left" if not column else "right")
    for name, mean in baselines.means.items():
        figures = [f"{value:.3f}" for value in (mean.macro_f1, mean.validation_macro_f1)]
        table.add_row(readable(name), *figures, f"{mean.lead:+.3f}")
    return table


def interval_text(interval: Sequence[float] | None) -> str:
    return "–" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"


def print_metrics(metrics: Scores) -> None:
    """Scores per class with the confusion matrix, and the overall figures."""
    console = stdout()
    whole = _classes(metrics, scores=True, confusion=True)
    if _fits(console, whole):
        _print_table(console, whole)
    else:
        _print_table(console, _classes(metrics, scores=True, confusion=False))
        _print_table(console, _classes(metrics, scores=False, confusion=True))
    figures = [f"{metric.short} {metrics.value(metric.name):.3f}" for metric in metrics_for("scores")]
    console.print(
        "  ".join([*figures, f"windows {metrics.rows:,}"]),
        highlight=False,
        soft_wrap=not console.is_terminal,
    )
    for label in metrics.absent:
        console.print(f"no {label} windows: its F1 counts as 0 in macro-F1", highlight=False)
    for label, predictions in _predictions(metrics).items():
        if not predictions and label not in metrics.absent:
            console.print(f"no {label} predictions: its precision counts as 0", highlight=False)


def print_evaluation(result: Mapping[str, Any]) -> None:
    """The metrics of `ctxtrain evaluate`, their dtype, and what the other dtype changes if it was asked for."""
    extra = {"dtype", "dtype_comparison"}
    print_metrics(Scores.model_validate({key: value for key, value in result.items() if key not in extra}))
    lines = [f"answered in {result['dtype']}"]
    if compared := result.get("dtype_comparison"):
        scores = ", ".join(f"{score:.3f} in {dtype}" for dtype, score in compared["macro_f1"].items())
        lines.append(
            f"between float32 and bfloat16, {compared['labels_changed']:,} of {compared['rows']:,} labels change; "
            f"largest difference {compared['max_logit_difference']:.2g} of a logit, "
            f"{compared['max_probability_difference']:.2g} of a probability; macro-F1 {scores}"
        )
    console = stdout()
    for line in lines:
        console.print(line, highlight=False, soft_wrap=not console.is_terminal)


def _predictions(metrics: Scores) -> dict[Label, int]:
    """The number of windows predicted as each class."""
    return dict(zip(metrics.per_class, map(sum, zip(*metrics.confusion, strict=True)), strict=True))


def _classes(metrics: Scores, *, scores: bool, confusion: bool) -> Table:
    """One row per class: its scores (– where undefined) and its row of the confusion matrix."""
    table, predicted = Table(), _predictions(metrics)
    names = ("precision", "recall", "F1", "windows") if scores else ()
    table.add_column("class")
    for column in (*names, *(f"→ {label}" for label in (metrics.per_class if confusion else ()))):
        table.add_column(column, justify="right")
    for row, (label, one) in enumerate(metrics.per_class.items()):
        shares = ((one.precision, predicted[label]), (one.recall, one.support), (one.f1, one.support))
        figures = [f"{share:.3f}" if whole else "–" for share, whole in shares] + [str(one.support)]
        counts = map(str, metrics.confusion[row])
        table.add_row(label, *(figures if scores else ()), *(counts if confusion else ()))
    return table


def print_check(report: Mapping[str, Any]) -> None:
    """Rows and classes, then faults, leaks, warnings, notes, lengths, unused fields and totals, one per line."""
    from ctxtrain.data.leakage import describe_finding
    from ctxtrain.data.separation import Horizon

    console = stdout()
    _print_table(console, _rows_table(report))
    lines = list(report["faults"])
    if report["fault_total"] > len(lines):
        more = _counted(report["fault_total"] - len(lines), "more fault")
        lines.append(f"… and {more}{describe_kinds(report['hidden_faults'])}")
    refused = [describe_finding(leak) for leak in report["leaks"] if leak["refused"]]
    warnings = _warnings(report)
    lines += [f"leak: {leak}" for leak in refused] + [f"warning: {warning}" for warning in warnings]
    lines += [f"note: {name}: {line}" for name, noticed in report["noticed"].items() for line in noticed]
    for name, times in report["times"].items():
        if times["time_unit"]:
            span = f", events from {times['first_event']} to {times['last_event']}" if times["first_event"] else ""
            lines.append(f"{name}: times are {times['time_unit']}{span}")
    if report["label_horizon"]["bars"]:
        lines.append(str(Horizon(**report["label_horizon"])))
    for name, tokens in report["tokens"].items():
        bars = report["bars"][name]
        length = f"{bars['shortest']} to {bars['longest']} bars" if bars["longest"] else "rows without bars"
        lines.append(
            f"{name}: {length}, {tokens['shortest']} to {tokens['longest']} tokens "
            f"(median {tokens['median']}); {_counted(tokens['rows_cut'], 'row')} longer than {tokens['max_tokens']:,}"
        )
    if report["unused_fields"]:
        side = set(report["label_side_fields"])
        unused = [f"{name} (label-side)" if name in side else name for name in report["unused_fields"]]
        lines.append(f"fields that the model does not read: {', '.join(unused)}")
    lines.append(
        f"{_counted(report['fault_total'], 'fault')}, {_counted(len(refused), 'leak')} that training refuses, "
        f"{_counted(len(warnings), 'warning')}"
    )
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _warnings(report: Mapping[str, Any]) -> list[str]:
    """What training accepts, but a person should look at first."""
    from ctxtrain.data.leakage import describe_finding
    from ctxtrain.data.profile import outlier_message

    warnings = [
        *report["base"],
        *_label_rule(report),
        *(describe_finding(leak) for leak in report["leaks"] if not leak["refused"]),
    ]
    warnings += [f"not checked: {what}" for what in report["unchecked"]]
    warnings += [
        f"{name}: {_counted(count, 'row')} with the same window as an earlier row of the file"
        for name, count in report["duplicates"].items()
        if count
    ]
    for name, entries in report["drift"].items():
        if moved := [entry for entry in entries if entry["shifted"]]:
            named = ", ".join(f"{entry['feature']} {entry['psi']:.2f}" for entry in moved)
            warnings.append(f"{name} drifts from train (population stability index above 0.25 and chance): {named}")
    warnings += [
        f"{name}: {outlier_message(field, prints)}"
        for name, wild in report["wild_prints"].items()
        for field, prints in wild.items()
    ]
    for name, partial in report["partial_fields"].items():
        warnings += [
            f"{name}: {field} is in {_counted(count, 'row')} only; the model reads fields that every row has"
            for field, count in partial.items()
        ]
    return warnings


def _label_rule(report: Mapping[str, Any]) -> list[str]:
    """The rule that reproduces the labels, in lines of 80 columns."""
    from ctxtrain.data.label_rule import LabelRule

    if not report["label_rule"]:
        return []
    rule = LabelRule(**report["label_rule"])
    lines = [fill(line, RULE_WIDTH, initial_indent="  ", subsequent_indent="    ") for line in rule.lines]
    return ["\n".join([f"{rule}:", *lines])]


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _rows_table(report: Mapping[str, Any]) -> Table:
    """Rows and classes of each file, and of each fifth of a file in its order."""
    table = Table()
    for column in ("file", "rows", "LONG", "SHORT", "SKIP"):
        table.add_column(column, justify="left" if column == "file" else "right")
    for name, rows in report["rows"].items():
        table.add_row(name, f"{rows:,}", *(f"{count:,}" for count in report["classes"][name].values()))
        for number, part in enumerate(report["classes_over_time"].get(name, []), start=1):
            counts = [part[label] for label in report["classes"][name]]
            table.add_row(f"  part {number}", f"{sum(counts):,}", *(f"{count:,}" for count in counts), style="dim")
    return table
