"""What a run came to, in words: for the end of a run, its report, its model card and its trackers.

Comes in: the `Summary` of a run, or the `Runs` of several. Goes out: text. The first thing said, after what
forbids to believe any figure, is whether to use the model, a baseline, or neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ctxtrain.evaluation.metrics import CHIEF
from ctxtrain.reporting.runs_schema import Runs
from ctxtrain.reporting.summary_schema import Baselines, Lead, LeadOverChance, Summary, Target

_NAMES = {
    "majority": "the commonest class",
    "class_prior": "random calls",
    "extra_trees": "extremely randomised trees",
    "catboost": "CatBoost",
}
_SHORT = {"logistic_regression": "logistic", "gradient_boosting": "boosting", "extra_trees": "extra trees"}


def verdict(summary: Summary) -> str:
    """The outcome in a few sentences, said as plainly when it is bad: warnings, baselines, targets, doubts."""
    targets = _of_targets(summary.targets, summary.targets_judged_on, flatters=summary.judged_rows_chose_the_epoch)
    said = [*warnings(summary.data.leaked, summary.unfinished), baselines_said(summary), targets, doubts_said(summary)]
    return " ".join(filter(None, said))


def verdict_of_several(several: Runs) -> str:
    """The same of `runs.json`."""
    runs, lead, doubt = several.runs, several.spread.lead, several.intervals.doubt
    flatters = any(run.judged_rows_chose_the_epoch for run in runs)
    ahead = sum(run.beats_baseline for run in runs)
    beaten = f"In {ahead} of {len(runs)} runs the model beats that run's best baseline beyond chance"
    mean, lowest, highest = (f"{value:+.3f}" for value in (lead.mean, lead.lowest, lead.highest))
    skipping = {run.name: run.skipped_steps for run in runs if run.skipped_steps}
    said = [
        leaks_said(several.leaked),
        comparison_said(several.pooled.value(CHIEF), several.baselines),
        f"{beaten}; in macro-F1 it leads by {mean} on average, {lowest} to {highest}.",
        _of_targets(several.targets, "judged rows of all runs together", flatters=flatters),
        _skipped(sum(skipping.values()), f"metrics.jsonl of {_and([*skipping])}") if skipping else "",
        f"The intervals are not to be trusted: {doubt}." if doubt else "",
        *_left_out(several.baselines.left_out),
    ]
    return " ".join(filter(None, said))


def warnings(leaked: str, unfinished: str | None) -> list[str]:
    """What is to be read before any figure."""
    early = f"This run is unfinished, it {unfinished}; test rows are not read before its end." if unfinished else ""
    return [said for said in (leaks_said(leaked), early) if said]


def leak_mark(leaked: str) -> dict[str, str]:
    """What every figure carries if rows stand in two files although they were allowed to."""
    return {"leaked": leaked} if leaked else {}


def leak_suffix(leaked: str) -> str:
    """The same for a title."""
    return f" (LEAKED: {leaked})" if leaked else ""


def leaks_said(leaked: str) -> str:
    return f"No figure here is to be believed, for rows are in two files: {leaked}." if leaked else ""


def headline(summary: Summary) -> str:
    """The verdict against the targets in one sentence."""
    missed, chance = ([metric_name(name) for name in names] for names in _missed_and_chance(summary.targets))
    count = len(summary.targets)
    where = f"on {summary.judged.rows:,} {'validation' if summary.test is None else 'test'} windows"
    if missed:
        said = f"{len(missed)} of {count} targets {'is' if len(missed) == 1 else 'are'} missed {where}: {_and(missed)}"
        said += f"; {len(chance)} {'is' if len(chance) == 1 else 'are'} met, but within chance" if chance else ""
    else:
        said = f"All {count} targets are met {where}"
        said += f", but within chance: {_and(chance)}" if chance else ", beyond chance"
    flatters = "; these windows also chose the epoch, so the figures flatter"
    return f"{said}{flatters if summary.judged_rows_chose_the_epoch else ''}."


def metric_name(name: str) -> str:
    """macro_f1 → macro-F1, long_recall → LONG recall."""
    label, _, score = name.partition("_")
    return "macro-F1" if name == "macro_f1" else f"{label.upper()} {score}" if score else name


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _missed_and_chance(targets: Sequence[Target]) -> tuple[list[str], list[str]]:
    """The metrics of the targets that are missed, and of those that are met, but within chance."""
    missed = [target.metric for target in targets if target.verdict == "missed"]
    return missed, [target.metric for target in targets if target.verdict == "met, but within chance"]


def _of_targets(targets: Sequence[Target], where: str, *, flatters: bool) -> str:
    missed, chance = _missed_and_chance(targets)
    count = len(targets)
    if flatters:
        where += ", which also chose the epoch and so flatter"
    if missed:
        verb = "is" if len(missed) == 1 else "are"
        said = f"{len(missed)} of {count} targets {verb} missed on the {where}: {', '.join(missed)}."
    else:
        said = f"All {count} targets are met on the {where}."
    return f"{said} Met, but within chance: {', '.join(chance)}." if chance else said


def baselines_said(summary: Summary, *, brief: bool = False) -> str:
    """`comparison_said` of a run."""
    return comparison_said(summary.judged.value(CHIEF), summary.baselines, brief=brief)


def comparison_said(own: float, found: Baselines, *, brief: bool = False) -> str:
    """Whether to use the model, the best baseline or neither, and why; with figures unless it is to be brief.

    `own` is the model's macro-F1, `found` what `compare` found.
    """
    best, chance = found.scores[found.best], found.scores[found.best_without_input]
    name, without_input = readable(found.best), readable(found.best_without_input)
    over_best, over_chance = best.difference.macro_f1, chance.difference.macro_f1
    lead = "" if brief else _figures(over_best, own, best.value(CHIEF))
    own_lead = "" if brief else _figures(over_chance, own, chance.value(CHIEF))
    alone = "" if brief or not best.over_chance else _figures(best.over_chance, best.value(CHIEF), chance.value(CHIEF))
    if found.finding == "ahead":
        return f"The model beats the best baseline, {name}, beyond chance{lead}."
    if found.finding == "ahead, untrusted":
        return (
            f"The model is not shown to beat the best baseline, {name}: it scores more, but intervals that are not to "
            f"be trusted cannot show that this is beyond chance{lead}. Before using it, judge it on 10 blocks of "
            "windows or more, such as days."
        )
    if found.finding == "undecided":
        return (
            f"The model does not beat the best baseline, {name}, beyond chance{lead}. Nor does that baseline beat "
            f"{without_input}{alone}, which the model does{own_lead}. Before using either, judge both on more windows."
        )
    if found.finding == "not ahead, untrusted":
        return (
            f"Which to use is not shown: the model does not beat the best baseline, {name}{lead}, and intervals that "
            f"are not to be trusted cannot show that this baseline beats {without_input}{alone}. Before using either, "
            "judge both on 10 blocks of windows or more, such as days."
        )
    if found.finding == "not ahead":
        too = "does too" if over_chance.interval[0] > 0 else "is not shown to"
        return (
            f"Use {name} instead: {_behind(over_best)}{lead}. That baseline leads "
            f"{without_input}{alone}; the model {too}{own_lead}."
        )
    nothing, look = "Nothing is shown to have been learned:", "look at the labels and at what the windows carry."
    if best is chance:
        return (
            f"{nothing} the model does not beat {without_input} beyond chance{own_lead}. Do not use it; before "
            f"training again, {look}"
        )
    return (
        f"{nothing} neither the model{own_lead} nor the best baseline, {name}{alone}, beats {without_input} beyond "
        f"chance. Use neither; before training again, {look}"
    )


def _behind(lead: Lead) -> str:
    if lead.interval[1] < 0:
        return "it is the best baseline, and the model scores less"
    if lead.value < 0:
        return "it is the best baseline, and the model scores less, though within chance"
    return "it is the best baseline, and the model does not beat it beyond chance"


def _figures(lead: Lead, first: float, second: float) -> str:
    """Two scores in macro-F1 and their difference, in brackets; `looks` widened the interval of the best of several."""
    low, high = lead.interval
    of = f" for the best of {lead.looks}" if isinstance(lead, LeadOverChance) and lead.looks > 1 else ""
    return (
        f" (macro-F1 {first:.3f} against {second:.3f}, difference {lead.value:+.3f}, "
        f"95 % interval{of} {low:+.3f} to {high:+.3f})"
    )


def doubts_said(summary: Summary) -> str:
    """Why the figures may not be believed; empty if nothing speaks against them."""
    said = []
    if summary.skipped_steps:
        said.append(_skipped(summary.skipped_steps, "metrics.jsonl"))
    if doubt := summary.intervals.doubt:
        said.append(f"The intervals are not to be trusted: {doubt}.")
    return " ".join([*said, *_left_out(summary.baselines.left_out)])


def _left_out(reasons: Mapping[str, str]) -> list[str]:
    """A sentence for each reason."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(readable(name))
    return [f"Left out: {_and(own)}; {reason}." for reason, own in names.items()]


def _skipped(steps: int, where: str) -> str:
    were = "step was" if steps == 1 else "steps were"
    return f"{steps} optimizer {were} skipped, for loss or gradient was not finite; {where} has their windows."


def readable(name: str) -> str:
    """How people read a baseline's name."""
    return _NAMES.get(name, name.replace("_", " "))


def short(name: str) -> str:
    """The same in a narrow table."""
    return _SHORT.get(name, readable(name))
