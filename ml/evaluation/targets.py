"""The six targets of the specification, section 6.2, and whether each is met."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

from ml.evaluation.metrics import Metrics

PRIORITIES = {
    "accuracy": "HIGH",
    "macro_f1": "CRITICAL",
    "long_precision": "HIGH",
    "short_precision": "HIGH",
    "long_recall": "MEDIUM",
    "short_recall": "MEDIUM",
}


class Target(TypedDict):
    metric: str
    target: float
    value: float
    met: bool
    priority: str


def judge(metrics: Metrics, targets: Mapping[str, float]) -> list[Target]:
    """Each target beside its value; `targets` maps the names of `PRIORITIES` to the least value that meets them."""
    verdicts = []
    for name, priority in PRIORITIES.items():
        label, _, score = name.partition("_")
        scores = metrics["per_class"].get(label.upper())
        value = scores[score] if scores else metrics[name]  # type: ignore[literal-required]  # names of PRIORITIES
        verdicts.append(
            Target(metric=name, target=targets[name], value=value, met=value >= targets[name], priority=priority)
        )
    return verdicts
