"""The verdict of a run in plain sentences, for the terminal, the report, the model card and the trackers.

Comes in: the `Summary` of a run, or the `Runs` of several. Goes out: text. It leads with leaks, if there are any, then
with whether to use the model, a baseline or neither, and one next step; targets and omissions follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ctxtrain.evaluation.metrics import PRIMARY_METRIC
from ctxtrain.reporting.runs_schema import Runs
from ctxtrain.reporting.summary_schema import Baselines, Lead, LeadOverChance, Summary, Target

_NAMES = {
    "majority": "the most common class",
    "class_prior": "random predictions",
    "extra_trees": "extremely randomised trees",
    "catboost": "CatBoost",
}
_SHORT = {"logistic_regression": "logistic", "gradient_boosting": "boosting", "extra_trees": "extra trees"}


def verdict(summary: Summary) -> str:
    """The outcome of a run in a few sentences."""
    sentences = [
        *warnings(summary.data.leaked, summary.unfinished),
        advice(summary),
        headline(summary),
        omissions(summary),
    ]
    return " ".join(filter(None, sentences))


def verdict_of_several(several: Runs) -> str:
    """The outcome of several runs in a few sentences, from their pooled rows."""
    runs, lead = several.runs, several.spread.lead
    optimistic = any(run.judged_rows_chose_the_epoch for run in runs)
    ahead = sum(run.beats_baseline for run in runs)
    mean, lowest, highest = (f"{value:+.3f}" for value in (lead.mean, lead.lowest, lead.highest))
    skipped = {run.name: run.skipped_steps for run in runs if run.skipped_steps}
    beaten = f"{ahead} of {len(runs)} runs clearly beat their best baseline"
    sentences = [
        leak_warning(several.leaked),
        recommendation(several.pooled.value(PRIMARY_METRIC), several.baselines, several.intervals.doubt),
        f"{beaten}; the mean lead in macro-F1 is {mean} ({lowest} to {highest}).",
        _targets(several.targets, "the pooled rows", optimistic=optimistic),
        _skipped(sum(skipped.values()), f"metrics.jsonl of {_and([*skipped])}") if skipped else "",
        *_left_out(several.baselines.left_out),
    ]
    return " ".join(filter(None, sentences))


def warnings(leaked: str, unfinished: str | None) -> list[str]:
    """What a reader must know before any figure."""
    early = f"This run is unfinished: it {unfinished}. Test rows are scored at the end only." if unfinished else ""
    return [warning for warning in (leak_warning(leaked), early) if warning]


def leak_mark(leaked: str) -> dict[str, str]:
    """The key that every figure carries if rows are in two files although that was allowed; empty without leaks."""
    return {"leaked": leaked} if leaked else {}


def leak_suffix(leaked: str) -> str:
    """The same for a title."""
    return f" (LEAKED: {leaked})" if leaked else ""


def leak_warning(leaked: str) -> str:
    return f"Do not believe any figure here: rows are in two files ({leaked})." if leaked else ""


def headline(summary: Summary) -> str:
    """Which targets are reached, on which rows."""
    split = "validation" if summary.test is None else "test"
    where = f"{summary.judged.rows:,} {split} windows"
    return _targets(summary.targets, where, optimistic=summary.judged_rows_chose_the_epoch)


def metric_name(name: str) -> str:
    """macro_f1 → macro-F1, long_recall → LONG recall."""
    label, _, score = name.partition("_")
    return "macro-F1" if name == "macro_f1" else f"{label.upper()} {score}" if score else name


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _targets(targets: Sequence[Target], where: str, *, optimistic: bool) -> str:
    missed = [metric_name(target.metric) for target in targets if target.verdict == "missed"]
    lucky = [metric_name(target.metric) for target in targets if target.verdict == "met, may be luck"]
    count = len(targets)
    text = f"{len(missed)} of {count} targets missed on {where}: {_and(missed)}" if missed else ""
    text = text or f"All {count} targets reached on {where}"
    if lucky:
        text += "; all of them may be luck" if len(lucky) == count else f"; {_and(lucky)} may be luck"
    after = " These rows were also used to choose the epoch, so the scores are optimistic." if optimistic else ""
    return f"{text}.{after}"


def advice(summary: Summary, *, brief: bool = False) -> str:
    """`recommendation` for one run."""
    score, doubt = summary.judged.value(PRIMARY_METRIC), summary.intervals.doubt
    return recommendation(score, summary.baselines, doubt, brief=brief)


def recommendation(score: float, baselines: Baselines, doubt: str | None, *, brief: bool = False) -> str:
    """Whether to use the model, the best baseline or neither, why, and one next step; without figures if `brief`.

    `score` is the model's macro-F1. `doubt` is why no interval is shown, if none is.
    """
    best, random = baselines.scores[baselines.best], baselines.scores[baselines.best_without_input]
    name, random_name = readable(baselines.best), readable(baselines.best_without_input)
    over_best, over_random = best.difference.macro_f1, random.difference.macro_f1
    lead = "" if brief else _figures(over_best, score, best.value(PRIMARY_METRIC))
    model_lead = "" if brief else _figures(over_random, score, random.value(PRIMARY_METRIC))
    baseline_lead = (
        ""
        if brief or not best.over_chance
        else _figures(best.over_chance, best.value(PRIMARY_METRIC), random.value(PRIMARY_METRIC))
    )
    if baselines.finding == "too few blocks":
        return (
            f"Not shown whether the model is useful: {doubt}. The best baseline is {name}{lead}. "
            "Next: score both on 10 or more independent periods, such as days."
        )
    if baselines.finding == "ahead":
        return (
            f"Usable: the model clearly beats the best baseline, {name}{lead}. "
            "Next: score it on newer windows before you trade on it."
        )
    if baselines.finding == "not ahead":
        model = "does too" if over_random.interval and over_random.interval[0] > 0 else "is not shown to"
        return (
            f"{_not_ahead(over_best, name)}{lead}. That baseline clearly beats {random_name}{baseline_lead}; the model "
            f"{model}{model_lead}. Next: use {name}, or train on more windows."
        )
    if baselines.finding == "undecided":
        return (
            f"{_not_ahead(over_best, name)}{lead}. The model clearly beats {random_name}{model_lead}; that baseline is "
            f"not shown to{baseline_lead}. Next: score both on more windows."
        )
    nothing = "No evidence that the model learned anything: do not use it."
    if best is random:
        why = f"It does not clearly beat {random_name}{model_lead}."
    else:
        why = (
            f"Neither the model{model_lead} nor the best baseline, {name}{baseline_lead}, clearly beats {random_name}."
        )
    return f"{nothing} {why} Next: check the labels, and what the windows carry."


def _not_ahead(lead: Lead, name: str) -> str:
    if lead.interval and lead.interval[1] < 0:
        return f"Beaten by the best baseline, {name}"
    scores = "lower" if lead.value < 0 else "no higher" if lead.value == 0 else "higher"
    return f"Not shown to beat the best baseline, {name}: the model scores {scores}, and the gap may be noise"


def _figures(lead: Lead, first: float, second: float) -> str:
    """Two scores in macro-F1 and their difference, in brackets; `looks` widened the interval of the best of several."""
    text = f"macro-F1 {first:.3f} against {second:.3f}, difference {lead.value:+.3f}"
    if lead.interval is None:
        return f" ({text})"
    low, high = lead.interval
    of = f" for the best of {lead.looks}" if isinstance(lead, LeadOverChance) and lead.looks > 1 else ""
    return f" ({text}, 95 % interval{of} {low:+.3f} to {high:+.3f})"


def omissions(summary: Summary) -> str:
    """Skipped optimizer steps and baselines that were left out; empty if there are none."""
    skipped = [_skipped(summary.skipped_steps, "metrics.jsonl")] if summary.skipped_steps else []
    return " ".join([*skipped, *_left_out(summary.baselines.left_out)])


def _left_out(reasons: Mapping[str, str]) -> list[str]:
    """A sentence for each reason."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(readable(name))
    return [f"Baselines left out: {_and(same)}; {reason}." for reason, same in names.items()]


def _skipped(steps: int, where: str) -> str:
    were = "step was" if steps == 1 else "steps were"
    return f"{steps} optimizer {were} skipped because loss or gradient was not finite; {where} lists their windows."


def readable(name: str) -> str:
    """A baseline's name for people."""
    return _NAMES.get(name, name.replace("_", " "))


def short(name: str) -> str:
    """The same for a narrow table."""
    return _SHORT.get(name, readable(name))
