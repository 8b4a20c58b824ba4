"""The six targets of the specification, section 6.2, with a verdict for each: met, may be luck, or missed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypedDict

from ctxtrain.evaluation.bootstrap import Interval
from ctxtrain.evaluation.metrics import Metrics

Verdict = Literal["met", "met, may be luck", "missed"]

PRIORITIES = {
    "accuracy": "HIGH",
    "macro_f1": "CRITICAL",
    "long_precision": "HIGH",
    "short_precision": "HIGH",
    "long_recall": "MEDIUM",
    "short_recall": "MEDIUM",
}


class Target(TypedDict):
    """`met` compares the value; `verdict` is "met" only if the whole interval reaches the target."""

    metric: str
    target: float
    value: float
    met: bool
    priority: str
    interval: Interval | None
    verdict: Verdict


def evaluate_targets(metrics: Metrics, targets: Mapping[str, float], intervals: Mapping[str, Any]) -> list[Target]:
    """Each target with its value and verdict; `targets` maps the names of `PRIORITIES` to the required values.

    `intervals` come from `score_intervals`; without an interval the best verdict is "met, may be luck".
    """
    results = []
    for name, priority in PRIORITIES.items():
        label, _, score = name.partition("_")
        scores = metrics["per_class"].get(label.upper())
        value = scores[score] if scores else metrics[name]
        interval = intervals["per_class"][label.upper()][score] if scores else intervals[name]
        target = targets[name]
        verdict: Verdict = "missed"
        if value >= target:
            verdict = "met" if interval is not None and interval[0] >= target else "met, may be luck"
        results.append(
            Target(
                metric=name,
                target=target,
                value=value,
                met=value >= target,
                priority=priority,
                interval=interval,
                verdict=verdict,
            )
        )
    return results
