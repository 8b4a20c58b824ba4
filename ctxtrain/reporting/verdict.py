"""What a run came to, in words: for the end of a run, its report, its model card and its trackers.

Comes in: a summary of `make_summary`, or the report of `run_several`. Goes out: text. The first thing said, after what
forbids to believe any figure, is whether to use the model, a baseline, or neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_NAMES = {
    "majority": "the commonest class",
    "class_prior": "random calls",
    "extra_trees": "extremely randomised trees",
    "catboost": "CatBoost",
}
_SHORT = {"logistic_regression": "logistic", "gradient_boosting": "boosting", "extra_trees": "extra trees"}


def verdict(summary: Mapping[str, Any]) -> str:
    """The outcome in a few sentences, said as plainly when it is bad: warnings, baselines, targets, doubts."""
    said = [*warnings(summary["data"]["leaked"], summary["unfinished"]), baselines_said(summary), _of_targets(summary)]
    return " ".join(filter(None, (*said, doubts_said(summary))))


def verdict_of_several(report: Mapping[str, Any]) -> str:
    """The same of `runs.json`."""
    runs, lead = report["runs"], report["spread"]["lead"]
    flatters = any(run["judged_rows_chose_the_epoch"] for run in runs)
    where = {"targets_judged_on": "judged rows of all runs together", "judged_rows_chose_the_epoch": flatters}
    ahead, doubt = sum(run["beats_baseline"] for run in runs), report["intervals"]["doubt"]
    beaten = f"In {ahead} of {len(runs)} runs the model beats that run's best baseline beyond chance"
    mean, lowest, highest = (f"{lead[name]:+.3f}" for name in ("mean", "lowest", "highest"))
    skipping = {run["name"]: run["skipped_steps"] for run in runs if run["skipped_steps"]}
    said = [
        leaks_said(report["leaked"]),
        comparison_said(report["pooled"]["macro_f1"], report["baselines"]),
        f"{beaten}; in macro-F1 it leads by {mean} on average, {lowest} to {highest}.",
        _of_targets({**report, **where}),
        _skipped(sum(skipping.values()), f"metrics.jsonl of {_and([*skipping])}") if skipping else "",
        f"The intervals are not to be trusted: {doubt}." if doubt else "",
        *_left_out(report["baselines"]["left_out"]),
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


def headline(summary: Mapping[str, Any]) -> str:
    """The verdict against the targets in one sentence."""
    by_verdict: dict[str, list[str]] = {}
    for target in summary["targets"]:
        by_verdict.setdefault(target["verdict"], []).append(metric_name(target["metric"]))
    missed, chance = by_verdict.get("missed", []), by_verdict.get("met, but within chance", [])
    count, scores = len(summary["targets"]), summary["test"] or summary["best"]
    where = f"on {scores['rows']:,} {'validation' if summary['test'] is None else 'test'} windows"
    if missed:
        said = f"{len(missed)} of {count} targets {'is' if len(missed) == 1 else 'are'} missed {where}: {_and(missed)}"
        said += f"; {len(chance)} {'is' if len(chance) == 1 else 'are'} met, but within chance" if chance else ""
    else:
        said = f"All {count} targets are met {where}"
        said += f", but within chance: {_and(chance)}" if chance else ", beyond chance"
    flatters = "; these windows also chose the epoch, so the figures flatter"
    return f"{said}{flatters if summary['judged_rows_chose_the_epoch'] else ''}."


def metric_name(name: str) -> str:
    """macro_f1 → macro-F1, long_recall → LONG recall."""
    label, _, score = name.partition("_")
    return "macro-F1" if name == "macro_f1" else f"{label.upper()} {score}" if score else name


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _of_targets(summary: Mapping[str, Any]) -> str:
    by_verdict: dict[str, list[str]] = {}
    for target in summary["targets"]:
        by_verdict.setdefault(target["verdict"], []).append(target["metric"])
    missed, chance = by_verdict.get("missed", []), by_verdict.get("met, but within chance", [])
    count, where = len(summary["targets"]), summary["targets_judged_on"]
    if summary["judged_rows_chose_the_epoch"]:
        where += ", which also chose the epoch and so flatter"
    if missed:
        verb = "is" if len(missed) == 1 else "are"
        said = f"{len(missed)} of {count} targets {verb} missed on the {where}: {', '.join(missed)}."
    else:
        said = f"All {count} targets are met on the {where}."
    return f"{said} Met, but within chance: {', '.join(chance)}." if chance else said


def baselines_said(summary: Mapping[str, Any], *, brief: bool = False) -> str:
    """`comparison_said` of a run."""
    return comparison_said((summary["test"] or summary["best"])["macro_f1"], summary["baselines"], brief=brief)


def comparison_said(own: float, found: Mapping[str, Any], *, brief: bool = False) -> str:
    """Whether to use the model, the best baseline or neither, and why; with figures unless it is to be brief.

    `own` is the model's macro-F1, `found` what `compare` found.
    """
    scores = found["scores"]
    best, chance = scores[found["best"]], scores[found["best_without_input"]]
    name, without_input = readable(found["best"]), readable(found["best_without_input"])
    lead = "" if brief else _figures(best["difference"]["macro_f1"], own, best["macro_f1"])
    own_lead = "" if brief else _figures(chance["difference"]["macro_f1"], own, chance["macro_f1"])
    alone = (
        "" if brief or not best["over_chance"] else _figures(best["over_chance"], best["macro_f1"], chance["macro_f1"])
    )
    if found["finding"] == "ahead":
        return f"The model beats the best baseline, {name}, beyond chance{lead}."
    if found["finding"] == "ahead, untrusted":
        return (
            f"The model is not shown to beat the best baseline, {name}: it scores more, but intervals that are not to "
            f"be trusted cannot show that this is beyond chance{lead}. Before using it, judge it on 10 blocks of "
            "windows or more, such as days."
        )
    if found["finding"] == "undecided":
        return (
            f"The model does not beat the best baseline, {name}, beyond chance{lead}. Nor does that baseline beat "
            f"{without_input}{alone}, which the model does{own_lead}. Before using either, judge both on more windows."
        )
    if found["finding"] == "not ahead, untrusted":
        return (
            f"Which to use is not shown: the model does not beat the best baseline, {name}{lead}, and intervals that "
            f"are not to be trusted cannot show that this baseline beats {without_input}{alone}. Before using either, "
            "judge both on 10 blocks of windows or more, such as days."
        )
    if found["finding"] == "not ahead":
        too = "does too" if chance["difference"]["macro_f1"]["interval"][0] > 0 else "is not shown to"
        return (
            f"Use {name} instead: {_behind(best['difference']['macro_f1'])}{lead}. That baseline leads "
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


def _behind(lead: Mapping[str, Any]) -> str:
    if lead["interval"][1] < 0:
        return "it is the best baseline, and the model scores less"
    if lead["value"] < 0:
        return "it is the best baseline, and the model scores less, though within chance"
    return "it is the best baseline, and the model does not beat it beyond chance"


def _figures(lead: Mapping[str, Any], first: float, second: float) -> str:
    """Two scores in macro-F1 and their difference, in brackets; `looks` widened the interval of the best of several."""
    low, high = lead["interval"]
    of = f" for the best of {lead['looks']}" if lead.get("looks", 1) > 1 else ""
    return (
        f" (macro-F1 {first:.3f} against {second:.3f}, difference {lead['value']:+.3f}, "
        f"95 % interval{of} {low:+.3f} to {high:+.3f})"
    )


def doubts_said(summary: Mapping[str, Any]) -> str:
    """Why the figures may not be believed; empty if nothing speaks against them."""
    said = []
    if skipped := summary["skipped_steps"]:
        said.append(_skipped(skipped, "metrics.jsonl"))
    if doubt := summary["intervals"]["doubt"]:
        said.append(f"The intervals are not to be trusted: {doubt}.")
    return " ".join([*said, *_left_out(summary["baselines"]["left_out"])])


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
