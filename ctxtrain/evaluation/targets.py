"""The six targets of the specification, section 6.2, and whether each is met, beyond chance or within it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypedDict

from ctxtrain.evaluation.bootstrap import Interval
from ctxtrain.evaluation.metrics import Metrics

Verdict = Literal["met", "met, but within chance", "missed"]

PRIORITIES = {
    "accuracy": "HIGH",
    "macro_f1": "CRITICAL",
    "long_precision": "HIGH",
    "short_precision": "HIGH",
    "long_recall": "MEDIUM",
    "short_recall": "MEDIUM",
}


class Target(TypedDict):
    """`met` compares the value alone; `verdict` is "met" only if the lower end of a trusted interval meets it too."""

    metric: str
    target: float
    value: float
    met: bool
    priority: str
    interval: Interval | None
    verdict: Verdict


def judge(
    metrics: Metrics, targets: Mapping[str, float], intervals: Mapping[str, Any], *, trusted: bool
) -> list[Target]:
    """Each target beside its value; `targets` maps the names of `PRIORITIES` to the least value that meets them.

    `intervals` are those of `score_intervals`; where they are not `trusted`, nothing is met beyond chance.
    """
    verdicts = []
    for name, priority in PRIORITIES.items():
        label, _, score = name.partition("_")
        scores = metrics["per_class"].get(label.upper())
        value = scores[score] if scores else metrics[name]
        interval = intervals["per_class"][label.upper()][score] if scores else intervals[name]
        target = targets[name]
        verdict: Verdict = "missed"
        if value >= target:
            beyond = trusted and interval is not None and interval[0] >= target
            verdict = "met" if beyond else "met, but within chance"
        verdicts.append(
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
    return verdicts
