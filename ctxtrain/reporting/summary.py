"""Build `training_summary.json`: model, data, epochs, scores, targets, checks and the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ctxtrain.export.package import ExportResult
from ctxtrain.reporting.summary_schema import SUMMARY_VERSION, Summary
from ctxtrain.reporting.verdict import leak_mark, leak_suffix, verdict


def make_summary(
    *,
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    epochs: Sequence[Mapping[str, Any]],
    best_epoch: int,
    unfinished: str | None,
    skipped: int,
    exported: ExportResult,
    environment: Mapping[str, Any],
) -> Summary:
    """The validated summary of a run, with the verdict in words as its first key."""
    scores = exported.scores
    test, assessment = scores.test, scores.assessment
    leaked = data["leaked"]
    mark = leak_mark(leaked)
    values = {
        "model": dict(model),
        "data": dict(data),
        "epochs": [dict(epoch) | mark for epoch in epochs],
        "unfinished": unfinished,
        "skipped_steps": skipped,
        "best": {"epoch": best_epoch, **scores.validation} | mark,
        "test": test and {**test, **mark},
        "targets": [target | mark for target in assessment["targets"]],
        "targets_judged_on": f"{'validation rows' if test is None else 'test rows'}{leak_suffix(leaked)}",
        "averaging": exported.averaging,
        "chosen_on": "validation rows",
        "judged_rows_chose_the_epoch": test is None,
        "targets_met": all(target["met"] for target in assessment["targets"]),
        "intervals": assessment["intervals"],
        "baselines": assessment["baselines"],
        "calibration": scores.calibration,
        "selective": assessment["selective"],
        "mistakes": assessment["mistakes"],
        "export_check": exported.check,
        "environment": dict(environment),
        "files": exported.files,
    }
    summary = Summary.model_validate({"verdict": "", "version": SUMMARY_VERSION, **values})
    return summary.model_copy(update={"verdict": verdict(summary)})
