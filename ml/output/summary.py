"""`training_summary.json`: what was trained on what, what came out, and whether the targets are met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ml.evaluation.metrics import Metrics
from ml.evaluation.targets import Target
from ml.output.export import Exported
from ml.output.files import files_below, sha256_file
from ml.output.run_folder import RunFolder


def make_summary(
    *,
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    epochs: Sequence[Mapping[str, Any]],
    best_epoch: int,
    exported: Exported,
    test: Metrics | None,
    targets: Sequence[Target],
    environment: Mapping[str, Any],
    folder: RunFolder,
) -> dict[str, Any]:
    """Everything a reader needs to believe or doubt the run. `targets` were judged on test rows if there are any."""
    return {
        "model": dict(model),
        "data": dict(data),
        "epochs": list(epochs),
        "best": {"epoch": best_epoch, **exported.validation},
        "test": test,
        "targets": list(targets),
        "targets_judged_on": "validation rows" if test is None else "test rows",
        "chosen_on": "validation rows",
        "targets_met": all(target["met"] for target in targets),
        "calibration": exported.calibration,
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
    """The outcome in one sentence, said as plainly when it is bad."""
    missed = [target["metric"] for target in summary["targets"] if not target["met"]]
    count = len(summary["targets"])
    where = summary["targets_judged_on"]
    if where == summary["chosen_on"]:
        where += ", which also chose the epoch and so flatter"
    if not missed:
        return f"All {count} targets are met on the {where}."
    return f"{len(missed)} of {count} targets are missed on the {where}: {', '.join(missed)}."
