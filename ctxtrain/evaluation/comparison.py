"""Compare the model with its baselines on the same rows: score differences with intervals, and which one to use.

Input: `ScoredRows` of the model and the baselines, and the blocks of the rows. Output: plain values for
`training_summary.json` and `runs.json`. "Chance" is the better of the two baselines that read no input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from scipy.special import ndtri

from ctxtrain.evaluation.baselines import WITHOUT_INPUT, Baseline
from ctxtrain.evaluation.blocks import Blocks
from ctxtrain.evaluation.bootstrap import LEVEL, clip_difference, difference_intervals
from ctxtrain.evaluation.metric_formulas import ScoredRows
from ctxtrain.evaluation.metrics import METRICS, PRIMARY_METRIC, metrics_for

Finding = Literal["ahead", "not ahead", "undecided", "nothing learned", "too few blocks"]

TAIL = (1 - LEVEL) / 2


def compare(
    model: ScoredRows,
    model_scores: Mapping[str, Any],
    baselines: Mapping[str, Baseline],
    best: str,
    blocks: Blocks,
    *,
    seed: int,
    candidate_count: int = 1,
) -> dict[str, Any]:
    """The scores of each baseline with the model's `difference` to it and its lead `over_chance`, and the finding.

    `best` names the baseline to beat; the caller selects it. `best_without_input`, which is chance, names the baseline
    without input that has the higher macro-F1 on these rows. `use` is `model`, the name of a baseline, or None if
    neither is shown to be useful. With too few blocks, all intervals are None.

    `candidate_count` is the number of models from which `best` was selected on these same rows, or 1. The intervals of
    leads over chance are widened for it (Bonferroni), because the best of several models is more often ahead by luck.
    """
    chance = max(WITHOUT_INPUT, key=lambda name: float(baselines[name].scores[PRIMARY_METRIC]))
    scores = {}
    for name, baseline in baselines.items():
        over_chance = None
        if name != chance:
            lead = _difference(
                baseline.scored_rows,
                baselines[chance].scored_rows,
                baseline.scores,
                baselines[chance].scores,
                blocks,
                seed,
            )
            over_chance = _bonferroni(lead[PRIMARY_METRIC], candidate_count)
        difference = _difference(model, baseline.scored_rows, model_scores, baseline.scores, blocks, seed)
        scores[name] = {**baseline.scores, "difference": difference, "over_chance": over_chance}
    result = finding(scores, best, chance) if blocks.trusted else "too few blocks"
    return {
        "scores": scores,
        "best": best,
        "best_without_input": chance,
        "finding": result,
        "use": {"ahead": "model", "not ahead": best}.get(result),
    }


def finding(scores: Mapping[str, Any], best: str, chance: str) -> Finding:
    """The outcome of three comparisons in macro-F1: model with best baseline, and each of these two with chance.

    X leads Y if the whole interval of the difference X − Y lies above 0. The first case that applies is returned:

    nothing learned   neither the model nor the best baseline leads chance
    ahead             the model leads the best baseline
    not ahead         the best baseline leads chance: use the baseline
    undecided         only the model leads chance, but it does not lead the best baseline
    """
    model_learned = _is_positive(scores[chance]["difference"][PRIMARY_METRIC])
    baseline_learned = best != chance and _is_positive(scores[best]["over_chance"])
    if not (model_learned or baseline_learned):
        return "nothing learned"
    if _is_positive(scores[best]["difference"][PRIMARY_METRIC]):
        return "ahead"
    return "not ahead" if baseline_learned else "undecided"


def _bonferroni(lead: Mapping[str, Any], candidate_count: int) -> dict[str, Any]:
    """The lead with its interval widened for a selection from `candidate_count` candidates."""
    if lead["interval"] is None:
        return {**lead, "looks": candidate_count}
    factor = float(ndtri(1 - TAIL / candidate_count) / ndtri(1 - TAIL))
    ends = [lead["value"] + factor * (end - lead["value"]) for end in lead["interval"]]
    primary = next(metric for metric in METRICS if metric.name == PRIMARY_METRIC)
    return {"value": lead["value"], "interval": clip_difference(primary, ends), "looks": candidate_count}


def _is_positive(lead: Mapping[str, Any]) -> bool:
    return bool(lead["interval"][0] > 0)


def _difference(
    first: ScoredRows,
    second: ScoredRows,
    first_scores: Mapping[str, Any],
    second_scores: Mapping[str, Any],
    blocks: Blocks,
    seed: int,
) -> dict[str, Any]:
    """First minus second in each metric of the "baselines" view, as {name: {value, interval}}.

    The values are differences of the given scores, not of the rows, because the scores of random predictions are exact
    expectations. The intervals are shifted to these values.
    """
    names = [metric.name for metric in metrics_for("baselines")]
    exact = {name: float(first_scores[name]) - float(second_scores[name]) for name in names}
    if not blocks.trusted:
        return {name: {"value": value, "interval": None} for name, value in exact.items()}
    return difference_intervals(first, second, blocks.block_N, seed, exact)
