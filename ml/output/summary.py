"""`training_summary.json`: what was trained on what, what came out, and whether the targets are met."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ml.data.rows import Window
from ml.evaluation.assess import assess
from ml.output.export import Exported
from ml.output.files import files_below, sha256_file
from ml.output.run_folder import RunFolder


def assess_export(
    exported: Exported,
    windows: Mapping[str, Iterable[Window]],
    labels: Mapping[str, NDArray[np.int64]],
    targets: Mapping[str, float],
    seed: int,
) -> dict[str, Any]:
    """`assess` of the exported model on the test rows if it was judged on them, else on the validation rows."""
    return assess(
        windows,
        labels,
        "val" if exported.test is None else "test",
        codec=exported.predictor.codec,
        logits_NC=exported.judged_logits_NC,
        temperature=exported.predictor.temperature,
        metrics=exported.test or exported.validation,
        targets=targets,
        thresholds=exported.thresholds,
        seed=seed,
    )


def make_summary(
    *,
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    epochs: Sequence[Mapping[str, Any]],
    best_epoch: int,
    unfinished: str | None,
    skipped: int,
    exported: Exported,
    assessment: Mapping[str, Any],
    environment: Mapping[str, Any],
    folder: RunFolder,
) -> dict[str, Any]:
    """Everything a reader needs to believe or doubt the run; `assessment` is that of `assess_export`."""
    test = exported.test
    leaked = data["leaked"]
    mark = leak_mark(leaked)
    return {
        "model": dict(model),
        "data": dict(data),
        "epochs": [dict(epoch) | mark for epoch in epochs],
        "unfinished": unfinished,
        "skipped_steps": skipped,
        "best": {"epoch": best_epoch, **exported.validation} | mark,
        "test": test and {**test, **mark},
        "targets": [target | mark for target in assessment["targets"]],
        "targets_judged_on": f"{'validation rows' if test is None else 'test rows'}{leak_suffix(leaked)}",
        "chosen_on": "validation rows",
        "judged_rows_chose_the_epoch": test is None,
        "targets_met": all(target["met"] for target in assessment["targets"]),
        "intervals": assessment["intervals"],
        "baselines": assessment["baselines"],
        "calibration": exported.calibration,
        "selective": assessment["selective"],
        "mistakes": assessment["mistakes"],
        "export_check": exported.check,
        "environment": dict(environment),
        "files": {
            path.relative_to(folder.root).as_posix(): sha256_file(path)
            for path in (
                folder.best_model,
                folder.zip,
                *(folder.export / name for name in files_below(folder.export)),
            )
        },
    }


def verdict(summary: Mapping[str, Any]) -> str:
    """The outcome in a few sentences, said as plainly when it is bad: warnings, targets, baselines, doubts."""
    said = [*warnings(summary["data"]["leaked"], summary["unfinished"]), _of_targets(summary), baselines_said(summary)]
    return " ".join(filter(None, (*said, doubts_said(summary))))


def warnings(leaked: str, unfinished: str | None) -> list[str]:
    """What is to be read before any figure."""
    early = f"This run is unfinished, it {unfinished}; test rows are not read before its end." if unfinished else ""
    return [said for said in (leaks_said(leaked), early) if said]


def verdict_of_several(report: Mapping[str, Any]) -> str:
    """The same of `runs.json`."""
    runs, lead = report["runs"], report["spread"]["lead"]
    flatters = any(run["judged_rows_chose_the_epoch"] for run in runs)
    where = {"targets_judged_on": "judged rows of all runs together", "judged_rows_chose_the_epoch": flatters}
    ahead, doubt = sum(run["beats_baseline"] for run in runs), report["intervals"]["doubt"]
    beaten = f"In {ahead} of {len(runs)} runs the model beats the best baseline beyond chance"
    mean, lowest, highest = (f"{lead[name]:+.3f}" for name in ("mean", "lowest", "highest"))
    skipping = {run["name"]: run["skipped_steps"] for run in runs if run["skipped_steps"]}
    said = [
        leaks_said(report["leaked"]),
        _of_targets({**report, **where}),
        f"{beaten}; in macro-F1 it leads by {mean} on average, {lowest} to {highest}.",
        _skipped(sum(skipping.values()), f"metrics.jsonl of {_and([*skipping])}") if skipping else "",
        f"The intervals are not to be trusted: {doubt}." if doubt else "",
    ]
    return " ".join(filter(None, said))


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
    """What the model beats and what it does not, with the differences unless it is to be brief."""
    baselines, trusted = summary["baselines"], summary["intervals"]["trusted"]
    own = (summary["test"] or summary["best"])["macro_f1"]
    best, chance = baselines["best"], baselines["best_without_input"]
    said = [_comparison(own, "the best baseline", best, baselines["scores"][best], trusted, brief)]
    low, _ = baselines["scores"][chance]["difference"]["macro_f1"]["interval"]
    if low <= 0:
        said.append("Nothing is shown to have been learned.")
    elif best != chance and baselines["scores"][best]["difference"]["macro_f1"]["interval"][0] <= 0:
        said.append(_comparison(own, "what needs no input", chance, baselines["scores"][chance], trusted, brief))
    return " ".join(said)


def _comparison(own: float, what: str, name: str, scores: Mapping[str, Any], trusted: bool, brief: bool) -> str:
    low, high = scores["difference"]["macro_f1"]["interval"]
    figures = (
        f"macro-F1 {own:.3f} against {scores['macro_f1']:.3f}, "
        f"difference {own - scores['macro_f1']:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}"
    )
    if low > 0 and trusted:
        said = f"The model beats {what}, {readable(name)}, beyond chance"
    elif low > 0:
        said = f"The model scores more than {what}, {readable(name)}, but intervals that are not to be trusted cannot "
        said += "show that this is beyond chance"
    elif high < 0:
        said = f"The model does not beat {what}, {readable(name)}: it scores less"
    elif own < scores["macro_f1"]:
        said = f"The model does not beat {what}, {readable(name)}: it scores less, though within chance"
    else:
        said = f"The model does not beat {what}, {readable(name)}, beyond chance"
    return f"{said}." if brief else f"{said} ({figures})."


def doubts_said(summary: Mapping[str, Any]) -> str:
    """Why the figures may not be believed; empty if nothing speaks against them."""
    said = []
    if skipped := summary["skipped_steps"]:
        said.append(_skipped(skipped, "metrics.jsonl"))
    if doubt := summary["intervals"]["doubt"]:
        said.append(f"The intervals are not to be trusted: {doubt}.")
    if reason := next(iter(summary["baselines"]["left_out"].values()), None):
        names = " and ".join(readable(name) for name in summary["baselines"]["left_out"])
        said.append(f"Left out: {names}; {reason}.")
    return " ".join(said)


def _skipped(steps: int, where: str) -> str:
    were = "step was" if steps == 1 else "steps were"
    return f"{steps} optimizer {were} skipped, for loss or gradient was not finite; {where} has their windows."


def readable(name: str) -> str:
    """How people read a baseline's name."""
    return {"majority": "the commonest class", "class_prior": "random calls"}.get(name, name.replace("_", " "))
