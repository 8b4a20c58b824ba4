"""`training_summary.json`: what was trained on what, what came out, and whether the targets are met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ctxtrain.export.package import Exported
from ctxtrain.reporting.summary_schema import SUMMARY_VERSION, Summary
from ctxtrain.reporting.verdict import leak_mark, leak_suffix, verdict
from ctxtrain.storage.atomic_files import files_below, sha256_file
from ctxtrain.storage.run_folder import RunFolder


def make_summary(
    *,
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    epochs: Sequence[Mapping[str, Any]],
    best_epoch: int,
    unfinished: str | None,
    skipped: int,
    exported: Exported,
    environment: Mapping[str, Any],
    folder: RunFolder,
) -> Summary:
    """Everything a reader needs to believe or doubt the run, the verdict in words first."""
    test, assessment = exported.test, exported.assessment
    leaked = data["leaked"]
    mark = leak_mark(leaked)
    found = {
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
    summary = Summary.model_validate({"verdict": "", "version": SUMMARY_VERSION, **found})
    return summary.model_copy(update={"verdict": verdict(summary)})
