"""The model beside its baselines on the same rows: who leads whom by how much, and which of them is to be used.

Comes in: what model and baselines say about the rows, and the rows' blocks. Goes out: plain values for
`training_summary.json` and `runs.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from ctxtrain.evaluation.baselines import WITHOUT_INPUT, Baseline
from ctxtrain.evaluation.bootstrap import LEVEL, difference_intervals, difference_within
from ctxtrain.evaluation.metrics import CHIEF, METRICS, shown
from ctxtrain.evaluation.scores import Judged

Finding = Literal["ahead", "ahead, untrusted", "not ahead", "not ahead, untrusted", "undecided", "nothing learned"]
Ints = NDArray[np.int64]

TAIL = (1 - LEVEL) / 2


def compare(
    model: Judged,
    own: Mapping[str, Any],
    baselines: Mapping[str, Baseline],
    best: str,
    block_N: Ints,
    *,
    trusted: bool,
    seed: int,
    looks: int = 1,
) -> dict[str, Any]:
    """`scores` of the baselines, with the model's `difference` to each and each one's lead `over_chance`; the finding.

    `own` are the model's scores. `best` is the baseline to beat, chosen elsewhere; `best_without_input` is the better
    one of the two that read nothing, by these rows, so the harder one. `use` is `model`, a baseline's name or None.
    Where `best` was chosen from several by these very rows, `looks` is their number: leads over chance then get the
    interval of that many looks (Bonferroni), for the best of several is ahead by luck more often than a single one.
    """
    chance = max(WITHOUT_INPUT, key=lambda name: float(baselines[name].scores[CHIEF]))
    scores = {}
    for name, baseline in baselines.items():
        over_chance = None
        if name != chance:
            lead = _difference(
                baseline.judged, baselines[chance].judged, baseline.scores, baselines[chance].scores, block_N, seed
            )
            over_chance = _widened(lead[CHIEF], looks)
        difference = _difference(model, baseline.judged, own, baseline.scores, block_N, seed)
        scores[name] = {**baseline.scores, "difference": difference, "over_chance": over_chance}
    found = finding(scores, best, chance, trusted=trusted)
    return {
        "scores": scores,
        "best": best,
        "best_without_input": chance,
        "finding": found,
        "use": {"ahead": "model", "not ahead": best}.get(found),
    }


def finding(scores: Mapping[str, Any], best: str, chance: str, *, trusted: bool) -> Finding:
    """What the intervals of three leads in macro-F1 show: model over best baseline, and either over chance.

    ahead                  the model leads the best baseline beyond chance
    ahead, untrusted       its interval says so, but intervals are not to be trusted
    not ahead              it does not, and the best baseline leads what reads no input: that one is to be used
    not ahead, untrusted   the intervals say so, but are not to be trusted: which is to be used is not shown
    undecided              it does not, and of the two only the model leads what reads no input
    nothing learned        neither leads what reads no input
    """
    model_learned = _positive(scores[chance]["difference"][CHIEF])
    baseline_learned = best != chance and _positive(scores[best]["over_chance"])
    if not (model_learned or baseline_learned):
        return "nothing learned"
    if _positive(scores[best]["difference"][CHIEF]):
        return "ahead" if trusted else "ahead, untrusted"
    if not baseline_learned:
        return "undecided"
    return "not ahead" if trusted else "not ahead, untrusted"


def _widened(lead: Mapping[str, Any], looks: int) -> dict[str, Any]:
    by = float(ndtri(1 - TAIL / looks) / ndtri(1 - TAIL))
    ends = [lead["value"] + by * (end - lead["value"]) for end in lead["interval"]]
    chief = next(metric for metric in METRICS if metric.name == CHIEF)
    return {"value": lead["value"], "interval": difference_within(chief, ends), "looks": looks}


def _positive(lead: Mapping[str, Any]) -> bool:
    return bool(lead["interval"][0] > 0)


def _difference(
    first: Judged,
    second: Judged,
    first_scores: Mapping[str, Any],
    second_scores: Mapping[str, Any],
    block_N: Ints,
    seed: int,
) -> dict[str, Any]:
    """First less second, in the scores as they were computed: those of random calls are expectations."""
    names = [metric.name for metric in shown("baselines")]
    exact = {name: float(first_scores[name]) - float(second_scores[name]) for name in names}
    return difference_intervals(first, second, block_N, seed, exact)
